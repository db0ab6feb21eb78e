// Text to ids in one pass, and to pieces, with what has been seen before in the cache. An input is the codes, 0xFF, the
// vocabulary, 0xFF, the dictionary's symbols but for the special ones, a line each, 0xFF, and the text; of the last two
// what is before the first byte that is not UTF-8. Without a vocabulary merges are not limited.
#include "xlm_ds/bpe_encoder.hpp"
#include "xlm_ds/bpe_splitter.hpp"

#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bpe_twin.hpp"
#include "files.hpp"
#include "fuzz.hpp"
#include "words_twin.hpp"

namespace {

using namespace xlm_ds_fuzz;
using Codes = std::vector<std::uint32_t>;

std::string_view valid_part(std::string_view text) { return text.substr(0, split_words(text).valid); }

std::vector<std::string> dictionary_of(std::string_view symbols) {
  std::vector<std::string> rows{"<s>", "<pad>", "</s>", "<unk>", "<mask>"};
  for (const auto line : lines_of(valid_part(symbols))) rows.emplace_back(line);
  return rows;
}

/// Of a word, the id of its last row.
Codes codes_of(const SplitText& pieces, const std::vector<std::string>& symbols) {
  std::map<std::string_view, std::uint32_t> rows;
  for (std::size_t id = 0; id < symbols.size(); ++id) rows[symbols[id]] = static_cast<std::uint32_t>(id);
  Codes codes;
  for (const auto piece : pieces.words) {
    const auto found = rows.find(piece);
    if (piece.empty()) {
      codes.push_back(xlm_ds::BpeEncoder::kLineEnd);
    } else {
      codes.push_back(found == rows.end() ? xlm_ds::BpeEncoder::kUnknown : found->second);
    }
  }
  return codes;
}

/// Cut where a reader of files may cut it.
std::pair<std::string_view, std::string_view> halves(std::string_view text) {
  const std::size_t at = text.find_first_of(" \n", text.size() / 2);
  return {text.substr(0, at == std::string_view::npos ? at : at + 1), at == std::string_view::npos ? "" : text.substr(at + 1)};
}

/// use(text), which is in memory of just its size, so that reading on is noticed.
template <typename Use>
void with_exact(std::string_view text, Use use) {
  const std::vector<char> exact(text.begin(), text.end());
  use(std::string_view(exact.data(), exact.size()));
}

}  // namespace

std::vector<std::string> xlm_ds_fuzz::seeds() {
  const std::string codes =
      "e s 9\nes t</w> 9\nl o 7\nw est</w> 6\ne west</w> 6\nn ewest</w> 6\nlo w</w> 5\nw i 3\nd est</w> 3\nwi dest</w> 3\n";
  const std::string vocabulary = "est 1\nl@@ 1\no@@ 1\nw@@ 1\nw 1\ne@@ 1\nr 1\nnewest 1\n";
  std::string uncached;  // for its bytes, of which a character has as many as it can
  while (uncached.size() <= 256) uncached += "\U0001F600";
  return {codes + "\xFF\xFFlow\nlo@@\nr\nw@@\xFFlow  lower\n newest widest low\r\nlow\r \n\r",
          codes + "\xFF" + vocabulary + "\xFF" "est\nl@@\no@@\nw\xFFlow lower widest\nlowest low\n\nlower",
          "a a 9\naa aa 8\naaaa aaaa 7\naaaaaaaa a</w> 6\nb a 5\n\xFF" "aa@@ 3\naaaa@@ 1\n\xFF" "aa@@\nb\n\xFF" + std::string(70, 'a') + "b " + uncached,
          "\t \t 4\n\t \t</w> 3\n\xFF\xFFlow\n@@\xFF\t\t\tlow\t \t\n\t\t low\u00A0\t\u2028x\n",
          "< u 9\nn k 8\nnk ></w> 7\n<u nk></w> 6\n\xFF\xFF<u@@\xFF<unk> <un </s> <s>\n",
          "\xE0 \xA4\x95 1\n\xE0\xA4\x95 a</w> 1\n\xFF\u0915@@ 1\n\u0915" "a 1\n\xFF\u0915@@\n\u0915\xFF\u0915" "a \u0915\u0915"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const MemoryFile codes_file("codes"), vocabulary_file("vocabulary");
  const auto [codes, after_codes] = cut(text_of(data, size), '\xFF');
  const auto [vocabulary, after_vocabulary] = cut(after_codes, '\xFF');
  const auto [rows, last] = cut(after_vocabulary, '\xFF');
  const auto symbols = dictionary_of(rows);
  const auto text = valid_part(last);
  const auto [left, right] = halves(text);

  const auto twin = BpeTwin::of(codes, vocabulary);
  const std::string pieces = twin ? twin->apply(text) : "";
  const auto words = split_words(pieces);
  const bool good = twin && words.valid == pieces.size();
  const auto codes_path = codes_file.with(codes);
  std::optional<std::filesystem::path> vocabulary_path;
  if (!vocabulary.empty()) vocabulary_path = vocabulary_file.with(vocabulary);
  const bool accepted = accepts([&] {
    const xlm_ds::Bpe bpe(codes_path, vocabulary_path);
    require(twin.has_value(), "a codes file and a vocabulary are refused if a line is wrong");
    const xlm_ds::Dictionary dictionary(symbols);
    xlm_ds::BpeSplitter splitter(bpe);
    xlm_ds::BpeEncoder encoder(bpe, dictionary);
    const Codes expected = codes_of(words, symbols);
    std::string split;
    Codes encoded;
    for (const auto part : {left, right}) {
      with_exact(part, [&](auto exact) { split += splitter.apply(exact); });
      with_exact(part, [&](auto exact) {
        const auto made = encoder.encode(exact);
        encoded.insert(encoded.end(), made.begin(), made.end());
      });
    }
    require(split == pieces, "words are split as fastBPE describes it");
    require(encoded == expected, "the ids are those of the pieces");
    with_exact(text, [&](auto exact) {
      require(splitter.apply(exact) == pieces, "words seen before are split alike");
      const auto again = encoder.encode(exact);
      require(Codes(again.begin(), again.end()) == expected, "words seen before have the same ids");
    });
  });
  require(accepted == good, "what has no wrong line is taken, unless it splits a character");
  count(accepted);
  return 0;
}
