// The word splitter, the search for bytes that are not UTF-8, and the count of line ends, on any bytes. Accepted: UTF-8.
#include "xlm_ds/words.hpp"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "fuzz.hpp"
#include "words_twin.hpp"

namespace {

using namespace xlm_ds_fuzz;

constexpr std::size_t kLargestBlock = 256;

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
  const SplitText expected = split_words(text);
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
