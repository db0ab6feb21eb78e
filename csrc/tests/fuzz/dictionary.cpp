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

namespace {

using namespace xlm_ds_fuzz;

std::vector<std::string> lines_of(std::string_view text) {
  std::vector<std::string> lines;
  while (!text.empty()) {
    const auto [line, rest] = cut(text, '\n');
    lines.emplace_back(line);
    text = rest;
  }
  return lines;
}

/// What the core says; every word is in memory that ends kReadableAfter bytes after the last.
std::vector<std::uint32_t> ids_of(const xlm_ds::Dictionary& dictionary, std::span<const std::string> words) {
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
  std::vector<std::uint32_t> ids(words.size());
  dictionary.look_up(views, ids);
  return ids;
}

}  // namespace

std::vector<std::string> xlm_ds_fuzz::seeds() {
  return {"the\ncat\nsat\xFFthe\ncat\ndog\n\nthe cat",
          "exactly16bytes!!\nexactly16bytes!!x\nexactly17bytes!!!\nshort\n\xFFshort\nexactly16bytes!!\nexactly17bytes!!?",
          "twice\n\ntwice\n<unk>\n<s>\n\u0915\u092E\u0932\n\xFF<mask>\n\u0915\u092E\u0932\ntwice\n",
          "-\na\nb\nc\nd\ne\xFF" "a\nb\nf"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto [rows, asked] = cut(text_of(data, size), '\xFF');
  auto symbols = lines_of(rows);
  if (symbols.empty() || symbols.front() != "-") {
    symbols.insert(symbols.begin(), {"<s>", "<pad>", "</s>", "<unk>", "<mask>"});
  }
  std::map<std::string, std::uint32_t, std::less<>> expected;
  for (std::size_t id = 0; id < symbols.size(); ++id) expected[symbols[id]] = static_cast<std::uint32_t>(id);
  expected[""] = xlm_ds::kEos;

  auto words = lines_of(asked);
  words.insert(words.end(), symbols.begin(), symbols.end());
  const bool accepted = accepts([&] {
    const xlm_ds::Dictionary dictionary(symbols);
    require(dictionary.size() == symbols.size(), "every row has an id");
    for (std::span<const std::string> rest = words; !rest.empty();) {
      const auto block = rest.first(std::min(rest.size(), xlm_ds::kWordsPerBlock));
      const auto ids = ids_of(dictionary, block);
      for (std::size_t i = 0; i < block.size(); ++i) {
        const auto found = expected.find(block[i]);
        const auto id = found == expected.end() ? static_cast<std::uint32_t>(xlm_ds::kUnk) : found->second;
        require(ids[i] == id, "a word's id is that of its last row");
      }
      rest = rest.subspan(block.size());
    }
  });
  require(accepted == (symbols.size() >= xlm_ds::kSpecials), "a dictionary has the special symbols at least");
  count(accepted);
  return 0;
}
