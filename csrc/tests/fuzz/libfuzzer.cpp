// Gives libFuzzer what driver.cpp has: its flags, the target's seeds among the mutations, and a line at the end.
#include <algorithm>
#include <cstring>
#include <deque>

#include "fuzz.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);
extern "C" const char* __asan_default_options() { return "quarantine_size_mb=4:malloc_context_size=8"; }

/// Makes -runs=N of --runs N, and so on; libFuzzer reads the flags afterwards.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  static const char* const program = (*argv)[0];
  static std::deque<std::string> flags{program, "-max_len=1024", "-verbosity=0"};
  for (int i = 1; i < *argc; ++i) {
    const std::string_view given = (*argv)[i];
    const bool pair = given.starts_with("--") && i + 1 < *argc;
    flags.push_back(pair ? std::string(given.substr(1)) + "=" + (*argv)[++i] : std::string(given));
  }
  static std::vector<char*> pointers;
  for (auto& flag : flags) pointers.push_back(flag.data());
  *argc = static_cast<int>(pointers.size());
  *argv = pointers.data();
  std::atexit([] {
    const auto& outcomes = xlm_ds_fuzz::outcomes();
    std::printf("%s, libFuzzer: %llu accepted, %llu rejected\n", program,
                static_cast<unsigned long long>(outcomes.accepted), static_cast<unsigned long long>(outcomes.rejected));
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
