#include "xlm_ds/words.hpp"

#include <cstring>

namespace xlm_ds {
namespace {

struct SequenceRule {
  std::size_t length;            // 0: no sequence begins with this byte
  unsigned char second_minimum;  // of the second byte; the rest are 80-BF
  unsigned char second_maximum;
};

/// Table 3-7 of the Unicode standard, "well-formed UTF-8 byte sequences".
constexpr SequenceRule rule_of(unsigned char lead) {
  if (lead >= 0xC2 && lead <= 0xDF) return {2, 0x80, 0xBF};
  if (lead == 0xE0) return {3, 0xA0, 0xBF};
  if (lead == 0xED) return {3, 0x80, 0x9F};
  if (lead >= 0xE1 && lead <= 0xEF) return {3, 0x80, 0xBF};
  if (lead == 0xF0) return {4, 0x90, 0xBF};
  if (lead >= 0xF1 && lead <= 0xF3) return {4, 0x80, 0xBF};
  if (lead == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

bool is_continuation(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

/// Bytes of the well-formed sequence at `at`, or 0.
std::size_t sequence_length(std::string_view text, std::size_t at) {
  const SequenceRule rule = rule_of(static_cast<unsigned char>(text[at]));
  if (rule.length == 0 || at + rule.length > text.size()) return 0;
  const auto second = static_cast<unsigned char>(text[at + 1]);
  if (second < rule.second_minimum || second > rule.second_maximum) return 0;
  for (std::size_t i = 2; i < rule.length; ++i) {
    if (!is_continuation(text[at + i])) return 0;
  }
  return rule.length;
}

}  // namespace

std::size_t first_invalid_utf8(std::string_view text) noexcept {
  constexpr std::uint64_t kHighBits = 0x8080808080808080;
  std::size_t at = 0;
  while (at < text.size()) {
    std::uint64_t eight = kHighBits;
    if (text.size() - at >= sizeof(eight)) std::memcpy(&eight, text.data() + at, sizeof(eight));
    if ((eight & kHighBits) == 0) {
      at += sizeof(eight);
    } else if (static_cast<unsigned char>(text[at]) < 0x80) {
      ++at;
    } else {
      const std::size_t length = sequence_length(text, at);
      if (length == 0) return at;
      at += length;
    }
  }
  return std::string_view::npos;
}

std::size_t line_start_from(std::string_view text, std::size_t at) noexcept {
  for (; at > 0 && at < text.size(); ++at) {
    const char before = text[at - 1];
    if (before == '\n' || (before == '\r' && text[at] != '\n')) return at;
  }
  return at < text.size() ? at : text.size();
}

}  // namespace xlm_ds
