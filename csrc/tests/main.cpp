#include <cstdio>
#include <exception>

#include "check.hpp"

int main() {
  for (const auto& test : xlm_ds_test::tests()) {
    try {
      test.body();
    } catch (const std::exception& e) {
      ++xlm_ds_test::failures();
      std::fprintf(stderr, "%s: threw %s\n", test.name, e.what());
    }
  }
  std::printf("%zu tests, %d checks, %d failed\n", xlm_ds_test::tests().size(), xlm_ds_test::checks(), xlm_ds_test::failures());
  return xlm_ds_test::failures() == 0 && xlm_ds_test::checks() > 0 ? 0 : 1;
}
