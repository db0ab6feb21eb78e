#include "xlm_ds/mask.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "xlm_ds/error.hpp"
#include "xlm_ds/random.hpp"
#include "xlm_ds/special_ids.hpp"

namespace xlm_ds {
namespace {

constexpr std::int64_t kUnchanged = 0;  // never drawn: it is the id of <s>
constexpr std::size_t kWordBits = 64;

constexpr std::int64_t all_bits_if(bool condition) noexcept {
  return -static_cast<std::int64_t>(condition);
}

/// What a masked position shows: of ten, eight times the mask, once a random word, once what was
/// there. No processor can guess which, so nothing branches on it: 403 instead of 339 million tokens
/// per CPU-second (interleaved runs of what benchmarks/loader.py does, from C++; 2-core AMD EPYC,
/// November 2026).
std::int64_t draw_shown(Digits& digits, std::uint64_t words) noexcept {
  const std::uint64_t tenth = digits.take(10);
  const std::int64_t word = kSpecials + static_cast<std::int64_t>(digits.take(words));
  return (kMask & all_bits_if(tenth < 8)) | (word & all_bits_if(tenth == 8));
}

/// How many words there are for random replacements.
std::uint64_t checked_words(std::int64_t vocab_size) {
  if (vocab_size <= kSpecials || vocab_size > std::numeric_limits<std::uint32_t>::max()) {
    throw InputError("a dictionary of " + std::to_string(vocab_size) +
                     " symbols cannot be used; it must have from " + std::to_string(kSpecials + 1) +
                     " to 4294967295, the 5 special ones included");
  }
  return static_cast<std::uint64_t>(vocab_size - kSpecials);
}

}  // namespace

std::size_t masked_count(double ratio, std::size_t tokens) {
  if (!(ratio >= 0 && ratio <= 1)) {
    throw InputError("a mask ratio of " + std::to_string(ratio) +
                     " is not a share; it must be from 0 to 1");
  }
  return static_cast<std::size_t>(std::ceil(ratio * static_cast<double>(tokens)));
}

Masker::Masker(const Masking& masking, std::size_t max_tokens)
    : key_(key_for(masking.seed, Purpose::masks)),
      words_(checked_words(masking.vocab_size)),
      word_goes_on_(masking.word_goes_on),
      identity_(max_tokens),
      permutation_(max_tokens),
      choices_(masked_count(masking.ratio, max_tokens)),
      is_masked_((max_tokens + kWordBits - 1) / kWordBits),
      word_starts_(masking.word_goes_on.empty() ? 0 : max_tokens + 1) {
  const std::size_t needed = (words_ + kSpecials + kWordBits - 1) / kWordBits;
  if (!word_goes_on_.empty() && word_goes_on_.size() < needed) {
    throw std::invalid_argument("word_goes_on has no bit for some of the ids");
  }
  std::iota(identity_.begin(), identity_.end(), std::uint32_t{0});
}

void Masker::mask(std::uint64_t language, std::uint64_t pass, std::uint64_t block,
                  std::span<std::int64_t> tokens, std::span<std::int64_t> positions,
                  std::span<std::int64_t> targets) {
  const std::uint64_t key = random_at(random_at(random_at(key_, language), pass), block);
  const std::size_t count = positions.size();
  // A bitmap sorts the positions without comparing them.
  std::fill(is_masked_.begin(), is_masked_.end(), std::uint64_t{0});
  if (word_goes_on_.empty()) {
    choose_positions(key, tokens.size(), count);
  } else {
    choose_words(key, tokens, count);
  }
  std::size_t next = 0;
  for (std::size_t word = 0; word < is_masked_.size(); ++word) {
    for (std::uint64_t bits = is_masked_[word]; bits != 0; bits &= bits - 1) {
      const auto bit = static_cast<std::size_t>(std::countr_zero(bits));
      const std::size_t position = word * kWordBits + bit;
      positions[next] = static_cast<std::int64_t>(position);
      targets[next++] = tokens[position];
    }
  }
  for (const auto [position, shown] : std::span(choices_).first(count)) {
    tokens[position] = shown | (tokens[position] & all_bits_if(shown == kUnchanged));
  }
}

void Masker::choose(std::size_t place, std::uint32_t position, std::int64_t shown) {
  choices_[place] = {position, shown};
  is_masked_[position / kWordBits] |= std::uint64_t{1} << position % kWordBits;
}

/// The first `count` steps of Fisher and Yates; one random number decides a position and what it
/// shows.
void Masker::choose_positions(std::uint64_t key, std::size_t tokens, std::size_t count) {
  std::copy_n(identity_.begin(), tokens, permutation_.begin());
  for (std::size_t i = 0; i < count; ++i) {
    Digits digits(random_at(key, i));
    const std::size_t j = i + digits.take(tokens - i);
    choose(i, std::exchange(permutation_[j], permutation_[i]), draw_shown(digits, words_));
  }
}

/// The same with words. The number that decides a word decides what its first token shows, so that
/// words of one token are masked as positions are; what its others show is decided by the numbers
/// from `tokens` on, which no word has.
void Masker::choose_words(std::uint64_t key, std::span<const std::int64_t> tokens,
                          std::size_t count) {
  const std::size_t words = find_words(tokens);
  std::copy_n(identity_.begin(), words, permutation_.begin());
  std::size_t chosen = 0;
  for (std::size_t i = 0; chosen < count; ++i) {
    Digits digits(random_at(key, i));
    const std::size_t j = i + digits.take(words - i);
    const std::uint32_t word = std::exchange(permutation_[j], permutation_[i]);
    std::uint32_t position = word_starts_[word];
    choose(chosen++, position, draw_shown(digits, words_));
    while (++position < word_starts_[word + 1] && chosen < count) {
      Digits own(random_at(key, tokens.size() + position));
      choose(chosen++, position, draw_shown(own, words_));
    }
  }
}

std::size_t Masker::find_words(std::span<const std::int64_t> tokens) {
  std::size_t words = 0;
  bool inside = false;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    word_starts_[words] = static_cast<std::uint32_t>(i);
    words += static_cast<std::size_t>(!inside || tokens[i] == kEos);
    inside = goes_on(tokens[i]);
  }
  word_starts_[words] = static_cast<std::uint32_t>(tokens.size());
  return words;
}

bool Masker::goes_on(std::int64_t token) const {
  const auto id = static_cast<std::size_t>(token);
  return (word_goes_on_[id / kWordBits] >> id % kWordBits & 1U) != 0;
}

}  // namespace xlm_ds
