#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

/// A splitter of text into words as plain as docs/formats.md describes it, to compare the core's with.
namespace xlm_ds_fuzz {

// From Unicode: the white space of Python's str.split, line ends too.
inline constexpr std::array<std::uint32_t, 29> kBlanks{
    0x09,   0x0A,   0x0B,   0x0C,   0x0D,   0x1C,   0x1D,   0x1E,   0x1F,   0x20,
    0x85,   0xA0,   0x1680, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006,
    0x2007, 0x2008, 0x2009, 0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000};

struct Character {
  std::uint32_t code = 0;
  std::size_t bytes = 0;  // 0: no UTF-8
};

/// The character that `text`, which is not empty, begins with: by the value its bits have.
inline Character character_of(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<std::uint32_t>(static_cast<unsigned char>(text[i])); };
  const std::uint32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  const std::size_t bytes = lead >> 5 == 0b110 ? 2 : lead >> 4 == 0b1110 ? 3 : lead >> 3 == 0b11110 ? 4 : 0;
  if (bytes == 0 || text.size() < bytes) return {};
  std::uint32_t code = lead & 0x7Fu >> bytes;
  for (std::size_t i = 1; i < bytes; ++i) {
    if (byte(i) >> 6 != 0b10) return {};
    code = code << 6 | (byte(i) & 0x3F);
  }
  constexpr std::array<std::uint32_t, 5> kLeast{0, 0, 0x80, 0x800, 0x10000};  // else there is a shorter form
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  return code < kLeast[bytes] || code > 0x10FFFF || surrogate ? Character{} : Character{code, bytes};
}

struct SplitText {
  std::vector<std::string_view> words;  // a line's end as an empty one
  std::size_t line_ends = 0;
  std::size_t valid = 0;  // bytes before the first that is not UTF-8
};

inline SplitText split_words(std::string_view text) {
  SplitText found;
  found.valid = text.size();
  std::size_t begin = 0;  // of the word
  const auto end_word = [&](std::size_t end) {
    if (end != begin) found.words.push_back(text.substr(begin, end - begin));
  };
  for (std::size_t at = 0; at < text.size();) {
    const Character character = character_of(text.substr(at));
    if (character.bytes == 0) found.valid = std::min(found.valid, at);
    std::size_t next = at + std::max<std::size_t>(character.bytes, 1);
    if (character.bytes != 0 && std::find(kBlanks.begin(), kBlanks.end(), character.code) != kBlanks.end()) {
      end_word(at);
      if (character.code == '\n' || character.code == '\r') {
        if (character.code == '\r' && next < text.size() && text[next] == '\n') ++next;
        found.words.emplace_back();
        ++found.line_ends;
      }
      begin = next;
    }
    at = next;
  }
  end_word(text.size());
  return found;
}

}  // namespace xlm_ds_fuzz
