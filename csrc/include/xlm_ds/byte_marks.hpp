#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// The vectors of x86-64 itself. Wider ones, chosen at run time, bought less than a tenth of the
// binarizer's time (docs/decisions/0007-binarizing-speed.md). XLM_DS_PLAIN leaves these out too.
#if defined(__SSE2__) && !defined(XLM_DS_PLAIN)
#include <emmintrin.h>
#define XLM_DS_SSE2
#endif

/// 64 bytes of text at a time, as bit sets: bit i tells of byte i.
namespace xlm_ds {

inline constexpr std::size_t kMarkedBytes = 64;

struct ByteMarks {
  std::uint64_t blanks = 0;  // the eleven blanks of one byte, LF and CR among them
  std::uint64_t line_feeds = 0;
  std::uint64_t returns = 0;
  std::uint64_t leads = 0;  // C2, E1, E2, E3: what the other blanks begin with
  friend bool operator==(const ByteMarks&, const ByteMarks&) = default;
};

/// Eight bytes at a time in a register, on any machine.
inline ByteMarks mark_bytes_plain(const char* text) noexcept {
  constexpr std::uint64_t kEach = 0x0101010101010101;
  constexpr std::uint64_t kHighBits = 0x80 * kEach;
  ByteMarks marks;
  for (std::size_t at = 0; at < kMarkedBytes; at += 8) {
    std::uint64_t bytes;
    std::memcpy(&bytes, text + at, sizeof(bytes));
    const std::uint64_t low = bytes & ~kHighBits;
    // The high bit of every byte whose low seven are at least `first` and below `end`.
    const auto between = [low](std::uint64_t first, std::uint64_t end) {
      return (low + (0x80 - first) * kEach) & ~(low + (0x80 - end) * kEach);
    };
    const auto gather = [at](std::uint64_t high_bits) {
      return ((high_bits & kHighBits) >> 7) * 0x0102040810204080 >> 56 << at;
    };
    marks.blanks |= gather((between(0x09, 0x0E) | between(0x1C, 0x21)) & ~bytes);
    marks.line_feeds |= gather(between('\n', '\n' + 1) & ~bytes);
    marks.returns |= gather(between('\r', '\r' + 1) & ~bytes);
    marks.leads |= gather((between(0x42, 0x43) | between(0x61, 0x64)) & bytes);
  }
  return marks;
}

#ifdef XLM_DS_SSE2
inline ByteMarks mark_bytes(const char* text) noexcept {
  ByteMarks marks;
  for (std::size_t at = 0; at < kMarkedBytes; at += sizeof(__m128i)) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(text + at));
    const auto equal = [bytes](int byte) {
      return _mm_cmpeq_epi8(bytes, _mm_set1_epi8(static_cast<char>(byte)));
    };
    const auto between = [bytes](int first, int end) {
      const __m128i above = _mm_sub_epi8(bytes, _mm_set1_epi8(static_cast<char>(first)));
      const __m128i most = _mm_set1_epi8(static_cast<char>(end - first - 1));
      return _mm_cmpeq_epi8(_mm_min_epu8(above, most), above);
    };
    const auto gather = [at](__m128i bytes_set) {
      return std::uint64_t{static_cast<std::uint32_t>(_mm_movemask_epi8(bytes_set))} << at;
    };
    marks.blanks |= gather(_mm_or_si128(between(0x09, 0x0E), between(0x1C, 0x21)));
    marks.line_feeds |= gather(equal('\n'));
    marks.returns |= gather(equal('\r'));
    marks.leads |= gather(_mm_or_si128(equal(0xC2), between(0xE1, 0xE4)));
  }
  return marks;
}
#else
inline ByteMarks mark_bytes(const char* text) noexcept { return mark_bytes_plain(text); }
#endif

}  // namespace xlm_ds
