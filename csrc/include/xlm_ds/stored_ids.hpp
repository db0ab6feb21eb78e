#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "xlm_ds/index_format.hpp"

namespace xlm_ds {

/// Widens the values stored from `source` on to ids, subtracting `id_bias` (Index::id_bias), and returns the greatest
/// as unsigned, so that a negative one is too great as well. 0 of no ids. `source` may have any alignment.
std::uint64_t widen_ids(Dtype dtype, const std::byte* source, std::int64_t id_bias, std::span<std::int64_t> ids);

/// The reverse: fills `stored`, element_bytes(dtype) for each id. Every id must be at most greatest_id.
void narrow_ids(Dtype dtype, std::span<const std::int64_t> ids, std::int64_t id_bias, std::span<std::byte> stored);

/// The greatest id that can be stored.
[[nodiscard]] std::uint64_t greatest_id(Dtype dtype, std::int64_t id_bias);

}  // namespace xlm_ds
