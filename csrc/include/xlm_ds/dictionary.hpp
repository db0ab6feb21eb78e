#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "xlm_ds/words.hpp"

namespace xlm_ds {

/// Words to ids, by their bytes. Immutable: any number of threads may use one Dictionary.
class Dictionary {
 public:
  /// `symbols[id]`, the special ones included. Of two rows with the same symbol the later one
  /// counts (a row with fairseq's overwrite flag). Throws InputError if there are fewer than
  /// kSpecials, or more than fit 32 bits.
  explicit Dictionary(std::vector<std::string> symbols);

  [[nodiscard]] std::size_t size() const noexcept { return symbols_.size(); }

  /// ids[i] becomes the id of words[i]: kUnk if it is unknown, kEos if it is a line's end (the
  /// empty word). O(bytes). At least kReadableAfter bytes must be readable after every word; ids
  /// and words are of one size, at most kWordsPerBlock.
  void look_up(std::span<const std::string_view> words,
               std::span<std::uint32_t> ids) const noexcept;

 private:
  /// A word's length and its first 16 bytes, zero-padded. Only longer words need a look at their
  /// bytes: 0.6 % of the words of the tests' BPE'd text, 3 % of the Hindi ones.
  struct Key {
    std::uint64_t first;
    std::uint64_t second;
    std::uint64_t length;
    friend bool operator==(const Key&, const Key&) = default;
  };
  struct alignas(32) Slot {
    Key key{};
    std::uint32_t id = kVacant;
  };
  static constexpr std::uint32_t kVacant = std::numeric_limits<std::uint32_t>::max();

  [[nodiscard]] static Key key_of(std::string_view word) noexcept;
  [[nodiscard]] std::size_t home_of(const Key& key, std::string_view word) const noexcept;
  [[nodiscard]] std::size_t slot_of(const Key& key, std::string_view word,
                                    std::size_t home) const noexcept;
  void insert(std::string_view word, std::uint32_t id);

  std::vector<std::string> symbols_;
  std::vector<Slot> slots_;  // open addressing; a power of two of them, at most half in use
};

}  // namespace xlm_ds
