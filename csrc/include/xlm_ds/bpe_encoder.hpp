#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "xlm_ds/bpe.hpp"
#include "xlm_ds/bpe_words.hpp"
#include "xlm_ds/dictionary.hpp"
#include "xlm_ds/special_ids.hpp"
#include "xlm_ds/word_cache.hpp"

namespace xlm_ds {

/// Tokenised text to the ids that Bpe::apply, then WordSplitter and Dictionary give, without the text between. One per
/// thread.
class BpeEncoder {
 public:
  /// Set in the code of a line's end, whose id is kEos, and of a word that is not in the dictionary, whose id is kUnk;
  /// not in that of a word spelt `</s>` or `<unk>`. No id has it: a Dictionary has at most 2^30.
  static constexpr std::uint32_t kFlag = std::uint32_t{1} << 31;
  static constexpr std::uint32_t kLineEnd = std::uint32_t{kEos} | kFlag;
  static constexpr std::uint32_t kUnknown = std::uint32_t{kUnk} | kFlag;

  /// Both must outlive the encoder.
  BpeEncoder(const Bpe& bpe, const Dictionary& dictionary) : bpe_(&bpe), dictionary_(&dictionary) {}

  /// The codes of the text's words and line ends: ids, and what kFlag is for. The caller may change them; they are valid
  /// until the next call. `text` is valid UTF-8, cut after 0x20 or 0x0A only (WordSplitter's line ends may differ
  /// elsewhere: at CR, LF). Throws InputError if the codes split one of its characters.
  [[nodiscard]] std::span<std::uint32_t> encode(std::string_view text);

 private:
  [[nodiscard]] std::string_view make(std::string_view word);

  const Bpe* bpe_;
  const Dictionary* dictionary_;
  Bpe::Scratch scratch_;
  WordCache cache_;
  std::string pieces_;
  WordOutput<std::uint32_t> word_codes_;
  WordOutput<std::uint32_t> text_codes_;
};

}  // namespace xlm_ds
