#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

/// The first bytes of a word as numbers: how the tables of words compare the short ones without a branch.
namespace xlm_ds {

static_assert(std::endian::native == std::endian::little, "the first bytes of a word are the low ones of its key");

[[nodiscard]] inline std::uint64_t load_eight(const char* at) noexcept {
  std::uint64_t bytes;
  std::memcpy(&bytes, at, sizeof(bytes));
  return bytes;
}

/// kFirstBytes<numbers>[n] keeps the first n bytes of that many numbers.
template <std::size_t numbers>
inline constexpr std::array<std::array<std::uint64_t, numbers>, 8 * numbers + 1> kFirstBytes = [] {
  std::array<std::array<std::uint64_t, numbers>, 8 * numbers + 1> masks{};
  for (std::size_t n = 0; n < masks.size(); ++n) {
    for (std::size_t byte = 0; byte < n; ++byte) masks[n][byte / 8] |= std::uint64_t{0xFF} << (8 * (byte % 8));
  }
  return masks;
}();

}  // namespace xlm_ds
