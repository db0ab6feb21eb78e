#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "xlm_ds/index_format.hpp"
#include "xlm_ds/mapped_file.hpp"

namespace xlm_ds {

/// none: blocks run across sequences. eos: one sequence per block. complete: as many whole sequences
/// as fit. complete_doc: the same, but a sequence of one token (an empty line) ends a document: it is
/// in no block, and no block goes on after it. A sequence longer than a block stands alone, cut at
/// the block's size.
enum class BreakMode { none, eos, complete, complete_doc };

/// A .bin/.idx pair, mapped and seen as blocks of at most block_size tokens: fairseq's
/// TokenBlockDataset, except that no block is longer. Every block is found in O(1): in modes none and
/// eos without a table, and opening reads only the header, the first and the last sequence; in the two
/// others opening checks and walks over all sequences, and keeps 8 bytes a block.
class TokenDataset {
 public:
  /// Opens `prefix`.bin and `prefix`.idx. Throws std::system_error if one cannot be opened,
  /// InputError if they are not a pair of binarized text, or too large for the table of the modes
  /// complete and complete_doc; std::invalid_argument if block_size is 0.
  TokenDataset(const std::filesystem::path& prefix, BreakMode mode, std::uint64_t block_size);

  [[nodiscard]] std::uint64_t sequences() const noexcept { return index_.sequences; }
  [[nodiscard]] std::uint64_t tokens() const noexcept { return index_.tokens; }
  [[nodiscard]] std::uint64_t blocks() const noexcept;
  [[nodiscard]] std::size_t block_size() const noexcept { return block_size_; }

  /// Tokens of a block, at most block_size. Throws std::out_of_range beyond the last block;
  /// InputError if, in mode eos, the .idx places the sequence outside the .bin.
  [[nodiscard]] std::size_t block_length(std::uint64_t block) const;

  /// Asks the processor to fetch a block that will be filled soon. Throws as block_length.
  void prefetch_block(std::uint64_t block) const;

  /// Writes a block's ids to the front of `out`, which must hold block_size, and returns how many.
  /// Throws as block_length; InputError if an id is not below vocab_size.
  std::size_t fill_block(std::uint64_t block, std::int64_t vocab_size,
                         std::span<std::int64_t> out) const;

  /// Fills `out` with the first ids of a block, which must have as many. Throws as fill_block.
  void fill_start(std::uint64_t block, std::int64_t vocab_size, std::span<std::int64_t> out) const;

  /// What the table of the modes complete and complete_doc takes; else 0.
  [[nodiscard]] std::size_t table_bytes() const noexcept { return 8 * table_.size(); }

  /// Sequences that lose tokens because they are longer than a block (0 in mode none). O(sequences).
  [[nodiscard]] std::uint64_t count_cut() const;

 private:
  struct Range {
    std::uint64_t first;
    std::size_t length;
  };
  [[nodiscard]] Range range_of(std::uint64_t block) const;
  void fill_ids(std::uint64_t first, std::int64_t vocab_size, std::span<std::int64_t> out) const;

  std::filesystem::path prefix_;
  BreakMode mode_;
  std::size_t block_size_;
  MappedFile index_file_;
  MappedFile data_file_;
  Index index_;
  std::vector<std::uint64_t> table_;  // first token and length of each block, in one number
};

}  // namespace xlm_ds
