#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace xlm_ds {

/// Words already split, and what became of each: some bytes. A word is found by comparing all its bytes. Bounded: what is
/// full is emptied, and what is frequent is back at once. One per thread.
class WordCache {
 public:
  static constexpr std::size_t kKeyWords = 4;              // of eight bytes
  static constexpr std::size_t kKeyBytes = 8 * kKeyWords;  // 1 % of the tests' Hindi words are longer, 0.01 % of the others
  static constexpr std::size_t kInlineBytes = 24;          // of a value that stands in its entry

  /// Long words are not seen twice, and would fill the cache.
  [[nodiscard]] static bool takes(std::string_view word) noexcept { return word.size() <= kLongestWord; }

  /// A word's length, its first kKeyBytes, zero-padded, and a hash of all its bytes.
  struct Key {
    std::array<std::uint64_t, kKeyWords> first;
    std::uint32_t length;
    std::uint32_t hash;
  };

  /// takes(word) is true; the bytes up to `readable_end` may be read.
  [[nodiscard]] static Key key_of(std::string_view word, const char* readable_end) noexcept;

  /// For a word that will be looked up soon: first the one, and a few words later the other.
  void prefetch_slot(const Key& key) const noexcept { __builtin_prefetch(&slots_[key.hash & (slots_.size() - 1)]); }
  void prefetch_entry(const Key& key) const noexcept {
    const Slot slot = slots_[key.hash & (slots_.size() - 1)];
    if (slot.number != kVacant) __builtin_prefetch(&entries_[slot.number]);
  }

  /// The value of `word`, whose key is `key`; make() is called for it if there is none. Valid until the next call;
  /// kInlineBytes are readable whatever its size.
  template <typename Make>
  [[nodiscard]] std::string_view find_or_make(std::string_view word, const Key& key, Make make) {
    std::size_t at = slot_of(word, key);
    if (slots_[at].number == kVacant) {
      const std::string_view value = make();
      if (full()) *this = WordCache();
      if (2 * (entries_.size() + 1) > slots_.size()) grow();
      at = slot_of(word, key);
      add(word, key, value);
      slots_[at] = {key.hash, static_cast<std::uint32_t>(entries_.size() - 1)};
    }
    return value_of(entries_[slots_[at].number]);
  }

 private:
  struct Slot {
    std::uint32_t hash = 0;
    std::uint32_t number = kVacant;
  };
  struct alignas(64) Entry {
    std::array<std::uint64_t, kKeyWords> first;
    std::uint32_t length;
    std::uint32_t value_bytes;
    std::array<char, kInlineBytes> value;  // or where in more_ the rest of the word begins, the value after it
  };
  static constexpr std::size_t kLongestWord = 256;
  static constexpr std::uint32_t kVacant = ~std::uint32_t{0};
  static constexpr std::size_t kMostWords = std::size_t{1} << 19;      // 32 MiB of entries, 8 MiB of slots
  static constexpr std::size_t kMostMoreBytes = std::size_t{1} << 24;  // of what is too long for an entry

  [[nodiscard]] bool full() const noexcept { return entries_.size() == kMostWords || more_.size() > kMostMoreBytes; }
  [[nodiscard]] static bool is_inline(const Entry& entry) noexcept {
    return entry.length <= kKeyBytes && entry.value_bytes <= kInlineBytes;
  }
  [[nodiscard]] const char* more_of(const Entry& entry) const noexcept {
    std::uint64_t begin;
    std::memcpy(&begin, entry.value.data(), sizeof(begin));
    return more_.data() + begin;
  }
  [[nodiscard]] static std::string_view rest_of(std::string_view word) noexcept {
    return word.substr(word.size() < kKeyBytes ? word.size() : kKeyBytes);
  }
  [[nodiscard]] bool holds(const Entry& entry, std::string_view word, const Key& key) const noexcept {
    std::uint64_t different = entry.length ^ key.length;
    for (std::size_t i = 0; i < key.first.size(); ++i) different |= entry.first[i] ^ key.first[i];
    if (different != 0) return false;
    const auto rest = rest_of(word);
    return rest.empty() || std::memcmp(more_of(entry), rest.data(), rest.size()) == 0;
  }
  [[nodiscard]] std::size_t slot_of(std::string_view word, const Key& key) const noexcept {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = key.hash & mask;
    while (slots_[at].number != kVacant &&
           (slots_[at].hash != key.hash || !holds(entries_[slots_[at].number], word, key))) {
      at = (at + 1) & mask;
    }
    return at;
  }
  [[nodiscard]] std::string_view value_of(const Entry& entry) const noexcept {
    if (is_inline(entry)) return {entry.value.data(), entry.value_bytes};
    const std::size_t rest_bytes = entry.length > kKeyBytes ? entry.length - kKeyBytes : 0;
    return {more_of(entry) + rest_bytes, entry.value_bytes};
  }
  void add(std::string_view word, const Key& key, std::string_view value);
  void grow();

  std::vector<Slot> slots_ = std::vector<Slot>(64);  // a power of two of them, at most half in use
  std::vector<Entry> entries_;
  std::vector<char> more_;
};

}  // namespace xlm_ds
