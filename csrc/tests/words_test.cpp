#include "xlm_ds/dictionary.hpp"
#include "xlm_ds/words.hpp"

#include <array>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "check.hpp"

using namespace std::string_literals;
using namespace std::string_view_literals;

namespace {

/// All words of a text, a line's end as "", taken `block` at a time.
std::vector<std::string> split(std::string_view text, std::size_t block = xlm_ds::kWordsPerBlock) {
  std::vector<std::string> all;
  std::vector<std::string_view> words(block);
  xlm_ds::WordSplitter splitter(text);
  while (const std::size_t count = splitter.next(words))
    all.insert(all.end(), words.begin(), words.begin() + static_cast<std::ptrdiff_t>(count));
  return all;
}

const std::vector<std::string> kBlanks{
    "\x09",   "\x0B",   "\x0C",   "\x1C",   "\x1D",   "\x1E",   "\x1F",   " ",      "\u0085",
    "\u00A0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
    "\u2007", "\u2008", "\u2009", "\u200A", "\u2028", "\u2029", "\u202F", "\u205F", "\u3000"};
const std::vector<std::string> kNotBlanks{
    "a",      "\u0084", "\u00A1", "\u180E", "\u200B",     "\u200D",     "\u2027",
    "\u202A", "\u2060", "\u3001", "\uFEFF", "\U00010000", "\U0010FFFF", std::string("\0", 1),
    "\x7F"};

}  // namespace

TEST(every_blank_separates_and_nothing_else_does) {
  CHECK(kBlanks.size() + 2 == 29);  // with LF and CR
  for (const auto& blank : kBlanks)
    CHECK((split("x" + blank + blank + "y") == std::vector<std::string>{"x", "y"}));
  for (const auto& other : kNotBlanks)
    CHECK((split("x" + other + "y") == std::vector<std::string>{"x" + other + "y"}));
}

TEST(bytes_that_only_begin_like_a_blank_are_part_of_words) {
  for (const auto& blank : kBlanks) {
    for (std::size_t length = 1; length < blank.size(); ++length) {
      for (const auto& after : {"y"s, "\x7F"s, "\xC0"s}) {
        const std::string word = std::string("x").append(blank, 0, length) + after;
        CHECK((split(word) == std::vector<std::string>{word}));
      }
      const std::string cut = std::string("x").append(blank, 0, length);
      CHECK((split(cut + " y") == std::vector<std::string>{cut, "y"}));
    }
  }
}

TEST(line_ends) {
  CHECK((split("a\nb\r\nc\rd") == std::vector<std::string>{"a", "", "b", "", "c", "", "d"}));
  CHECK((split("\n\r\r\n\n") == std::vector<std::string>{"", "", "", ""}));
  CHECK(xlm_ds::count_line_ends("a\nb\r\nc\rd\n\r") == 5);
  CHECK(split("").empty() && split(" \u3000").empty());
}

TEST(random_texts_split_as_they_were_joined) {
  std::mt19937 random(1);
  const auto pick = [&](const auto& from) { return from[random() % from.size()]; };
  const std::array<std::string, 3> line_ends{"\n", "\r\n", "\r"};
  for (int round = 0; round < 300; ++round) {
    std::string text;
    std::vector<std::string> expected;
    for (int i = 0; i < 40; ++i) {
      if (random() % 4 == 0) {
        const std::string end = pick(line_ends);
        if (text.ends_with('\r') && end.starts_with('\n')) text += ' ';
        text += end;
        expected.emplace_back();
      } else {
        std::string word;
        for (std::size_t n = 1 + random() % 9; n != 0; --n) word += pick(kNotBlanks);
        text += word + pick(kBlanks);
        expected.push_back(word);
      }
    }
    CHECK(xlm_ds::first_invalid_utf8(text) == text.size());
    CHECK(split(text) == expected);
    CHECK(split(text, 1) == expected);
  }
}

TEST(invalid_utf8_is_found_where_it_begins) {
  for (const auto bad :
       {"\x80"sv, "\xBF"sv, "\xC0\x80"sv, "\xC1\xBF"sv, "\xC2"sv, "\xC2 "sv, "\xE0\x9F\xBF"sv,
        "\xE2\x80"sv, "\xED\xA0\x80"sv, "\xED\xBF\xBF"sv, "\xF0\x8F\xBF\xBF"sv, "\xF0\x90\x80"sv,
        "\xF4\x90\x80\x80"sv, "\xF5\x80\x80\x80"sv, "\xFF"sv}) {
    for (std::size_t before = 0; before < 20; ++before) {
      for (const auto after : {""sv, "x"sv, "some more text"sv}) {
        const std::string text = std::string(before, 'a') + std::string(bad) + std::string(after);
        CHECK(xlm_ds::first_invalid_utf8(text) == before);
      }
    }
  }
}

TEST(limits_of_utf8_are_valid) {
  for (const auto good :
       {"\0"sv, "\x7F"sv, "\xC2\x80"sv, "\xDF\xBF"sv, "\xE0\xA0\x80"sv, "\xED\x9F\xBF"sv,
        "\xEE\x80\x80"sv, "\xEF\xBF\xBF"sv, "\xF0\x90\x80\x80"sv, "\xF4\x8F\xBF\xBF"sv}) {
    CHECK(xlm_ds::first_invalid_utf8(good) == good.size());
  }
}

TEST(vectors_mark_bytes_as_the_plain_code_does) {
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    std::array<char, xlm_ds::kMarkedBytes> text;
    for (char& c : text) c = static_cast<char>(random() % (round % 2 == 0 ? 256 : 0x22));
    CHECK(xlm_ds::mark_bytes(text.data()) == xlm_ds::mark_bytes_plain(text.data()));
    xlm_ds::ByteMarks expected;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const auto byte = static_cast<unsigned char>(text[i]);
      const std::uint64_t bit = std::uint64_t{1} << i;
      if ((byte >= 0x09 && byte <= 0x0D) || (byte >= 0x1C && byte <= 0x20)) expected.blanks |= bit;
      if (byte == '\n') expected.line_feeds |= bit;
      if (byte == '\r') expected.returns |= bit;
      if (byte == 0xC2 || (byte >= 0xE1 && byte <= 0xE3)) expected.leads |= bit;
    }
    CHECK(xlm_ds::mark_bytes_plain(text.data()) == expected);
  }
}

TEST(long_words_follow_each_other) {
  for (std::size_t length = 60; length < 200; ++length) {
    std::string text;
    std::vector<std::string> expected;
    for (const std::string blank : {" ", "\u3000", "\r\n", "\u00A0", "  "}) {
      for (int i = 0; i < 20; ++i) {
        expected.push_back(std::string(length + text.size() % 7, 'x'));
        text += expected.back() + blank;
        if (blank == "\r\n") expected.emplace_back();
      }
    }
    CHECK(split(text) == expected);
  }
}

TEST(words_and_blanks_across_every_border) {
  // Sets of 64 bytes, windows of 4096, and the text's end, each with a long word, a blank of three bytes and a CRLF on it.
  for (const std::size_t border : {64, 128, 4096, 8192}) {
    for (std::size_t before = border - 6; before <= border + 2; ++before) {
      for (const std::string middle : {" ", "\u3000", "\u00A0", "\r\n", "\r", "\n", "\u3000\u3000", "\u3001"}) {
        for (const std::string last : {"", "y", "y\n", "\u3000"}) {
          const std::string word(before, 'x');
          std::string expected_word = word;
          std::vector<std::string> expected;
          if (middle == "\u3001") {
            expected_word += middle;
          }
          const bool joined = middle == "\u3001" && last.starts_with('y');
          if (joined) expected_word += 'y';
          expected.push_back(expected_word);
          if (middle == "\r\n" || middle == "\r" || middle == "\n") expected.emplace_back();
          if (last.starts_with('y') && !joined) expected.emplace_back("y");
          if (last.ends_with('\n')) expected.emplace_back();
          CHECK(split(word + middle + last) == expected);
        }
      }
    }
  }
}
