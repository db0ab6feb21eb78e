#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace xlm_ds {

/// Words are looked up in blocks of at most this many: their views, keys and ids stay in the first
/// cache.
inline constexpr std::size_t kWordsPerBlock = 256;

/// Bytes that must be readable after a text whose words are looked up, so that short words are
/// loaded without a branch.
inline constexpr std::size_t kReadableAfter = 24;

/// Words to ids, by their bytes. Immutable: any number of threads may use one Dictionary.
class Dictionary {
 public:
  /// `symbols[id]`, the special ones included. Of two rows with the same symbol the later one
  /// counts (a row with fairseq's overwrite flag). Throws InputError if there are fewer than
  /// kSpecials, more than 2^30, or one is not UTF-8.
  explicit Dictionary(std::vector<std::string> symbols);

  [[nodiscard]] std::size_t size() const noexcept { return symbols_.size(); }

  /// ids[i] becomes the id of words[i]: kUnk if it is unknown, kEos if it is a line's end (the
  /// empty word). `unknown` is filled from the front with the places of the words that are in no
  /// row (`<unk>` is in one); returns how many. O(bytes). At least kReadableAfter bytes must be
  /// readable after every word; the three are of one size, at most kWordsPerBlock.
  [[nodiscard]] std::size_t look_up(std::span<const std::string_view> words,
                                    std::span<std::uint32_t> ids,
                                    std::span<std::uint32_t> unknown) const noexcept;

 private:
  static constexpr std::size_t kKeyWords = 3;
  static constexpr std::size_t kKeyBytes = kKeyWords * sizeof(std::uint64_t);
  static constexpr std::uint32_t kVacant = std::numeric_limits<std::uint32_t>::max();

  /// Half a cache line: a word's length and its first 24 bytes, zero-padded, and its id. Only longer
  /// words need a look at their bytes: 0.1 % of the words of BPE'd text.
  struct alignas(32) Entry {
    std::array<std::uint64_t, kKeyWords> first;
    std::uint32_t length;
    std::uint32_t id;

    [[nodiscard]] bool same_key(const Entry& other) const noexcept {
      // One branch for all of it: that a word is known is well predicted.
      return ((first[0] ^ other.first[0]) | (first[1] ^ other.first[1]) |
              (first[2] ^ other.first[2]) | (length ^ other.length)) == 0;
    }
  };

  /// Sets the key of `entry`, in place, as a copy would wait for the store; returns the slot that is
  /// looked at first.
  std::uint32_t set_key(Entry& entry, std::string_view word) const noexcept;
  [[nodiscard]] std::size_t slot_of(const Entry& key, std::string_view word,
                                    std::size_t home) const noexcept;
  void insert(std::string_view word, std::uint32_t id);

  std::vector<std::string> symbols_;
  std::vector<Entry> slots_;  // open addressing; a power of two of them, at most half in use
};

}  // namespace xlm_ds
