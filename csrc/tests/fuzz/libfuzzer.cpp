// Gives libFuzzer what driver.cpp has: the target's seeds among its mutations, and a count of what was accepted.
#include <algorithm>
#include <cstring>

#include "fuzz.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit([] {
    const auto& outcomes = xlm_ds_fuzz::outcomes();
    std::printf("%llu accepted, %llu rejected\n", static_cast<unsigned long long>(outcomes.accepted),
                static_cast<unsigned long long>(outcomes.rejected));
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned int random) {
  constexpr unsigned int kOneIn = 64;
  static const auto seeds = xlm_ds_fuzz::seeds();
  if (random % kOneIn == 0) {
    const auto& seed = seeds[random / kOneIn % seeds.size()];
    size = std::min(seed.size(), max_size);
    std::memcpy(data, seed.data(), size);
  }
  return LLVMFuzzerMutate(data, size, max_size);
}
