#include "xlm_ds/bpe.hpp"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "check.hpp"
#include "scratch.hpp"
#include "xlm_ds/bpe_encoder.hpp"
#include "xlm_ds/byte_table.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/word_cache.hpp"

namespace {

xlm_ds::Bpe bpe_of(const std::string& codes, const std::optional<std::string>& vocabulary = std::nullopt) {
  const xlm_ds_test::Scratch scratch("bpe");
  xlm_ds_test::write(scratch / "codes", codes);
  if (!vocabulary) return xlm_ds::Bpe(scratch / "codes");
  xlm_ds_test::write(scratch / "vocabulary", *vocabulary);
  return xlm_ds::Bpe(scratch / "codes", scratch / "vocabulary");
}

// What fastBPE learns from low (5 times), lower (2), newest (6), widest (3), ties in one of the possible orders.
const std::string kCodes =
    "e s 9\nes t</w> 9\nl o 7\nw est</w> 6\ne west</w> 6\nn ewest</w> 6\nlo w</w> 5\nw i 3\nd est</w> 3\nwi dest</w> 3\n";

}  // namespace

TEST(byte_table_numbers_in_order_and_tells_lengths_apart) {
  xlm_ds::ByteTable table;
  CHECK(table.find("a") == xlm_ds::ByteTable::kNone);
  for (int i = 0; i < 1000; ++i) CHECK(table.insert(std::to_string(i)) == static_cast<unsigned>(i));
  for (int i = 0; i < 1000; ++i) CHECK(table.find(std::to_string(i)) == static_cast<unsigned>(i));
  CHECK(table.insert("7") == 7 && table[7] == "7");
  CHECK(table.insert(std::string(1, '\0')) == 1000 && table.insert(std::string(2, '\0')) == 1001 && table.insert("") == 1002);
}

TEST(bpe_merges_by_rank_and_copies_blanks) {
  CHECK(bpe_of(kCodes).apply("low  lower\n newest widest ") == "low  lo@@ w@@ e@@ r\n newest widest ");
}

TEST(bpe_undoes_merges_outside_the_vocabulary) {
  const auto bpe = bpe_of(kCodes, "est 1\nl@@ 1\no@@ 1\nw@@ 1\nw 1\ne@@ 1\nr 1\nnewest 1\n");
  CHECK(bpe.apply("low lower widest") == "l@@ o@@ w l@@ o@@ w@@ e@@ r w@@ i@@ d@@ est");
}

TEST(bpe_finishes_a_round_before_what_it_brings_about) {
  // `ab a` ranks above `a b`, which brings it about: both pairs of `a b` are merged first, in words short and long.
  const auto bpe = bpe_of("ab a 2\na b 1\n");
  CHECK(bpe.apply("ababx") == "ab@@ ab@@ x");
  std::string word, expected;
  for (int i = 0; i < 100; ++i) {
    word += "ab";
    expected += "ab@@ ";
  }
  CHECK(bpe.apply(word + "x") == expected + "x");
}

TEST(bpe_survives_a_word_end_in_the_text) {
  for (const std::string codes : {"a< /w> 1\n", "a </w> 1\n"}) {
    CHECK(bpe_of(codes, "x 1\n").apply("a a</w>") == "a a@@ <@@ /@@ w@@ >");
  }
}

TEST(bpe_refuses_what_is_no_codes_file) {
  for (const std::string codes : {"", "a b\n", "a b 1 2\n", " b 1\n", "a  1\n", "a b 1\na b 1\n", "a bc 1\nab c 1\n",
                                  "#version: 0.2\na b\n", "a b 1\n\n"}) {
    CHECK_THROWS(bpe_of(codes), xlm_ds::InputError);
  }
}

namespace {

/// The cached value of a word, whose bytes are in memory of exactly its size: reading beyond would be noticed by `make asan`.
std::string cached(xlm_ds::WordCache& cache, const std::string& word, const std::string& made) {
  const std::vector<char> bytes(word.begin(), word.end());
  const std::string_view view(bytes.data(), bytes.size());
  const auto key = xlm_ds::WordCache::key_of(view, view.data() + view.size());
  return std::string(cache.find_or_make(view, key, [&] { return std::string_view(made); }));
}

using Codes = std::vector<std::uint32_t>;

Codes encode(xlm_ds::BpeEncoder& encoder, const std::string& text) {
  const std::vector<char> bytes(text.begin(), text.end());
  const auto codes = encoder.encode({bytes.data(), bytes.size()});
  return {codes.begin(), codes.end()};
}

constexpr auto kLineEnd = xlm_ds::BpeEncoder::kLineEnd;
constexpr auto kUnknown = xlm_ds::BpeEncoder::kUnknown;

}  // namespace

TEST(word_cache_tells_words_apart_and_keeps_values_of_any_length) {
  xlm_ds::WordCache cache;
  for (const bool known : {false, true}) {
    for (const std::size_t length : {0, 1, 23, 24, 25, 31, 32, 33, 63, 250}) {
      for (const std::size_t made : {0, 1, 23, 24, 25, 300}) {
        const std::string word = std::string(length, 'a') + std::to_string(made);
        const std::string value(made, static_cast<char>('b' + length % 20));
        CHECK(cached(cache, word, known ? "not made again" : value) == value);
        CHECK(cached(cache, word + '\0', "another") == "another");
      }
    }
  }
  // The same key but for one byte, wherever it is.
  for (const std::size_t length : {1, 8, 31, 32, 33, 40}) {
    for (std::size_t at = 0; at < length; ++at) {
      std::string word(length, '\0');
      word[at] = '\1';
      const std::string value = std::to_string(length) + ' ' + std::to_string(at);
      CHECK(cached(cache, word, value) == value);
    }
  }
}

TEST(word_cache_is_bounded_and_right_when_it_has_been_emptied) {
  // So many words that dozens have the hash of another one, short and with the same first bytes.
  for (const auto& start : {std::string(), std::string(xlm_ds::WordCache::kKeyBytes, 'x')}) {
    xlm_ds::WordCache cache;
    std::size_t made_again = 0;
    for (std::uint64_t i = 0; i < 650'000; ++i) {
      const std::string word = start + std::to_string(i * 0x9E3779B97F4A7C15);  // looks random: i alone would be spread evenly
      CHECK(cached(cache, word, word) == word);
      if (i % 100'000 == 0) made_again += cached(cache, "first", word) == word ? 1 : 0;
    }
    CHECK(made_again >= 2);  // at the start, and when it has been emptied
  }
  xlm_ds::WordCache cache;
  const std::string value(70'000, 'v');
  for (int i = 0; i < 500; ++i) CHECK(cached(cache, "long" + std::to_string(i), value) == value);
}

TEST(bpe_encoder_gives_ids_of_pieces_and_line_ends) {
  const auto bpe = bpe_of(kCodes);
  const xlm_ds::Dictionary dictionary({"<s>", "<pad>", "</s>", "<unk>", "<mask>", "low", "lo@@", "w@@", "e@@", "r", "@@"});
  xlm_ds::BpeEncoder encoder(bpe, dictionary);
  CHECK(encode(encoder, "low  lower\n newest\n\n") == (Codes{5, 6, 7, 8, 9, kLineEnd, kUnknown, kLineEnd, kLineEnd}));
  CHECK(encode(encoder, "low") == Codes{5});
  CHECK(encode(encoder, "").empty());
  CHECK(encode(encoder, " \n ") == Codes{kLineEnd});
  // CR belongs to a word, and ends a line; before LF they are one line end. U+00A0 and a tab belong to words, and end them.
  CHECK(encode(encoder, "low\r\n") == (Codes{6, 7, kLineEnd}));
  CHECK(encode(encoder, "low\r \n\n") == (Codes{6, 7, kLineEnd, kLineEnd, kLineEnd}));
  CHECK(encode(encoder, "\r\n\r\r\n") == (Codes{kLineEnd, kLineEnd, 10, kLineEnd}));
  CHECK(encode(encoder, "\nlow\xC2\xA0\t\n") == (Codes{kLineEnd, 6, 7, 10, kLineEnd}));
}

TEST(bpe_encoder_takes_words_without_a_piece) {
  // Tabs alone, merged into one piece: in the cache, and too long for it.
  std::string codes;
  const auto tabs = [](std::size_t count) { return std::string(count, '\t'); };
  for (std::size_t count = 1; count < 256; count *= 2) codes += tabs(count) + ' ' + tabs(count) + " 1\n";
  for (std::size_t count = 1; count < 512; count *= 2) codes += tabs(count) + ' ' + tabs(count) + "</w> 1\n";
  const auto bpe = bpe_of(codes);
  const xlm_ds::Dictionary dictionary({"<s>", "<pad>", "</s>", "<unk>", "<mask>", "low"});
  for (const std::size_t count : {1, 512}) {
    xlm_ds::BpeEncoder encoder(bpe, dictionary);
    CHECK(encode(encoder, tabs(count)).empty());
    CHECK(encode(encoder, tabs(count) + "\n" + tabs(count)) == Codes{kLineEnd});
  }
}

TEST(bpe_encoder_tells_words_spelt_like_symbols_from_unknown_ones) {
  const auto bpe = bpe_of("< u 9\nn k 8\nnk ></w> 7\n<u nk></w> 6\n");
  const xlm_ds::Dictionary dictionary({"<s>", "<pad>", "</s>", "<unk>", "<mask>", "<u@@"});
  xlm_ds::BpeEncoder encoder(bpe, dictionary);
  CHECK(encode(encoder, "<unk> <un") == (Codes{xlm_ds::kUnk, 5, kUnknown}));
}
