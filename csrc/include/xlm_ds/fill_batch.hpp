#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "xlm_ds/mask.hpp"
#include "xlm_ds/stream.hpp"

/// Samples to arrays a model can take: gathers blocks and masks them, in the caller's memory.
namespace xlm_ds {

/// Which blocks, by row: those of Order::fill_samples, or any others (evaluation puts the mask draw
/// for the pass). `numbers` are places in `streams`; one that
/// no row uses may be null.
struct Rows {
  std::span<const Stream* const> streams;
  std::span<const std::int64_t> numbers;
  std::span<const std::int64_t> passes;
  std::span<const std::int64_t> blocks;
};

/// The batch, row after row. With T = block_size + 1 and K = masked_count(ratio, block_size):
/// input_ids[rows·T]: eos, the masked block, pad; of a pair eos, a line, eos, a line, pad.
/// languages[rows], second_languages[rows]: of a row and of its second half; -1 without one.
/// second_starts[rows]: where in the row the second half begins, with an eos; T without one.
/// masked_positions[rows·K]: index in input_ids, ascending; in a short row, filled up with its first.
/// targets[rows·K]: the tokens that were there; pad where masked_positions is filled up.
struct BatchArrays {
  std::span<std::int64_t> input_ids;
  std::span<std::int64_t> languages;
  std::span<std::int64_t> second_languages;
  std::span<std::int64_t> second_starts;
  std::span<std::int64_t> masked_positions;
  std::span<std::int64_t> targets;
};

/// Whether some row is padded, and whether some row is a pair.
struct Filled {
  bool has_padding = false;
  bool has_pairs = false;
};

/// Fills the batch. O(rows·T); each row is decided by its stream's languages and its own numbers
/// alone. All streams used have the same block_size. Throws InputError for a block that cannot be
/// read or masked, std::invalid_argument if a length does not fit, std::out_of_range for a stream or
/// block that is not there.
Filled fill_batch(const Rows& rows, const Masking& masking, const BatchArrays& out);

/// Targets that fill_batch would give, without those that fill up; reads no tokens. Throws as
/// fill_batch.
[[nodiscard]] std::uint64_t count_targets(const Rows& rows, double mask_ratio);

}  // namespace xlm_ds
