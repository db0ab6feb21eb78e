#include "xlm_ds/stored_ids.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace xlm_ds {
namespace {

/// Calls use(Stored{}) with the integer type of `dtype`.
template <typename Use>
auto with_type(Dtype dtype, Use use) {
  switch (dtype) {
    case Dtype::uint8: return use(std::uint8_t{});
    case Dtype::int8: return use(std::int8_t{});
    case Dtype::int16: return use(std::int16_t{});
    case Dtype::int32: return use(std::int32_t{});
    case Dtype::int64: return use(std::int64_t{});
    case Dtype::uint16: return use(std::uint16_t{});
    case Dtype::uint32: return use(std::uint32_t{});
    case Dtype::uint64: return use(std::uint64_t{});
  }
  throw std::logic_error("a dtype that read_index does not return");
}

}  // namespace

std::uint64_t widen_ids(Dtype dtype, const std::byte* source, std::int64_t id_bias, std::span<std::int64_t> ids) {
  if (ids.empty()) return 0;
  return with_type(dtype, [&](auto stored) {
    const auto id_of = [id_bias](auto value) {
      return static_cast<std::uint64_t>(value) - static_cast<std::uint64_t>(id_bias);  // may wrap
    };
    // The bounds are those of the stored values, which are narrower than ids, so that more fit a register: 395 instead of
    // 352 million tokens per CPU-second (interleaved runs of what benchmarks/loader.py does, from C++; 2-core AMD EPYC,
    // November 2026).
    auto least = std::numeric_limits<decltype(stored)>::max();
    auto greatest = std::numeric_limits<decltype(stored)>::min();
    for (std::size_t i = 0; i < ids.size(); ++i) {
      std::memcpy(&stored, source + i * sizeof(stored), sizeof(stored));
      ids[i] = static_cast<std::int64_t>(id_of(stored));
      least = std::min(least, stored);
      greatest = std::max(greatest, stored);
    }
    // An id that wraps comes from the least value, if it is negative or below the bias.
    return std::max(id_of(least), id_of(greatest));
  });
}

void narrow_ids(Dtype dtype, std::span<const std::int64_t> ids, std::int64_t id_bias, std::span<std::byte> stored) {
  if (stored.size() != ids.size() * element_bytes(dtype)) throw std::invalid_argument("stored ids must fill their place");
  with_type(dtype, [&](auto value) {
    std::byte* to = stored.data();
    for (const std::int64_t id : ids) {
      value = static_cast<decltype(value)>(id + id_bias);
      std::memcpy(to, &value, sizeof(value));
      to += sizeof(value);
    }
  });
}

std::uint64_t greatest_id(Dtype dtype, std::int64_t id_bias) {
  const std::uint64_t stored = with_type(
      dtype, [](auto value) { return static_cast<std::uint64_t>(std::numeric_limits<decltype(value)>::max()); });
  return stored - static_cast<std::uint64_t>(id_bias);
}

}  // namespace xlm_ds
