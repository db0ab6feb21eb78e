#include "xlm_ds/bpe_encoder.hpp"

#include <array>
#include <cstddef>

#include "xlm_ds/error.hpp"
#include "xlm_ds/words.hpp"

namespace xlm_ds {

std::span<std::uint32_t> BpeEncoder::encode(std::string_view text) {
  text_codes_.clear();
  const auto make_codes = [this](std::string_view word) { return make(word); };
  const auto add_line_ends = [this, &text](const char* begin, const char* end) {
    for (const char* at = begin; at != end; ++at) {
      // A word that ends in CR has given the line end of CR, LF.
      const bool given = at != text.data() && at[-1] == '\r';
      if (*at == '\n' && !given) text_codes_.append(kLineEnd);
    }
  };
  convert_words(text, cache_, text_codes_, make_codes, add_line_ends);
  return text_codes_.elements();
}

/// The codes of one word, as bytes that are valid until the next call.
std::string_view BpeEncoder::make(std::string_view word) {
  pieces_.clear();
  bpe_->split(word, scratch_, pieces_);
  const std::size_t size = pieces_.size();
  pieces_.append(kReadableAfter, '\0');
  const auto text = std::string_view(pieces_).substr(0, size);
  if (first_invalid_utf8(text) != size) {
    throw InputError("the codes split a character of the word `" + std::string(word) +
                     "`, which is not UTF-8 then; use codes that were learnt from UTF-8 text");
  }
  word_codes_.clear();
  std::array<std::string_view, 16> words;
  std::array<std::uint32_t, words.size()> ids;
  std::array<std::uint32_t, words.size()> unknown;
  WordSplitter splitter(text);
  while (const std::size_t count = splitter.next(words)) {
    const std::size_t unknown_words = dictionary_->look_up(
        std::span(words).first(count), std::span(ids).first(count), std::span(unknown).first(count));
    for (const std::uint32_t place : std::span(unknown).first(unknown_words)) ids[place] = kUnknown;
    for (std::size_t i = 0; i < count; ++i) word_codes_.append(words[i].empty() ? kLineEnd : ids[i]);
  }
  const auto bytes = std::as_bytes(word_codes_.elements());
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace xlm_ds
