#include "xlm_ds/dictionary.hpp"

#include <array>
#include <random>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "check.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/special_ids.hpp"

namespace {

std::vector<std::string> with_specials(const std::vector<std::string>& words) {
  std::vector<std::string> symbols{"<s>", "<pad>", "</s>", "<unk>", "<mask>"};
  symbols.insert(symbols.end(), words.begin(), words.end());
  return symbols;
}

/// Looks up one word, with other bytes right behind it.
std::uint32_t id_of(const xlm_ds::Dictionary& dictionary, const std::string& word) {
  const std::string text = word + std::string(xlm_ds::kReadableAfter, 'x');
  const std::string_view view(text.data(), word.size());
  std::uint32_t id = 0;
  std::uint32_t unknown = 0;
  const std::size_t unknown_words = dictionary.look_up({&view, 1}, {&id, 1}, {&unknown, 1});
  CHECK(unknown_words == 0 || (id == xlm_ds::kUnk && word != "<unk>"));
  return id;
}

}  // namespace

TEST(special_symbols_unknown_words_and_line_ends) {
  const xlm_ds::Dictionary dictionary(with_specials({"the"}));
  CHECK(id_of(dictionary, "<s>") == 0 && id_of(dictionary, "<mask>") == 4 &&
        id_of(dictionary, "the") == 5);
  CHECK(id_of(dictionary, "th") == 3 && id_of(dictionary, "thex") == 3 &&
        id_of(dictionary, "<unk>") == 3);
  CHECK(id_of(dictionary, "") == 2);
}

TEST(later_rows_overwrite_and_the_empty_row_is_never_found) {
  const xlm_ds::Dictionary dictionary(with_specials({"a", "", "a", "<unk>"}));
  CHECK(id_of(dictionary, "a") == 7 && id_of(dictionary, "<unk>") == 8 &&
        id_of(dictionary, "b") == 3);
  CHECK(id_of(dictionary, "") == 2);
}

TEST(words_that_differ_only_at_their_end_or_by_nul_are_told_apart) {
  std::vector<std::string> words;
  for (std::size_t length = 1; length < 50; ++length) {
    for (const char last : {'a', 'b', '\0'}) words.push_back(std::string(length - 1, 'a') + last);
  }
  const xlm_ds::Dictionary dictionary(with_specials(words));
  for (std::size_t i = 0; i < words.size(); ++i)
    CHECK(id_of(dictionary, words[i]) == i + static_cast<std::size_t>(xlm_ds::kSpecials));
  CHECK(id_of(dictionary, std::string(50, 'a')) == xlm_ds::kUnk);
}

TEST(random_words_as_a_map_finds_them) {
  std::mt19937 random(2);
  const auto word = [&] {
    std::string made(1 + random() % 24, 'a');
    for (char& c : made) c = static_cast<char>('a' + random() % 3);
    return made;
  };
  std::vector<std::string> words(3000);
  for (auto& made : words) made = word();
  const auto symbols = with_specials(words);
  std::unordered_map<std::string, std::uint32_t> expected;
  for (std::size_t id = 0; id < symbols.size(); ++id)
    expected[symbols[id]] = static_cast<std::uint32_t>(id);
  const xlm_ds::Dictionary dictionary(symbols);
  for (int i = 0; i < 6000; ++i) {
    const std::string asked = word();
    const auto found = expected.find(asked);
    CHECK(id_of(dictionary, asked) ==
          (found == expected.end() ? static_cast<std::uint32_t>(xlm_ds::kUnk) : found->second));
  }
}

TEST(the_places_of_unknown_words_are_told) {
  const xlm_ds::Dictionary dictionary(with_specials({"a", "b"}));
  const std::string text = "c a <unk> d b" + std::string(xlm_ds::kReadableAfter, '\0');
  const std::array<std::string_view, 6> words{
      std::string_view(text).substr(0, 1), std::string_view(text).substr(2, 1), std::string_view(text).substr(4, 5),
      std::string_view(text).substr(10, 1), std::string_view(text).substr(12, 1), std::string_view(text).substr(13, 0)};
  std::array<std::uint32_t, 6> ids{};
  std::array<std::uint32_t, 6> unknown{};
  CHECK(dictionary.look_up(words, ids, unknown) == 2);
  CHECK(unknown[0] == 0 && unknown[1] == 3);
  CHECK((ids == std::array<std::uint32_t, 6>{3, 5, 3, 3, 6, 2}));
}

TEST(a_symbol_that_is_not_utf8_is_refused) {
  CHECK_THROWS(xlm_ds::Dictionary(with_specials({"a", "\xC3"})), xlm_ds::InputError);
}

TEST(a_dictionary_without_the_special_symbols_is_refused) {
  CHECK_THROWS(xlm_ds::Dictionary({"a", "b"}), xlm_ds::InputError);
}
