#include "xlm_ds/words.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

namespace xlm_ds {
namespace {

constexpr std::size_t kBlankBytes = 3;  // of the longest

std::uint8_t byte_at(const char* at) noexcept { return static_cast<std::uint8_t>(*at); }

bool is_continuation(char c) noexcept { return (static_cast<std::uint8_t>(c) & 0xC0) == 0x80; }

/// Length of the UTF-8 sequence at `at`, which is before `end`; 0 if there is no valid one.
std::size_t utf8_length(const char* at, const char* end) noexcept {
  const std::uint8_t lead = byte_at(at);
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return 0;  // continuation, overlong, or above U+10FFFF
  const std::size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  if (static_cast<std::size_t>(end - at) < length) return 0;
  const std::uint8_t second = byte_at(at + 1);
  if (lead == 0xE0 && second < 0xA0) return 0;  // overlong
  if (lead == 0xED && second > 0x9F) return 0;  // a surrogate
  if (lead == 0xF0 && second < 0x90) return 0;  // overlong
  if (lead == 0xF4 && second > 0x8F) return 0;  // above U+10FFFF
  return std::all_of(at + 1, at + length, is_continuation) ? length : 0;
}

bool eight_ascii_bytes(const char* at) noexcept {
  std::uint64_t bytes;
  std::memcpy(&bytes, at, sizeof(bytes));
  return (bytes & 0x8080808080808080) == 0;
}

/// Bytes of the blank at `at`, which is one of ByteMarks::leads; 0 if it is another character.
/// Reads two bytes more.
std::size_t blank_length(const char* at) noexcept {
  const std::uint8_t second = byte_at(at + 1);
  if (byte_at(at) == 0xC2) return second == 0x85 || second == 0xA0 ? 2 : 0;
  const std::uint8_t third = byte_at(at + 2);
  switch (byte_at(at) << 8 | second) {
    case 0xE19A:  // U+1680
      return third == 0x80 ? 3 : 0;
    case 0xE280:  // U+2000-200A, U+2028, U+2029, U+202F
      // The lower limit counts: any byte may follow, as the text need not be UTF-8.
      return (third >= 0x80 && third <= 0x8A) || third == 0xA8 || third == 0xA9 || third == 0xAF ? 3 : 0;
    case 0xE281:  // U+205F
      return third == 0x9F ? 3 : 0;
    case 0xE380:  // U+3000
      return third == 0x80 ? 3 : 0;
    default:
      return 0;
  }
}

/// Bytes of the line end at `at`: LF, CR, or both.
std::ptrdiff_t line_end_length(const char* at, const char* end) noexcept {
  return *at == '\r' && at + 1 != end && at[1] == '\n' ? 2 : 1;
}

}  // namespace

std::size_t first_invalid_utf8(std::string_view text) noexcept {
  const char* const begin = text.data();
  const char* const end = begin + text.size();
  const char* at = begin;
  while (at != end) {
    if (end - at >= 8 && eight_ascii_bytes(at)) {
      at += 8;
      continue;
    }
    const std::size_t length = utf8_length(at, end);
    if (length == 0) break;
    at += length;
  }
  return static_cast<std::size_t>(at - begin);
}

std::size_t count_line_ends(std::string_view text) noexcept {
  std::size_t count = 0;
  const char* const end = text.data() + text.size();
  for (const char* at = text.data(); at != end;) {
    const bool line_end = *at == '\n' || *at == '\r';
    count += line_end ? 1 : 0;
    at += line_end ? line_end_length(at, end) : 1;
  }
  return count;
}

void WordSplitter::read_window() noexcept {
  window_ = next_window_;
  const auto left = static_cast<std::size_t>(end_ - window_);
  const std::size_t bytes = std::min(left, kWindowMarks * kMarkedBytes);
  marks_ = (bytes + kMarkedBytes - 1) / kMarkedBytes;
  std::uint64_t after_blank = 1;  // a window begins at a blank, or where a word may begin
  std::uint64_t overhang = 0;     // bytes of the last blank that belong to the next set
  for (std::size_t i = 0; i < marks_; ++i) {
    const char* text = window_ + i * kMarkedBytes;
    const std::size_t text_bytes = left - i * kMarkedBytes;
    std::array<char, kMarkedBytes + kBlankBytes - 1> copy;
    if (text_bytes < copy.size()) {
      copy.fill('\0');
      std::copy_n(text, text_bytes, copy.begin());
      text = copy.data();
    }
    const ByteMarks marks = mark_bytes(text);
    std::uint64_t blanks = marks.blanks | overhang;
    overhang = 0;
    for (std::uint64_t leads = marks.leads; leads != 0; leads &= leads - 1) {
      const auto at = static_cast<std::size_t>(std::countr_zero(leads));
      const std::uint64_t blank = (std::uint64_t{1} << blank_length(text + at)) - 1;
      blanks |= blank << at;
      if (at != 0) overhang |= blank >> (kMarkedBytes - at);
    }
    std::uint64_t line_ends = marks.line_feeds | marks.returns;
    for (std::uint64_t returns = marks.returns; returns != 0; returns &= returns - 1) {
      const auto at = static_cast<std::size_t>(std::countr_zero(returns));
      if (text[at + 1] == '\n') line_ends &= ~(std::uint64_t{1} << at);
    }
    if (text_bytes < kMarkedBytes) blanks |= ~std::uint64_t{0} << text_bytes;
    blanks_[i] = blanks;
    begins_[i] = (~blanks & (blanks << 1 | after_blank)) | line_ends;
    after_blank = blanks >> (kMarkedBytes - 1);
  }
  blanks_[marks_] = 0;
  next_window_ = window_ + bytes + std::popcount(overhang);
}

const char* WordSplitter::long_word_end() const noexcept {
  WordSplitter rest(std::string_view(next_window_, static_cast<std::size_t>(end_ - next_window_)));
  const WordSplitter* in = this;
  for (std::size_t mark = mark_ + 1;; mark = 0) {
    for (; mark < in->marks_; ++mark) {
      const std::uint64_t blanks = in->blanks_[mark];
      if (blanks != 0) return in->window_ + mark * kMarkedBytes + std::countr_zero(blanks);
    }
    if (in->next_window_ == end_) return end_;
    rest.read_window();
    in = &rest;
  }
}

std::size_t WordSplitter::next(std::span<std::string_view> words) noexcept {
  std::size_t count = 0;
  while (count < words.size()) {
    if (open_ == 0) {
      if (++mark_ >= marks_) {
        if (next_window_ == end_) break;
        read_window();
        mark_ = 0;
      }
      open_ = begins_[mark_];
      continue;
    }
    const auto bit = static_cast<unsigned>(std::countr_zero(open_));
    open_ &= open_ - 1;
    const char* const begin = window_ + mark_ * kMarkedBytes + bit;
    const std::uint64_t blanks = blanks_[mark_] >> bit | blanks_[mark_ + 1] << 1 << (kMarkedBytes - 1 - bit);
    std::size_t length = static_cast<std::size_t>(std::countr_zero(blanks));
    if (blanks == 0) {  // longer than a set, or beyond the window
      const char* const end = long_word_end();
      next_window_ = std::max(next_window_, end);
      length = static_cast<std::size_t>(end - begin);
    }
    words[count++] = {begin, length};
  }
  return count;
}

}  // namespace xlm_ds
