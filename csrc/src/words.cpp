#include "xlm_ds/words.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace xlm_ds {
namespace {

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

enum class Kind : std::uint8_t { word, blank, line_feed, carriage_return, perhaps_blank };

/// What a byte can be the first of. The 29 blanks are those of Python's str.split, as in fairseq.
constexpr std::array<Kind, 256> kKinds = [] {
  std::array<Kind, 256> kinds{};
  for (const std::size_t c : {0x09, 0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x1F, 0x20}) {
    kinds[c] = Kind::blank;
  }
  for (const std::size_t c : {0xC2, 0xE1, 0xE2, 0xE3}) kinds[c] = Kind::perhaps_blank;
  kinds['\n'] = Kind::line_feed;
  kinds['\r'] = Kind::carriage_return;
  return kinds;
}();

Kind kind_of(const char* at) noexcept { return kKinds[byte_at(at)]; }

/// Length of the blank at `at`, which is of kind perhaps_blank; 0 if it is another character.
std::size_t blank_length(const char* at) noexcept {
  const std::uint8_t second = byte_at(at + 1);
  if (byte_at(at) == 0xC2) return second == 0x85 || second == 0xA0 ? 2 : 0;
  const std::uint8_t third = byte_at(at + 2);
  switch (byte_at(at) << 8 | second) {
    case 0xE19A:  // U+1680
      return third == 0x80 ? 3 : 0;
    case 0xE280:  // U+2000-200A, U+2028, U+2029, U+202F
      return third <= 0x8A || third == 0xA8 || third == 0xA9 || third == 0xAF ? 3 : 0;
    case 0xE281:  // U+205F
      return third == 0x9F ? 3 : 0;
    case 0xE380:  // U+3000
      return third == 0x80 ? 3 : 0;
    default:
      return 0;
  }
}

/// The first byte at or after `at` that is not part of a word.
const char* word_end(const char* at, const char* end) noexcept {
  while (at != end) {
    const Kind kind = kind_of(at);
    if (kind != Kind::word && (kind != Kind::perhaps_blank || blank_length(at) != 0)) break;
    ++at;
  }
  return at;
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

std::size_t WordSplitter::next(std::span<std::string_view> words) noexcept {
  std::size_t count = 0;
  while (count < words.size() && at_ != end_) {
    const Kind kind = kind_of(at_);
    if (kind == Kind::line_feed || kind == Kind::carriage_return) {
      words[count++] = {at_, 0};
      at_ += line_end_length(at_, end_);
    } else if (kind == Kind::blank) {
      ++at_;
    } else if (const std::size_t blank = kind == Kind::perhaps_blank ? blank_length(at_) : 0;
               blank != 0) {
      at_ += blank;
    } else {
      const char* const begin = at_;
      at_ = word_end(at_, end_);
      words[count++] = {begin, static_cast<std::size_t>(at_ - begin)};
    }
  }
  return count;
}

}  // namespace xlm_ds
