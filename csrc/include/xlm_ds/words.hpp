#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

/// Bytes into lines and words by fairseq's rules (Python's text mode and str.split): a line ends at \n, \r\n or \r; words are
/// separated by runs of the 29 Unicode blanks. Everything here works on whole UTF-8; check it first with first_invalid_utf8.
namespace xlm_ds {

/// Offset of the first byte that is not UTF-8 as Python decodes it (no surrogates, no overlong forms, nothing beyond
/// U+10FFFF), or npos. O(bytes).
[[nodiscard]] std::size_t first_invalid_utf8(std::string_view text) noexcept;

/// The first line start at or after `at` (0 and text.size() count as line starts). O(distance).
[[nodiscard]] std::size_t line_start_from(std::string_view text, std::size_t at) noexcept;

namespace detail {

enum ByteKind : std::uint8_t { kWord, kBlank, kLineEnd, kMaybeBlank };

consteval std::array<ByteKind, 256> byte_kinds() {
  std::array<ByteKind, 256> kinds{};
  for (const int blank : {0x09, 0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x1F, 0x20}) kinds[static_cast<std::size_t>(blank)] = kBlank;
  for (const int end : {0x0A, 0x0D}) kinds[static_cast<std::size_t>(end)] = kLineEnd;
  for (const int lead : {0xC2, 0xE1, 0xE2, 0xE3}) kinds[static_cast<std::size_t>(lead)] = kMaybeBlank;
  return kinds;
}
inline constexpr auto kByteKinds = byte_kinds();

/// Bytes of the blank that begins at `at` (whose kind is kMaybeBlank), or 0 if another character begins there:
/// U+0085 U+00A0 | U+1680 | U+2000-200A U+2028 U+2029 U+202F U+205F | U+3000.
[[nodiscard]] inline std::size_t wide_blank(std::string_view text, std::size_t at) noexcept {
  const auto byte = [&](std::size_t i) { return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0U; };
  switch (byte(0)) {
    case 0xC2: return byte(1) == 0x85 || byte(1) == 0xA0 ? 2 : 0;
    case 0xE1: return byte(1) == 0x9A && byte(2) == 0x80 ? 3 : 0;
    case 0xE3: return byte(1) == 0x80 && byte(2) == 0x80 ? 3 : 0;
    default: break;
  }
  if (byte(1) == 0x81) return byte(2) == 0x9F ? 3 : 0;
  const bool blank = (byte(2) >= 0x80 && byte(2) <= 0x8A) || byte(2) == 0xA8 || byte(2) == 0xA9 || byte(2) == 0xAF;
  return byte(1) == 0x80 && blank ? 3 : 0;
}

}  // namespace detail

/// Calls word(std::string_view) for every word and line_end() after every line of `text`, which begins at a line start.
/// A last line without a line end counts. O(bytes).
template <typename Word, typename LineEnd>
void for_each_word(std::string_view text, Word word, LineEnd line_end) {
  std::size_t at = 0, word_begin = 0;
  bool line_open = false;  // something of the line has been seen
  const auto finish_word = [&] {
    if (at > word_begin) word(text.substr(word_begin, at - word_begin));
  };
  while (at < text.size()) {
    const auto kind = detail::kByteKinds[static_cast<unsigned char>(text[at])];
    const std::size_t blank = kind == detail::kWord        ? 0
                              : kind == detail::kMaybeBlank ? detail::wide_blank(text, at)
                                                            : 1;
    if (blank == 0) {
      ++at;
      line_open = true;
      continue;
    }
    finish_word();
    if (kind == detail::kLineEnd) {
      if (text[at] == '\r' && at + 1 < text.size() && text[at + 1] == '\n') ++at;
      line_end();
      line_open = false;
    } else {
      line_open = true;
    }
    at += blank;
    word_begin = at;
  }
  finish_word();
  if (line_open) line_end();
}

}  // namespace xlm_ds
