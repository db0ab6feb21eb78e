#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "xlm_ds/byte_table.hpp"

/// Byte pair encoding as fastBPE does it, with its files (docs/formats.md). Words end at 0x20 and 0x0A only, everything else
/// is part of a word; a character is one byte and the continuation bytes (0x80-0xBF) that follow it, valid UTF-8 or not.
namespace xlm_ds {

/// The merges of a codes file, and the vocabulary that limits them if there is one. Immutable: any number of threads may
/// use one Bpe.
class Bpe {
 public:
  /// `codes_path`: lines `left right count`, best merge first, the last symbol of a word ending in `</w>`; the count is not
  /// used. `vocabulary_path`: lines `word count`, as count_words writes them; merges are undone until every piece is in it
  /// (or is a character). Throws InputError for a malformed or repeated line, std::system_error if a file cannot be read.
  explicit Bpe(const std::filesystem::path& codes_path,
               const std::optional<std::filesystem::path>& vocabulary_path = std::nullopt);

  /// `text` with every word split into pieces, all but the last ending in `@@`; blanks and line ends are copied unchanged.
  /// O(bytes) and a factor log(n) for words of n > 64 characters.
  [[nodiscard]] std::string apply(std::string_view text) const;

  /// apply() on a whole file, which is mapped; the bytes written do not depend on `threads` (at least 1). Writes in place:
  /// callers that must not leave half a file give a temporary name. Throws std::system_error if a file cannot be read or
  /// written, InputError if both are the same file.
  void apply_file(const std::filesystem::path& input_path, const std::filesystem::path& output_path,
                  std::size_t threads) const;

  /// Memory that splitting one word after another uses again.
  class Scratch;

  /// Appends to `pieces` what apply() makes of one word: not empty, without 0x20 and 0x0A.
  void split(std::string_view word, Scratch& scratch, std::string& pieces) const;

 private:
  using SymbolId = ByteTable::Number;
  using Rank = std::uint32_t;
  static constexpr SymbolId kNoSymbol = ByteTable::kNone;  // a character that no merge knows
  static constexpr Rank kNoRank = std::numeric_limits<Rank>::max();

  struct Merge {
    SymbolId left, right, merged;
  };
  struct Symbol {
    std::uint32_t bytes = 0;      // with the `</w>`
    Rank made_by = kNoRank;       // kNoRank: a character
    bool ends_word = false;       // is more than, and ends in, `</w>`
    bool allowed_inside = false;  // the vocabulary has it as `symbol@@`
    bool allowed_last = false;    // the vocabulary has it, without its `</w>`
  };
  struct CharacterSymbols {
    SymbolId inside = kNoSymbol;
    SymbolId last = kNoSymbol;
  };
  /// A part of the word being split; `rank` is that of its merge with the part to its right.
  struct Piece {
    std::size_t begin;
    SymbolId symbol;
    Rank rank;
  };
  using Pieces = std::span<Piece>;
  /// Numbers to numbers, by open addressing.
  class NumberTable {
   public:
    static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
    /// The value of `key`, or kNone.
    [[nodiscard]] std::uint32_t find(std::uint64_t key) const noexcept { return slots_[slot_of(key)].value; }
    /// The value of `key` after the call: `value` (which is not kNone), or an older one.
    std::uint32_t insert(std::uint64_t key, std::uint32_t value);

   private:
    struct Slot {
      std::uint64_t key = 0;
      std::uint32_t value = kNone;
    };
    [[nodiscard]] std::size_t slot_of(std::uint64_t key) const noexcept {
      constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
      const std::size_t mask = slots_.size() - 1;
      std::size_t at = (key * kOdd >> 32) & mask;
      // One condition: whether a pair can be merged cannot be predicted, that the first slot tells it can.
      while (static_cast<int>(slots_[at].value == kNone) + static_cast<int>(slots_[at].key == key) == 0) {
        at = (at + 1) & mask;
      }
      return at;
    }
    void grow();
    // A power of two of them, at most half in use: it is the processor's cache that misses.
    std::vector<Slot> slots_ = std::vector<Slot>(64);
    std::size_t used_ = 0;
  };

  void read_codes(const std::filesystem::path& path);
  void read_vocabulary(const std::filesystem::path& path);
  void add_merge(std::string_view left, std::string_view right, const std::filesystem::path& path);
  [[nodiscard]] SymbolId add_symbol(std::string_view bytes);

  [[nodiscard]] Rank rank_of(SymbolId left, SymbolId right) const noexcept {
    return ranks_.find(std::uint64_t{left} << 32 | right);
  }
  [[nodiscard]] CharacterSymbols symbols_of(std::string_view character) const;
  [[nodiscard]] Pieces characters_of(std::string_view word, Scratch& scratch) const;
  [[nodiscard]] Pieces merge_short(Pieces pieces) const;
  [[nodiscard]] Pieces merge_long(Pieces pieces) const;
  [[nodiscard]] Pieces merge_everywhere(Pieces pieces, Rank rank) const;
  [[nodiscard]] Pieces within_vocabulary(Pieces pieces, Scratch& scratch) const;
  [[nodiscard]] bool may_stand(SymbolId symbol, bool last) const;

  ByteTable symbol_bytes_;
  std::vector<Symbol> symbols_;  // by SymbolId
  std::vector<Merge> merges_;    // by Rank
  NumberTable ranks_;            // (left << 32 | right) -> Rank
  NumberTable characters_;       // packed bytes of a character -> number in character_symbols_
  std::vector<CharacterSymbols> character_symbols_;
  bool has_vocabulary_ = false;
};

class Bpe::Scratch {
  friend Bpe;
  std::vector<Piece> pieces_;
  std::vector<Piece> kept_;
  std::vector<Piece> open_;
};

/// Counts the words of the files together and writes lines `word count`, most frequent first, equal counts in the order of
/// their bytes (fastBPE's getvocab). Returns the number of distinct words, all of which are held in memory.
/// Throws std::system_error if a file cannot be read or written.
std::size_t count_words(const std::vector<std::filesystem::path>& paths, const std::filesystem::path& output_path,
                        std::size_t threads);

}  // namespace xlm_ds
