// The word splitter, the search for bytes that are not UTF-8, and the count of line ends, on any bytes. Accepted: UTF-8.
#include "xlm_ds/words.hpp"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "fuzz.hpp"

namespace {

using namespace xlm_ds_fuzz;

// From Unicode: the white space of Python's str.split, line ends too.
constexpr std::array<std::uint32_t, 29> kBlanks{
    0x09,   0x0A,   0x0B,   0x0C,   0x0D,   0x1C,   0x1D,   0x1E,   0x1F,   0x20,
    0x85,   0xA0,   0x1680, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006,
    0x2007, 0x2008, 0x2009, 0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000};

constexpr std::size_t kLargestBlock = 256;

struct Character {
  std::uint32_t code = 0;
  std::size_t bytes = 0;  // 0: no UTF-8
};

/// The character that `text`, which is not empty, begins with: by the value its bits have.
Character character_of(std::string_view text) {
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

struct Split {
  std::vector<std::string_view> words;  // a line's end as an empty one
  std::size_t line_ends = 0;
  std::size_t valid = 0;  // bytes before the first that is not UTF-8
};

Split split(std::string_view text) {
  Split found;
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

/// The input itself, and now and then so often that it crosses what the splitter reads at a time, in another place each.
std::vector<char> text_from(std::string_view input) {
  constexpr std::size_t kLong = 5000;
  std::vector<char> text(input.begin(), input.end());
  if (input.size() % 16 == 1) {
    while (text.size() < kLong) text.insert(text.end(), input.begin(), input.end());
  }
  return {text.begin(), text.end()};  // in memory of just this size, so that reading on is noticed
}

void compare_marks(std::string_view text) {
  for (std::size_t at = 0; at + xlm_ds::kMarkedBytes <= text.size(); at += xlm_ds::kMarkedBytes - 1) {
    const char* const bytes = text.data() + at;
    require(xlm_ds::mark_bytes(bytes) == xlm_ds::mark_bytes_plain(bytes), "bytes are marked alike on every machine");
  }
}

}  // namespace

std::vector<std::string> xlm_ds_fuzz::seeds() {
  return {"a the cat sat on the mat of the house by the sea\nthe dog\r\n\r\nlast",
          "\u0915\u092E\u0932 \u0628\u064A\u062A\u3000\u4E2D\u6587\u2009x\u00A0y\u0085z\u1680\u2028\u205F\n",
          "caf\u00E9 \U0001F600\U0010FFFF\t\x1C\x1F\r\r\n \n",
          "abcdefghijklmnopqrstuvwxyz0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ \u00DF\u00DF\u00DF\n"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto exact = text_from(text_of(data, size));
  const std::string_view text(exact.data(), exact.size());
  const Split expected = split(text);
  require(xlm_ds::first_invalid_utf8(text) == expected.valid, "the first byte that is not UTF-8 is found");
  count(expected.valid == text.size());
  require(xlm_ds::count_line_ends(text) == expected.line_ends, "line ends are counted");
  compare_marks(text);

  std::vector<std::string_view> block(1 + size % kLargestBlock);
  xlm_ds::WordSplitter splitter(text);
  std::size_t taken = 0;
  while (const std::size_t words = splitter.next(block)) {
    require(words <= block.size() && words <= expected.words.size() - taken, "no words are made up");
    for (std::size_t i = 0; i < words; ++i) {
      require(block[i] == expected.words[taken + i], "words are those between the blanks");
      require(block[i].data() >= text.data() && block[i].data() + block[i].size() <= text.data() + text.size(),
              "words are views into the text");
    }
    taken += words;
  }
  require(taken == expected.words.size(), "no word is lost");
  return 0;
}
