#pragma once

#include <cstdint>

/// The core's only source of randomness: SplitMix64 read as a function of (key, index), so that any
/// number can be had without those before it. Source: Steele, Lea and Flood, "Fast splittable
/// pseudorandom number generators", 2014; the mixer is David Stafford's variant 13. It passes
/// BigCrush; it is no cipher. Its twin is tests/reference.py.
namespace xlm_ds {

/// A bijection of the 64-bit numbers in which every input bit moves about half of the output bits.
[[nodiscard]] constexpr std::uint64_t mix64(std::uint64_t value) noexcept {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9U;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBU;
  return value ^ (value >> 31);
}

/// Number `index` of the stream `key`: uniform over 64 bits, different for different indices. A
/// number may in turn be the key of a stream: random_at(random_at(seed, a), b) belongs to (seed, a,
/// b).
[[nodiscard]] constexpr std::uint64_t random_at(std::uint64_t key, std::uint64_t index) noexcept {
  return mix64(key + 0x9E3779B97F4A7C15U * (index + 1));
}

/// What a run's seed is used for: the first level below it, so that no two uses share a stream.
enum class Purpose : std::uint64_t { language_order = 0, block_order = 1, masks = 2 };

[[nodiscard]] constexpr std::uint64_t key_for(std::uint64_t seed, Purpose purpose) noexcept {
  return random_at(seed, static_cast<std::uint64_t>(purpose));
}

__extension__ using Uint128 = unsigned __int128;

/// One random number spent digit by digit, as a fraction in a mixed radix: each take(n) gives a
/// whole number in [0, n). The digits are independent and even to within the product of all n over
/// 2^64.
class Digits {
 public:
  explicit constexpr Digits(std::uint64_t random) noexcept : rest_(random) {}
  [[nodiscard]] constexpr std::uint64_t take(std::uint64_t n) noexcept {
    const Uint128 product = Uint128{rest_} * n;
    rest_ = static_cast<std::uint64_t>(product);
    return static_cast<std::uint64_t>(product >> 64);
  }

 private:
  std::uint64_t rest_;
};

}  // namespace xlm_ds
