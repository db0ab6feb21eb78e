#pragma once

#include <cstddef>
#include <span>
#include <string_view>

/// Text as fairseq reads it: strict UTF-8, lines that end at LF, CRLF or CR, words between the 29
/// Unicode blanks.
namespace xlm_ds {

/// Words are handled in blocks of this many: their views, keys and ids stay in the first cache.
inline constexpr std::size_t kWordsPerBlock = 256;

/// Bytes that must be readable after a text whose words are looked up, so that short words are
/// loaded without a branch.
inline constexpr std::size_t kReadableAfter = 16;

/// The offset of the first byte of the first sequence that is not UTF-8 as Unicode defines it (no
/// overlong forms, no surrogates, nothing above U+10FFFF), or text.size(). The offset is the one
/// Python's decoder reports.
[[nodiscard]] std::size_t first_invalid_utf8(std::string_view text) noexcept;

/// The number of line ends: LF, CRLF or CR.
[[nodiscard]] std::size_t count_line_ends(std::string_view text) noexcept;

/// Splits a text into its words; the end of a line comes as an empty word.
class WordSplitter {
 public:
  /// `text` must be valid UTF-8, outlive the splitter, and not be cut between CR and LF.
  explicit WordSplitter(std::string_view text) noexcept
      : at_(text.data()), end_(text.data() + text.size()) {}

  /// Fills `words` from the front, with views into the text; returns how many, 0 at its end.
  [[nodiscard]] std::size_t next(std::span<std::string_view> words) noexcept;

 private:
  const char* at_;
  const char* end_;
};

}  // namespace xlm_ds
