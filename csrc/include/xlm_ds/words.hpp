#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "xlm_ds/byte_marks.hpp"

/// Text as fairseq reads it: strict UTF-8, lines that end at LF, CRLF or CR, words between the 29
/// Unicode blanks.
namespace xlm_ds {

/// The offset of the first byte of the first sequence that is not UTF-8 as Unicode defines it (no
/// overlong forms, no surrogates, nothing above U+10FFFF), or text.size(). The offset is the one
/// Python's decoder reports.
[[nodiscard]] std::size_t first_invalid_utf8(std::string_view text) noexcept;

/// The number of line ends: LF, CRLF or CR.
[[nodiscard]] std::size_t count_line_ends(std::string_view text) noexcept;

/// Splits a text into its words; the end of a line comes as an empty word. Bytes that are not UTF-8
/// are part of words.
class WordSplitter {
 public:
  /// `text` must outlive the splitter, and not be cut between CR and LF.
  explicit WordSplitter(std::string_view text) noexcept
      : next_window_(text.data()), end_(text.data() + text.size()) {}

  /// Fills `words` from the front, with views into the text; returns how many, 0 at its end.
  [[nodiscard]] std::size_t next(std::span<std::string_view> words) noexcept;

 private:
  static constexpr std::size_t kWindowMarks = 64;  // 4 KB of text, whose bit sets are 1 KB

  void read_window() noexcept;
  /// The first blank after the sets of mark_, or the end of the text.
  [[nodiscard]] const char* long_word_end() const noexcept;

  const char* window_ = nullptr;  // the text whose bit sets are below
  const char* next_window_;
  const char* end_;
  std::size_t mark_ = 0;         // the set of begins that `open_` is left of
  std::size_t marks_ = 0;        // in the window
  std::uint64_t open_ = 0;       // words and line ends of begins_[mark_] not yet taken
  std::array<std::uint64_t, kWindowMarks> begins_;      // first bytes of words, and line ends
  std::array<std::uint64_t, kWindowMarks + 1> blanks_;  // the last is 0: a word may go on
};

}  // namespace xlm_ds
