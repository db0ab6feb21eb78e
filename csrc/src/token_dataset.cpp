#include "xlm_ds/token_dataset.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "xlm_ds/error.hpp"

namespace xlm_ds {
namespace {

constexpr std::size_t kTokensPerStep = 4096;  // counting: the ids of one step stay in the cache

constexpr std::size_t kCacheLineBytes = 64;

std::filesystem::path with_suffix(const std::filesystem::path& prefix, const char* suffix) {
  return std::filesystem::path(prefix) += suffix;  // replace_extension would take ".ar" for one
}

/// Widens stored values to ids and returns the greatest as unsigned, so that a negative one is too
/// great as well.
template <typename Stored>
std::uint64_t widen(const std::byte* source, std::int64_t id_bias,
                    std::span<std::int64_t> ids) noexcept {
  // The bounds are those of the stored values, which are narrower than ids, so that more fit a
  // register: 395 instead of 352 million tokens per CPU-second (interleaved runs of what
  // benchmarks/batches.py does, from C++; 2-core AMD EPYC, November 2026).
  Stored least = std::numeric_limits<Stored>::max();
  Stored greatest = std::numeric_limits<Stored>::min();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Stored stored;
    std::memcpy(&stored, source + i * sizeof(Stored), sizeof(Stored));
    ids[i] = static_cast<std::int64_t>(stored) - id_bias;
    least = std::min(least, stored);
    greatest = std::max(greatest, stored);
  }
  const auto unsigned_id = [id_bias](Stored stored) {
    return static_cast<std::uint64_t>(static_cast<std::int64_t>(stored) - id_bias);
  };
  return std::max(unsigned_id(least), unsigned_id(greatest));
}

std::uint64_t widen(Dtype dtype, const std::byte* source, std::int64_t id_bias,
                    std::span<std::int64_t> ids) {
  switch (dtype) {
    case Dtype::uint8: return widen<std::uint8_t>(source, id_bias, ids);
    case Dtype::int8: return widen<std::int8_t>(source, id_bias, ids);
    case Dtype::int16: return widen<std::int16_t>(source, id_bias, ids);
    case Dtype::int32: return widen<std::int32_t>(source, id_bias, ids);
    case Dtype::int64: return widen<std::int64_t>(source, id_bias, ids);
    case Dtype::uint16: return widen<std::uint16_t>(source, id_bias, ids);
    case Dtype::uint32: return widen<std::uint32_t>(source, id_bias, ids);
    case Dtype::uint64: return widen<std::uint64_t>(source, id_bias, ids);
  }
  throw std::logic_error("a dtype that read_index does not return");
}

}  // namespace

TokenDataset::TokenDataset(const std::filesystem::path& prefix, BreakMode mode,
                           std::uint64_t block_size)
    : prefix_(prefix),
      mode_(mode),
      block_size_(block_size),
      index_file_(with_suffix(prefix, ".idx")),
      data_file_(with_suffix(prefix, ".bin")),
      index_(read_index(index_file_.bytes(), data_file_.bytes().size(),
                        with_suffix(prefix, ".idx"))) {
  if (block_size == 0) throw std::invalid_argument("a block must have room for a token");
}

std::uint64_t TokenDataset::blocks() const noexcept {
  if (mode_ == BreakMode::eos) return index_.sequences;
  return index_.tokens / block_size_ + (index_.tokens % block_size_ != 0 ? 1 : 0);
}

TokenDataset::Range TokenDataset::range_of(std::uint64_t block) const {
  if (block >= blocks()) {
    throw std::out_of_range(prefix_.string() + " has " + std::to_string(blocks()) +
                            " blocks; there is no block " + std::to_string(block));
  }
  if (mode_ == BreakMode::none) {
    const std::uint64_t first = block * block_size_;
    return {first, std::min<std::size_t>(block_size_, index_.tokens - first)};
  }
  const std::uint64_t first = sequence_start(index_, index_file_.bytes(), block);
  const std::uint64_t length = sequence_length(index_, index_file_.bytes(), block);
  if (length > index_.tokens || first > index_.tokens - length) {
    throw InputError(with_suffix(prefix_, ".idx").string() + ": sequence " + std::to_string(block) +
                     " lies outside the .bin; the file is damaged, binarize again");
  }
  return {first, std::min<std::size_t>(block_size_, length)};
}

std::size_t TokenDataset::block_length(std::uint64_t block) const { return range_of(block).length; }

void TokenDataset::prefetch_block(std::uint64_t block) const {
  const auto [first, length] = range_of(block);
  const std::size_t element = element_bytes(index_.dtype);
  const std::byte* const source = data_file_.bytes().data() + first * element;
  for (std::size_t offset = 0; offset < length * element; offset += kCacheLineBytes) {
    __builtin_prefetch(source + offset);
  }
}

std::size_t TokenDataset::fill_block(std::uint64_t block, std::int64_t vocab_size,
                                     std::span<std::int64_t> out) const {
  if (out.size() < block_size_) throw std::invalid_argument("there must be room for a whole block");
  const auto [first, length] = range_of(block);
  fill_ids(first, vocab_size, out.first(length));
  return length;
}

void TokenDataset::fill_ids(std::uint64_t first, std::int64_t vocab_size,
                            std::span<std::int64_t> out) const {
  const std::byte* const source = data_file_.bytes().data() + first * element_bytes(index_.dtype);
  const std::uint64_t greatest = widen(index_.dtype, source, index_.id_bias(), out);
  if (!out.empty() && greatest >= static_cast<std::uint64_t>(vocab_size)) {
    throw InputError(with_suffix(prefix_, ".bin").string() + ": has the id " +
                     std::to_string(static_cast<std::int64_t>(greatest)) +
                     ", but the dictionary ends at " + std::to_string(vocab_size - 1) +
                     "; it was made with another dictionary, or is damaged: binarize again");
  }
}

std::uint64_t TokenDataset::count_cut() const {
  std::uint64_t cut = 0;
  if (mode_ == BreakMode::none) return cut;
  for (std::uint64_t i = 0; i < index_.sequences; ++i) {
    if (sequence_length(index_, index_file_.bytes(), i) > block_size_) ++cut;
  }
  return cut;
}

std::vector<std::uint64_t> TokenDataset::count_ids(std::int64_t vocab_size) const {
  if (vocab_size < 0) throw std::invalid_argument("a dictionary's size cannot be negative");
  std::vector<std::uint64_t> counts(static_cast<std::size_t>(vocab_size));
  std::array<std::int64_t, kTokensPerStep> ids;
  for (std::uint64_t first = 0; first < index_.tokens; first += ids.size()) {
    const auto count = std::min<std::size_t>(ids.size(), index_.tokens - first);
    const auto step = std::span(ids).first(count);
    fill_ids(first, vocab_size, step);
    for (const std::int64_t id : step) ++counts[static_cast<std::size_t>(id)];
  }
  return counts;
}

}  // namespace xlm_ds
