// Dictionaries of any symbols, asked for any words. An input is the symbols, a line each, 0xFF, and the words, a line
// each; the special symbols go before the others unless the first line is `-`.
#include "xlm_ds/dictionary.hpp"

#include <algorithm>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fuzz.hpp"
#include "xlm_ds/special_ids.hpp"
#include "xlm_ds/words.hpp"

namespace {

using namespace xlm_ds_fuzz;

/// The core takes symbols as strings.
std::vector<std::string> strings_of(std::string_view text) {
  const auto lines = lines_of(text);
  return {lines.begin(), lines.end()};
}

struct Answer {
  std::vector<std::uint32_t> ids;
  std::vector<std::uint32_t> unknown;  // places of the words that are in no row
};

/// What the core says; every word is in memory that ends kReadableAfter bytes after the last.
Answer answer_of(const xlm_ds::Dictionary& dictionary, std::span<const std::string> words) {
  std::size_t bytes = xlm_ds::kReadableAfter;
  for (const auto& word : words) bytes += word.size();
  std::vector<char> text;
  text.reserve(bytes);
  std::vector<std::string_view> views;
  for (const auto& word : words) {
    views.emplace_back(text.data() + text.size(), word.size());
    text.insert(text.end(), word.begin(), word.end());
  }
  text.resize(bytes, 'x');
  Answer answer{std::vector<std::uint32_t>(words.size()), std::vector<std::uint32_t>(words.size())};
  answer.unknown.resize(dictionary.look_up(views, answer.ids, answer.unknown));
  return answer;
}

bool is_utf8(const std::string& word) { return xlm_ds::first_invalid_utf8(word) == word.size(); }

}  // namespace

std::vector<std::string> xlm_ds_fuzz::seeds() {
  const std::string long_word(40, 'a');
  return {"the\ncat\nsat\xFFthe\ncat\ndog\n\nthe cat",
          "exactly 24 bytes of word\nexactly 24 bytes of wordx\nshort\n\xFFshort\nexactly 24 bytes of word\nexactly 24 bytes of wor?",
          long_word + "b\n" + long_word + "c\n\xFF" + long_word + "b\n" + long_word + "d\n" + long_word,
          "twice\n\ntwice\n<unk>\n<s>\n\u0915\u092E\u0932\n\xFF<mask>\n\u0915\u092E\u0932\ntwice\n",
          "-\na\nb\nc\nd\ne\xFF" "a\nb\nf"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto [rows, asked] = cut(text_of(data, size), '\xFF');
  auto symbols = strings_of(rows);
  if (symbols.empty() || symbols.front() != "-") {
    symbols.insert(symbols.begin(), {"<s>", "<pad>", "</s>", "<unk>", "<mask>"});
  }
  std::map<std::string, std::uint32_t, std::less<>> expected;
  for (std::size_t id = 0; id < symbols.size(); ++id) expected[symbols[id]] = static_cast<std::uint32_t>(id);
  expected[""] = xlm_ds::kEos;

  auto words = strings_of(asked);
  words.insert(words.end(), symbols.begin(), symbols.end());
  const bool accepted = accepts([&] {
    const xlm_ds::Dictionary dictionary(symbols);
    require(dictionary.size() == symbols.size(), "every row has an id");
    for (std::span<const std::string> rest = words; !rest.empty();) {
      const auto block = rest.first(std::min(rest.size(), xlm_ds::kWordsPerBlock));
      const auto answer = answer_of(dictionary, block);
      std::vector<std::uint32_t> unknown;
      for (std::size_t i = 0; i < block.size(); ++i) {
        const auto found = expected.find(block[i]);
        const bool known = found != expected.end();
        require(answer.ids[i] == (known ? found->second : static_cast<std::uint32_t>(xlm_ds::kUnk)), "a word's id is that of its last row");
        if (!known) unknown.push_back(static_cast<std::uint32_t>(i));
      }
      require(answer.unknown == unknown, "unknown words are told");
      rest = rest.subspan(block.size());
    }
  });
  const bool good = symbols.size() >= xlm_ds::kSpecials && std::all_of(symbols.begin(), symbols.end(), is_utf8);
  require(accepted == good, "a dictionary has the special symbols at least, and all are UTF-8");
  count(accepted);
  return 0;
}
