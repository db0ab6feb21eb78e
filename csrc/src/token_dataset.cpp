#include "xlm_ds/token_dataset.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "xlm_ds/error.hpp"
#include "xlm_ds/stored_ids.hpp"

namespace xlm_ds {
namespace {

constexpr std::size_t kCacheLineBytes = 64;

// The table has the first token of a block in the upper bits and its length in the lower: 8 bytes
// instead of 12 reach 1.7 10^13 tokens, of which the table itself would take hundreds of GB.
constexpr unsigned kLengthBits = 20;
constexpr std::uint64_t kMaxTableLength = (std::uint64_t{1} << kLengthBits) - 1;
constexpr std::uint64_t kMaxTableTokens = std::uint64_t{1} << (64 - kLengthBits);

/// Calls take(first token, tokens) for every block of fairseq's modes complete and complete_doc, of
/// which some are longer than block_size. complete_doc leaves out blocks of one token.
template <typename Take>
void for_each_block(const Index& index, std::span<const std::byte> index_bytes, BreakMode mode,
                    std::uint64_t block_size, Take take) {
  const bool documents = mode == BreakMode::complete_doc;
  const std::uint64_t shortest = documents ? 2 : 1;
  std::uint64_t first = 0, tokens = 0;
  const auto end_block = [&] {
    if (tokens >= shortest) take(first, tokens);
    first += tokens;
    tokens = 0;
  };
  for (std::uint64_t i = 0; i < index.sequences; ++i) {
    const std::uint64_t length = sequence_length(index, index_bytes, i);
    const bool separator = documents && length == 1;
    if (separator || (tokens != 0 && tokens + length > block_size)) end_block();
    if (separator) {
      first += length;
    } else {
      tokens += length;
    }
  }
  end_block();
}

/// Where each block is: two walks over the lengths, the first only to allocate what is needed.
std::vector<std::uint64_t> build_table(const Index& index, std::span<const std::byte> index_bytes,
                                       const std::filesystem::path& index_path, BreakMode mode,
                                       std::uint64_t block_size) {
  if (block_size > kMaxTableLength) {
    throw InputError("blocks of " + std::to_string(block_size) +
                     " tokens are too long for break modes complete and complete_doc, which take " +
                     std::to_string(kMaxTableLength) + "; use shorter ones");
  }
  if (index.tokens > kMaxTableTokens) {
    throw InputError(index_path.string() + ": has " + std::to_string(index.tokens) +
                     " tokens, too many for break modes complete and complete_doc, which take " +
                     std::to_string(kMaxTableTokens) + "; use none or eos, which need no table");
  }
  verify_index(index, index_bytes, index_path);
  std::size_t blocks = 0;
  for_each_block(index, index_bytes, mode, block_size,
                 [&](std::uint64_t, std::uint64_t) { ++blocks; });
  std::vector<std::uint64_t> table;
  table.reserve(blocks);
  for_each_block(index, index_bytes, mode, block_size,
                 [&](std::uint64_t first, std::uint64_t tokens) {
                   table.push_back(first << kLengthBits | std::min(tokens, block_size));
                 });
  return table;
}

}  // namespace

TokenDataset::TokenDataset(const std::filesystem::path& prefix, BreakMode mode,
                           std::uint64_t block_size)
    : prefix_(prefix),
      mode_(mode),
      block_size_(block_size),
      index_file_(index_path_of(prefix)),
      data_file_(data_path_of(prefix)),
      index_(read_index(index_file_.bytes(), data_file_.bytes().size(),
                        index_path_of(prefix))) {
  if (block_size == 0) throw std::invalid_argument("a block must have room for a token");
  data_file_.expect_random_reads();
  if (mode == BreakMode::complete || mode == BreakMode::complete_doc) {
    table_ = build_table(index_, index_file_.bytes(), index_path_of(prefix), mode, block_size);
  }
}

std::uint64_t TokenDataset::blocks() const noexcept {
  switch (mode_) {
    case BreakMode::none:
      return index_.tokens / block_size_ + (index_.tokens % block_size_ != 0 ? 1 : 0);
    case BreakMode::eos: return index_.sequences;
    case BreakMode::complete:
    case BreakMode::complete_doc: break;
  }
  return table_.size();
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
  if (mode_ != BreakMode::eos) {
    return {table_[block] >> kLengthBits, table_[block] & kMaxTableLength};
  }
  const std::uint64_t first = sequence_start(index_, index_file_.bytes(), block);
  const std::uint64_t length = sequence_length(index_, index_file_.bytes(), block);
  if (length > index_.tokens || first > index_.tokens - length) {
    throw InputError(index_path_of(prefix_).string() + ": sequence " + std::to_string(block) +
                     " lies outside the .bin; the file is damaged, delete it and binarize again");
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

void TokenDataset::fill_start(std::uint64_t block, std::int64_t vocab_size,
                              std::span<std::int64_t> out) const {
  const auto [first, length] = range_of(block);
  if (out.size() > length) throw std::invalid_argument("the block has fewer tokens");
  fill_ids(first, vocab_size, out);
}

void TokenDataset::fill_ids(std::uint64_t first, std::int64_t vocab_size,
                            std::span<std::int64_t> out) const {
  const std::byte* const source = data_file_.bytes().data() + first * element_bytes(index_.dtype);
  const std::uint64_t greatest = widen_ids(index_.dtype, source, index_.id_bias(), out);
  if (!out.empty() && greatest >= static_cast<std::uint64_t>(std::max<std::int64_t>(vocab_size, 0))) {
    throw InputError(data_path_of(prefix_).string() + ": has the id " +
                     std::to_string(static_cast<std::int64_t>(greatest)) +
                     ", but the dictionary ends at " + std::to_string(vocab_size - 1) +
                     "; it was made with another dictionary, or is damaged: delete it and binarize again");
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

}  // namespace xlm_ds
