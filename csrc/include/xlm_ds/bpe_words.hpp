#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "xlm_ds/word_cache.hpp"

/// Text in fastBPE's words, which end at 0x20 and 0x0A only, turned into something else word by word.
namespace xlm_ds {

[[nodiscard]] inline bool is_separator(char c) noexcept { return c == ' ' || c == '\n'; }

/// The first separator at or after `at`, or the end. Eight bytes at a time: the lowest bit left is a separator's.
[[nodiscard]] inline const char* word_end(const char* at, const char* end) noexcept {
  constexpr std::uint64_t kOnes = 0x0101010101010101;
  constexpr std::uint64_t kHighBits = 0x8080808080808080;
  const auto zeros = [](std::uint64_t bytes) { return (bytes - kOnes) & ~bytes & kHighBits; };
  for (; end - at >= 8; at += 8) {
    std::uint64_t bytes;
    std::memcpy(&bytes, at, sizeof(bytes));
    const std::uint64_t found = zeros(bytes ^ kOnes * ' ') | zeros(bytes ^ kOnes * '\n');
    if (found != 0) return at + std::countr_zero(found) / 8;
  }
  while (at != end && !is_separator(*at)) ++at;
  return at;
}

/// The first byte of a word at or after `at`, or the end.
[[nodiscard]] inline const char* word_begin(const char* at, const char* end) noexcept {
  while (at != end && is_separator(*at)) ++at;
  return at;
}

/// A vector that grows by appending, without what it costs to append a few elements to a std::vector.
template <typename Element>
class WordOutput {
 public:
  void clear() noexcept { size_ = 0; }
  [[nodiscard]] std::span<Element> elements() noexcept { return {elements_.data(), size_}; }

  void append(Element element) {
    make_room(1);
    elements_[size_++] = element;
  }
  /// The bytes of any number of elements.
  void append(std::string_view bytes) {
    if (bytes.empty()) return;  // memcpy takes no null pointer, not even for nothing
    make_room(bytes.size() / sizeof(Element));
    std::memcpy(end(), bytes.data(), bytes.size());
    size_ += bytes.size() / sizeof(Element);
  }
  /// The same for a value of a WordCache, of which kInlineBytes are readable: a copy of known size takes a few instructions.
  void append_cached(std::string_view value) {
    if (value.size() > WordCache::kInlineBytes) return append(value);
    make_room(WordCache::kInlineBytes / sizeof(Element));
    std::memcpy(end(), value.data(), WordCache::kInlineBytes);
    size_ += value.size() / sizeof(Element);
  }
  /// Makes that many elements after the last one writable.
  void make_room(std::size_t count) {
    if (elements_.size() - size_ < count) elements_.resize(2 * elements_.size() + count);
  }

 private:
  [[nodiscard]] char* end() noexcept { return reinterpret_cast<char*>(elements_.data() + size_); }

  std::vector<Element> elements_;
  std::size_t size_ = 0;
};

/// Appends to `output` what make(word) returns for every word, from the cache if it is there, and calls
/// between(begin, end) for the bytes before, between and after the words.
template <typename Element, typename Make, typename Between>
void convert_words(std::string_view text, WordCache& cache, WordOutput<Element>& output, Make make, Between between) {
  struct Word {
    std::string_view bytes;
    WordCache::Key key;
  };
  std::array<Word, 64> words;
  const char* const end = text.data() + text.size();
  const char* done = text.data();
  for (const char* at = word_begin(done, end); at != end;) {
    // The cache is larger than the processor's: the misses of a block of words overlap.
    std::size_t count = 0;
    for (; count < words.size() && at != end; ++count) {
      Word& word = words[count];
      const char* const begin = at;
      at = word_end(at, end);
      word.bytes = {begin, at};
      if (WordCache::takes(word.bytes)) {
        word.key = WordCache::key_of(word.bytes, end);
        cache.prefetch_slot(word.key);
      }
      at = word_begin(at, end);
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (WordCache::takes(words[i].bytes)) cache.prefetch_entry(words[i].key);
    }
    for (std::size_t i = 0; i < count; ++i) {
      const auto bytes = words[i].bytes;
      between(done, bytes.data());
      done = bytes.data() + bytes.size();
      if (WordCache::takes(bytes)) {
        output.append_cached(cache.find_or_make(bytes, words[i].key, [&] { return make(bytes); }));
      } else {
        output.append(make(bytes));
      }
    }
  }
  between(done, end);
}

}  // namespace xlm_ds
