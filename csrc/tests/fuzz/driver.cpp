// Runs a fuzz target without libFuzzer, the same inputs for the same seed on every machine:
//
//     fuzz_words --runs 10000000 --seed 1     random mutations of the target's seeds
//     fuzz_words crash-fuzz_words             a file again, such as one that a crash has left
//
// What ends the program leaves its input in ./crash-TARGET; so does an input that takes longer than a minute.
#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <unistd.h>
#include <vector>

#include "fuzz.hpp"

// Both sanitizers then end by SIGABRT, and are heard by save_and_die(). Short memory of what was freed: twice the inputs
// a second, and one input frees little.
extern "C" const char* __asan_default_options() { return "abort_on_error=1:quarantine_size_mb=4:malloc_context_size=8"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace {

using namespace std::string_view_literals;

constexpr std::size_t kLongestInput = 1024;  // bytes; most bugs need few, and short inputs are many
constexpr std::size_t kPool = 512;           // inputs to mutate
constexpr unsigned kSecondsPerBatch = 60;
constexpr std::uint64_t kBatch = 1024;

// What the formats treat in a way of its own; random bytes would seldom hit upon it.
constexpr std::array kTokens{
    " "sv,        "\n"sv,       "\r"sv,           "\r\n"sv,    "\0"sv,        "\xFF"sv,
    "</w>"sv,     "@@"sv,       "@@ "sv,          " 1\n"sv,    "#version"sv,  "<unk>"sv,
    "\xC2\x85"sv, "\xC2\xA0"sv, "\xE2\x80\x89"sv, "\u3000"sv,  "\u1680"sv,    "\xED\xA0\x80"sv,
    "\xF4\x90"sv, "\U0010FFFF"sv, "\u0301"sv,     "\xC0\x80"sv, "\x80"sv,      "\x7F"sv};
constexpr std::array<std::uint64_t, 12> kNumbers{
    0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
    0x7FFFFFFFFFFFFFFF, 0x8000000000000000};

const char* target = "";
std::string input;  // the one that runs: for save_and_die

/// Only calls that a signal handler may make.
void save_and_die(int signal) {
  std::array<char, 256> name{};
  constexpr std::string_view kPrefix = "crash-";
  std::copy(kPrefix.begin(), kPrefix.end(), name.begin());
  std::strncpy(name.data() + kPrefix.size(), target, name.size() - kPrefix.size() - 1);
  const int file = ::open(name.data(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  const bool saved = file >= 0 && ::write(file, input.data(), input.size()) >= 0;
  constexpr std::string_view kSlow = "an input took longer than a minute\n";
  constexpr std::string_view kSaved = "the input was written to crash-TARGET\n";
  if (signal == SIGALRM) (void)!::write(STDERR_FILENO, kSlow.data(), kSlow.size());
  if (saved) (void)!::write(STDERR_FILENO, kSaved.data(), kSaved.size());
  ::signal(SIGABRT, SIG_DFL);
  std::abort();
}

/// SplitMix64, as in xlm_ds/random.hpp, but independent of it.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t mixed = state_ += 0x9E3779B97F4A7C15;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB;
    return mixed ^ mixed >> 31;
  }
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(next() % bound); }

 private:
  std::uint64_t state_;
};

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed), pool_(xlm_ds_fuzz::seeds()), seeds_(pool_.size()) {}

  /// A mutation, or several, of one of the inputs kept.
  std::string make() {
    std::string made = pick();
    for (std::size_t n = 1 + random_.below(4); n != 0; --n) mutate(made);
    made.resize(std::min(made.size(), kLongestInput));
    return made;
  }

  /// An input that the core took is a good start for the next; the seeds stay.
  void keep(const std::string& made) {
    if (pool_.size() < kPool) {
      pool_.push_back(made);
    } else {
      pool_[seeds_ + random_.below(kPool - seeds_)] = made;
    }
  }

 private:
  const std::string& pick() { return pool_[random_.below(random_.below(4) == 0 ? seeds_ : pool_.size())]; }

  void mutate(std::string& made) {
    const std::size_t at = random_.below(made.size() + 1);
    const std::size_t length = std::min(1 + random_.below(random_.below(8) == 0 ? 128 : 8), made.size() - at);
    switch (random_.below(8)) {
      case 0: return flip(made, at);
      case 1: made.insert(at, 1, static_cast<char>(random_.next())); return;
      case 2: made.insert(at, kTokens[random_.below(kTokens.size())]); return;
      case 3: made.erase(at, length); return;
      case 4: made.insert(random_.below(made.size() + 1), made.substr(at, length)); return;
      case 5: return take_from_another(made, at, length);
      default: return change_number(made, at);
    }
  }

  void flip(std::string& made, std::size_t at) {
    if (at < made.size()) made[at] = static_cast<char>(made[at] ^ 1 << random_.below(8));
  }

  void take_from_another(std::string& made, std::size_t at, std::size_t length) {
    const std::string& other = pick();
    const std::size_t from = random_.below(other.size() + 1);
    made.replace(at, length, other, from, 1 + random_.below(64));
  }

  /// The little-endian number at `at`, of 1, 2, 4 or 8 bytes, becomes one at a limit or a neighbour of its own.
  void change_number(std::string& made, std::size_t at) {
    const std::size_t bytes = std::size_t{1} << random_.below(4);
    if (made.size() < at + bytes) return;
    std::uint64_t number = 0;
    std::memcpy(&number, made.data() + at, bytes);
    if (random_.below(2) == 0) {
      number = kNumbers[random_.below(kNumbers.size())];
    } else {
      number += random_.below(9) - 4;
    }
    std::memcpy(made.data() + at, &number, bytes);
  }

  Random random_;
  std::vector<std::string> pool_;
  std::size_t seeds_;  // the first of the pool
};

void run_input() {
  (void)LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
}

void run_mutations(std::uint64_t runs, std::uint64_t seed) {
  const auto start = std::chrono::steady_clock::now();
  const auto& outcomes = xlm_ds_fuzz::outcomes();
  for (const auto& valid : xlm_ds_fuzz::seeds()) {
    input = valid;
    run_input();
    xlm_ds_fuzz::require(outcomes.rejected == 0, "the core takes the seeds");
  }
  Mutator mutator(seed);
  for (std::uint64_t run = 0; run < runs; ++run) {
    if (run % kBatch == 0) ::alarm(kSecondsPerBatch);
    input = mutator.make();
    const std::uint64_t before = outcomes.accepted;
    run_input();
    if (outcomes.accepted != before) mutator.keep(input);
  }
  ::alarm(0);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  std::printf("%s: %llu inputs of seed %llu in %.0f s (%.0f a second): %llu accepted, %llu rejected, 0 failed\n", target,
              static_cast<unsigned long long>(runs), static_cast<unsigned long long>(seed), taken.count(),
              static_cast<double>(runs) / taken.count(), static_cast<unsigned long long>(outcomes.accepted),
              static_cast<unsigned long long>(outcomes.rejected));
}

}  // namespace

int main(int argc, char** argv) {
  target = std::strrchr(argv[0], '/') == nullptr ? argv[0] : std::strrchr(argv[0], '/') + 1;
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM}) {
    // The address sanitizer has taken the others, and reports before it aborts.
    struct sigaction old{};
    if (::sigaction(signal, nullptr, &old) == 0 && old.sa_handler == SIG_DFL) std::signal(signal, save_and_die);
  }
  std::uint64_t runs = 100000, seed = 1;
  std::vector<const char*> files;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--runs" && i + 1 < argc) {
      runs = std::strtoull(argv[++i], nullptr, 10);
    } else if (flag == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      files.push_back(argv[i]);
    }
  }
  for (const char* const path : files) {
    std::ifstream file(path, std::ios::binary);
    xlm_ds_fuzz::require(file.good(), "a file given can be read");
    input.assign(std::istreambuf_iterator<char>(file), {});
    run_input();
  }
  if (files.empty()) run_mutations(runs, seed);
  return 0;
}
