// Any codes file and vocabulary, and what they do to any text. An input is the codes, 0xFF, the vocabulary, 0xFF, and the
// text; without a vocabulary merges are not limited.
#include "xlm_ds/bpe.hpp"

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bpe_twin.hpp"
#include "files.hpp"
#include "fuzz.hpp"

using namespace xlm_ds_fuzz;

std::vector<std::string> xlm_ds_fuzz::seeds() {
  const std::string codes =
      "e s 9\nes t</w> 9\nl o 7\nw est</w> 6\ne west</w> 6\nn ewest</w> 6\nlo w</w> 5\nw i 3\nd est</w> 3\nwi dest</w> 3\n";
  const std::string vocabulary = "est 1\nl@@ 1\no@@ 1\nw@@ 1\nw 1\ne@@ 1\nr 1\nnewest 1\n";
  const std::string chain = "a a 9\naa aa 8\naaaa aaaa 7\naaaaaaaa a</w> 6\nb a 5\nba ba 4\n";
  return {codes + "\xFF\xFFlow  lower\n newest widest ",
          codes + "\xFF" + vocabulary + "\xFFlow lower widest\nlowest",
          "ab a 2\na b 1\n\xFF\xFF" "ababx " + std::string(80, 'a') + std::string(70, 'b'),
          chain + "\xFF" "aa@@ 3\naaaa@@ 1\nba 2\n\xFF" + std::string(150, 'a') + " babababa bab",
          "a< /w> 1\n\xFFx 1\n\xFF" "a a</w> a</w>b",
          "\u0915 \u093F 4\n\u0928 \u093F</w> 1\n\xFF\u0928\u093F 3\n\xFF\u0915\u093F\u0928\u093F \u0928\u093F"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const MemoryFile codes_file("codes"), vocabulary_file("vocabulary");
  const auto [codes, rest] = cut(text_of(data, size), '\xFF');
  const auto [vocabulary, last] = cut(rest, '\xFF');
  const std::vector<char> exact(last.begin(), last.end());
  const std::string_view text(exact.data(), exact.size());
  const auto twin = BpeTwin::of(codes, vocabulary);
  const auto codes_path = codes_file.with(codes);
  std::optional<std::filesystem::path> vocabulary_path;
  if (!vocabulary.empty()) vocabulary_path = vocabulary_file.with(vocabulary);
  const bool accepted = accepts([&] {
    const xlm_ds::Bpe bpe(codes_path, vocabulary_path);
    require(twin.has_value(), "a codes file and a vocabulary are refused if a line is wrong");
    require(bpe.apply(text) == twin->apply(text), "words are split as fastBPE describes it");
  });
  require(accepted == twin.has_value(), "what has no wrong line is taken");
  count(accepted);
  return 0;
}
