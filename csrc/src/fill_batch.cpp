#include "xlm_ds/fill_batch.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "xlm_ds/special_ids.hpp"

namespace xlm_ds {
namespace {

// Rows whose blocks are asked for together, so that their page walks and cache misses overlap: 395
// instead of 330 million shuffled tokens per CPU-second when each row asks for the next one alone
// (interleaved runs of what benchmarks/loader.py does, from C++; 2-core AMD EPYC, November 2026);
// 8 and 32 at once did as well.
constexpr std::size_t kRowsAtOnce = 16;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_columns(const Rows& rows) {
  const std::size_t count = rows.numbers.size();
  require(rows.passes.size() == count && rows.blocks.size() == count,
          "streams, passes and blocks differ in length");
}

const Stream& stream_of(const Rows& rows, std::size_t row) {
  const auto number = static_cast<std::size_t>(rows.numbers[row]);
  if (number >= rows.streams.size() || rows.streams[number] == nullptr) {
    throw std::out_of_range("there is no stream " + std::to_string(rows.numbers[row]));
  }
  return *rows.streams[number];
}

std::uint64_t block_of(const Rows& rows, std::size_t row) {
  return static_cast<std::uint64_t>(rows.blocks[row]);
}

void prefetch(const Rows& rows, std::size_t first, std::size_t end) {
  for (std::size_t row = first; row < end; ++row) {
    stream_of(rows, row).prefetch(block_of(rows, row));
  }
}

}  // namespace

Filled fill_batch(const Rows& rows, const Masking& masking, const BatchArrays& out) {
  check_columns(rows);
  const std::size_t count = rows.numbers.size();
  if (count == 0) return {};
  const std::size_t block_size = stream_of(rows, 0).block_size();
  const std::size_t row_tokens = block_size + 1;
  const std::size_t row_targets = masked_count(masking.ratio, block_size);
  require(out.input_ids.size() == count * row_tokens,
          "input_ids must have rows x (block size + 1) places");
  require(out.languages.size() == count && out.second_languages.size() == count &&
              out.second_starts.size() == count,
          "languages, second_languages and second_starts must have rows places");
  require(out.masked_positions.size() == count * row_targets,
          "masked_positions must have rows x ceil(ratio x block size) places");
  require(out.targets.size() == count * row_targets,
          "targets must have rows x ceil(ratio x block size) places");

  Masker masker(masking, block_size);
  Filled filled;
  for (std::size_t row = 0; row < count; ++row) {
    const Stream& stream = stream_of(rows, row);
    require(stream.block_size() == block_size, "the streams differ in block size");
    if (row % kRowsAtOnce == 0) prefetch(rows, row, std::min(row + kRowsAtOnce, count));
    const auto ids = out.input_ids.subspan(row * row_tokens, row_tokens);
    ids.front() = kEos;
    const auto [length, second_start] =
        stream.fill(block_of(rows, row), masking.vocab_size, ids.subspan(1));
    std::fill(ids.begin() + 1 + static_cast<std::ptrdiff_t>(length), ids.end(), kPad);
    filled.has_padding = filled.has_padding || length < block_size;
    filled.has_pairs = filled.has_pairs || stream.is_pair();
    out.languages[row] = stream.language();
    out.second_languages[row] = stream.second_language();
    out.second_starts[row] =
        static_cast<std::int64_t>(stream.is_pair() ? second_start : row_tokens);

    const auto positions = out.masked_positions.subspan(row * row_targets, row_targets);
    const auto targets = out.targets.subspan(row * row_targets, row_targets);
    const std::size_t masked = masked_count(masking.ratio, length);
    masker.mask(stream.key(), static_cast<std::uint64_t>(rows.passes[row]), block_of(rows, row),
                ids.subspan(1, length), positions.first(masked), targets.first(masked));
    const auto row_start = static_cast<std::int64_t>(row * row_tokens);
    for (std::int64_t& position : positions.first(masked)) position += row_start + 1;
    std::ranges::fill(positions.subspan(masked), row_start);
    std::ranges::fill(targets.subspan(masked), kPad);
  }
  return filled;
}

std::uint64_t count_targets(const Rows& rows, double mask_ratio) {
  check_columns(rows);
  std::uint64_t targets = 0;
  for (std::size_t row = 0; row < rows.numbers.size(); ++row) {
    targets += masked_count(mask_ratio, stream_of(rows, row).row(block_of(rows, row)).length);
  }
  return targets;
}

}  // namespace xlm_ds
