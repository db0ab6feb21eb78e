#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

/// A test program without a framework: TEST(name) { CHECK(condition); CHECK_THROWS(statement, Exception); }
namespace xlm_ds_test {

struct Test {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
inline int& checks() {
  static int count = 0;
  return count;
}
inline bool add(const char* name, std::function<void()> body) {
  tests().push_back({name, std::move(body)});
  return true;
}
inline void check(bool passed, const char* expression, const char* file, int line) {
  ++checks();
  if (passed) return;
  ++failures();
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, expression);
}

}  // namespace xlm_ds_test

#define TEST(name)                                                             \
  static void test_##name();                                                   \
  static const bool added_##name = xlm_ds_test::add(#name, test_##name);       \
  static void test_##name()
#define CHECK(expression) xlm_ds_test::check(static_cast<bool>(expression), #expression, __FILE__, __LINE__)
#define CHECK_THROWS(statement, Exception)                                     \
  do {                                                                         \
    bool thrown = false;                                                       \
    try {                                                                      \
      statement;                                                               \
    } catch (const Exception&) {                                               \
      thrown = true;                                                           \
    }                                                                          \
    xlm_ds_test::check(thrown, #statement " throws " #Exception, __FILE__, __LINE__); \
  } while (false)
