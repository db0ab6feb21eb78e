#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

/// Masking of a block for the masked language model: BERT's 80/10/10 on an exact number of
/// positions.
namespace xlm_ds {

/// How blocks are masked: `ratio` of the positions, from 0 to 1; random words come from
/// [kSpecials, vocab_size). Where there is `word_goes_on`, a bit per id (that of id i is bit i % 64
/// of number i / 64), positions are drawn by whole words: a token whose bit is set is of one word
/// with the next, unless that is eos.
struct Masking {
  std::uint64_t seed = 0;
  double ratio = 0.15;
  std::int64_t vocab_size = 0;
  std::span<const std::uint64_t> word_goes_on = {};
};

/// Masked positions of a block: ceil(ratio·tokens), in double as fairseq computes it (39 of 255 at
/// 0.15). Throws InputError if the ratio is not from 0 to 1.
[[nodiscard]] std::size_t masked_count(double ratio, std::size_t tokens);

/// Masks blocks; keeps working memory between them.
class Masker {
 public:
  /// For blocks of at most max_tokens. Throws InputError if the ratio or the vocabulary cannot be
  /// used, std::invalid_argument if word_goes_on is for fewer ids; that must outlive the Masker.
  Masker(const Masking& masking, std::size_t max_tokens);

  /// Masks `tokens` in place and fills `positions` (ascending) and `targets` (the tokens that were
  /// there). Their length is masked_count of the block's. Decided by (seed, language, pass, block)
  /// and the length; any position may be masked, an eos too, and a random word may equal the one it
  /// replaces, as in fairseq. By whole words, the last word taken is cut to what is left. Tokens
  /// must be below vocab_size. O(tokens).
  void mask(std::uint64_t language, std::uint64_t pass, std::uint64_t block,
            std::span<std::int64_t> tokens, std::span<std::int64_t> positions,
            std::span<std::int64_t> targets);

 private:
  struct Choice {
    std::uint32_t position;
    std::int64_t shown;
  };

  void choose(std::size_t place, std::uint32_t position, std::int64_t shown);
  void choose_positions(std::uint64_t key, std::size_t tokens, std::size_t count);
  void choose_words(std::uint64_t key, std::span<const std::int64_t> tokens, std::size_t count);
  std::size_t find_words(std::span<const std::int64_t> tokens);
  [[nodiscard]] bool goes_on(std::int64_t token) const;

  std::uint64_t key_;
  std::uint64_t words_;
  std::span<const std::uint64_t> word_goes_on_;
  std::vector<std::uint32_t> identity_;
  std::vector<std::uint32_t> permutation_;
  std::vector<Choice> choices_;
  std::vector<std::uint64_t> is_masked_;   // one bit per position
  std::vector<std::uint32_t> word_starts_;  // of a block's words, and its end
};

}  // namespace xlm_ds
