#include "xlm_ds/dictionary.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstring>
#include <utility>

#include "xlm_ds/error.hpp"
#include "xlm_ds/special_ids.hpp"

namespace xlm_ds {
namespace {

constexpr std::size_t kKeyBytes = 16;
constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio

static_assert(kReadableAfter >= kKeyBytes);
static_assert(std::endian::native == std::endian::little,
              "the first bytes of a word are the low ones of its key");

/// kFirstBytes[n] keeps the first n bytes of eight.
constexpr std::array<std::uint64_t, 9> kFirstBytes = [] {
  std::array<std::uint64_t, 9> masks{};
  for (std::size_t n = 0; n < 8; ++n) masks[n] = (std::uint64_t{1} << (8 * n)) - 1;
  masks[8] = ~std::uint64_t{0};
  return masks;
}();

std::uint64_t load_eight(const char* at) noexcept {
  std::uint64_t bytes;
  std::memcpy(&bytes, at, sizeof(bytes));
  return bytes;
}

std::uint64_t mix(std::uint64_t state) noexcept {
  state *= kOdd;
  return state ^ state >> 32;
}

std::string_view after_key(std::string_view word) noexcept {
  return word.substr(std::min(word.size(), kKeyBytes));
}

}  // namespace

Dictionary::Dictionary(std::vector<std::string> symbols)
    : symbols_(std::move(symbols)), slots_(std::bit_ceil(2 * symbols_.size() + 2)) {
  if (symbols_.size() < kSpecials || symbols_.size() >= kVacant) {
    throw InputError("a dictionary of " + std::to_string(symbols_.size()) +
                     " symbols; expected the " + std::to_string(kSpecials) +
                     " special ones at least, and ids of 32 bits");
  }
  for (std::size_t id = 0; id < symbols_.size(); ++id) {
    insert(symbols_[id], static_cast<std::uint32_t>(id));
  }
  // After the rows: one may have the empty word, which no text has.
  insert("", static_cast<std::uint32_t>(kEos));
}

void Dictionary::insert(std::string_view word, std::uint32_t id) {
  const std::string readable = std::string(word) + std::string(kReadableAfter, '\0');
  const Key key = key_of({readable.data(), word.size()});
  slots_[slot_of(key, word, home_of(key, word))] = {key, id};
}

Dictionary::Key Dictionary::key_of(std::string_view word) noexcept {
  const std::size_t in_first = std::min<std::size_t>(word.size(), 8);
  const std::size_t in_second = std::min(word.size(), kKeyBytes) - in_first;
  return {load_eight(word.data()) & kFirstBytes[in_first],
          load_eight(word.data() + 8) & kFirstBytes[in_second], word.size()};
}

std::size_t Dictionary::home_of(const Key& key, std::string_view word) const noexcept {
  std::uint64_t state = mix(mix(key.first ^ key.length) ^ key.second);
  for (std::string_view rest = after_key(word); !rest.empty();
       rest.remove_prefix(std::min<std::size_t>(rest.size(), 8))) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, rest.data(), std::min<std::size_t>(rest.size(), 8));
    state = mix(state ^ bytes);
  }
  return (state * kOdd >> 32) & (slots_.size() - 1);
}

std::size_t Dictionary::slot_of(const Key& key, std::string_view word,
                                std::size_t home) const noexcept {
  std::size_t at = home;
  while (slots_[at].id != kVacant) {
    const Slot& slot = slots_[at];
    if (slot.key == key && (word.size() <= kKeyBytes || symbols_[slot.id] == word)) break;
    at = (at + 1) & (slots_.size() - 1);
  }
  return at;
}

void Dictionary::look_up(std::span<const std::string_view> words,
                         std::span<std::uint32_t> ids) const noexcept {
  assert(words.size() == ids.size() && words.size() <= kWordsPerBlock);
  std::array<Key, kWordsPerBlock> keys;
  std::array<std::size_t, kWordsPerBlock> homes;
  // The table is larger than the second cache; fetching the slots of all words first lets their
  // misses overlap.
  for (std::size_t i = 0; i < words.size(); ++i) {
    keys[i] = key_of(words[i]);
    homes[i] = home_of(keys[i], words[i]);
    __builtin_prefetch(&slots_[homes[i]]);
  }
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::uint32_t id = slots_[slot_of(keys[i], words[i], homes[i])].id;
    ids[i] = id == kVacant ? static_cast<std::uint32_t>(kUnk) : id;
  }
}

}  // namespace xlm_ds
