#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "xlm_ds/token_dataset.hpp"

namespace xlm_ds {

/// What samples are drawn from: the blocks of a language, or pairs of lines that translate each other
/// (TLM: Conneau and Lample, 2019, section 3.3). A row is an eos and a block; of a pair, an eos, the
/// first line, an eos, the second line. Lines are stored with the eos that ends them.
///
/// Does not own the datasets, which must outlive it.
class Stream {
 public:
  /// Where the second half of a row begins if it has none.
  static constexpr std::size_t kNoSecond = 0;

  struct Row {
    std::size_t length;        // tokens after the row's first eos
    std::size_t second_start;  // place in the row of the eos that begins the second half, or kNoSecond
  };

  Stream(const TokenDataset& blocks, std::int64_t language);

  /// Both in break mode eos: pair i are blocks i. Throws std::invalid_argument if they differ in
  /// blocks or block_size, or a row has no room for a word and two eos in each half.
  Stream(const TokenDataset& first, std::int64_t language, const TokenDataset& second,
         std::int64_t second_language);

  [[nodiscard]] bool is_pair() const noexcept { return second_ != nullptr; }
  [[nodiscard]] std::int64_t language() const noexcept { return language_; }
  /// Of a language alone -1.
  [[nodiscard]] std::int64_t second_language() const noexcept { return second_language_; }
  [[nodiscard]] std::uint64_t blocks() const noexcept { return first_->blocks(); }
  /// Tokens of the longest row, without its first eos.
  [[nodiscard]] std::size_t block_size() const noexcept { return first_->block_size(); }

  /// What masks are keyed with: the language, or a number that no other pair and no language has. So
  /// they do not depend on what else a run reads.
  [[nodiscard]] std::uint64_t key() const noexcept {
    return static_cast<std::uint64_t>(language_) |
           static_cast<std::uint64_t>(second_language_ + 1) << 32U;
  }

  /// O(1), reads no tokens. Throws as TokenDataset::block_length.
  [[nodiscard]] Row row(std::uint64_t block) const {
    return is_pair() ? row_of_pair(block) : Row{first_->block_length(block), kNoSecond};
  }

  void prefetch(std::uint64_t block) const {
    first_->prefetch_block(block);
    if (is_pair()) second_->prefetch_block(block);
  }

  /// Writes the row without its first eos to the front of `out`, which must hold block_size.
  /// Throws as TokenDataset::fill_block.
  Row fill(std::uint64_t block, std::int64_t vocab_size, std::span<std::int64_t> out) const {
    if (is_pair()) return fill_pair(block, vocab_size, out);
    return {first_->fill_block(block, vocab_size, out), kNoSecond};
  }

  /// Lines, or pairs of lines, that lose tokens because they are too long. O(lines).
  [[nodiscard]] std::uint64_t count_cut() const;

 private:
  struct Halves {
    std::size_t first;
    std::size_t second;
  };
  /// Tokens that are kept of two lines: all if they fit; else half of the room each, and what one
  /// does not need of its half goes to the other.
  [[nodiscard]] Halves halves_of(std::uint64_t block) const;
  [[nodiscard]] Row row_of_pair(std::uint64_t pair) const;
  Row fill_pair(std::uint64_t pair, std::int64_t vocab_size, std::span<std::int64_t> out) const;

  const TokenDataset* first_;
  const TokenDataset* second_ = nullptr;
  std::int64_t language_;
  std::int64_t second_language_ = -1;
};

}  // namespace xlm_ds
