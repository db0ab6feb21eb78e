// Any codes file and vocabulary, and what they do to any text. An input is the codes, 0xFF, the vocabulary, 0xFF, and the
// text; without a vocabulary merges are not limited.
#include "xlm_ds/bpe.hpp"

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <system_error>
#include <unistd.h>
#include <utility>
#include <vector>

#include "fuzz.hpp"

namespace {

using namespace xlm_ds_fuzz;
using Pieces = std::vector<std::string>;

constexpr std::string_view kWordEnd = "</w>";

/// A file in memory, as the core reads files.
class MemoryFile {
 public:
  explicit MemoryFile(const char* name) : descriptor_(::memfd_create(name, MFD_CLOEXEC)) {
    require(descriptor_ >= 0, "there is room for a file in memory");
  }
  std::filesystem::path with(std::string_view content) const {
    require(::ftruncate(descriptor_, 0) == 0, "the file can be emptied");
    const auto written = ::pwrite(descriptor_, content.data(), content.size(), 0);
    require(written == static_cast<ssize_t>(content.size()), "the file can be written");
    return "/proc/self/fd/" + std::to_string(descriptor_);
  }

 private:
  int descriptor_;
};

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (std::size_t end = text.find(separator); end != std::string_view::npos; end = text.find(separator)) {
    parts.push_back(text.substr(0, end));
    text.remove_prefix(end + 1);
  }
  parts.push_back(text);
  return parts;
}

std::vector<std::string_view> lines_of(std::string_view text) {
  auto lines = split(text, '\n');
  if (lines.back().empty()) lines.pop_back();
  return lines;
}

/// fastBPE by its description: every step looks at everything again. Views the codes and the vocabulary.
class Twin {
 public:
  static std::optional<Twin> of(std::string_view codes, std::string_view vocabulary) {
    Twin twin;
    for (const auto line : lines_of(codes)) {
      const auto fields = split(line, ' ');
      if (line.starts_with("#version") || fields.size() != 3 || fields[0].empty() || fields[1].empty()) return std::nullopt;
      const Pair pair(fields[0], fields[1]);
      const bool new_pair = twin.ranks_.emplace(pair, twin.ranks_.size()).second;
      const bool new_symbol = twin.parts_.emplace(std::string(fields[0]).append(fields[1]), pair).second;
      if (!new_pair || !new_symbol) return std::nullopt;
    }
    for (const auto line : lines_of(vocabulary)) {
      const auto fields = split(line, ' ');
      if (fields.size() != 2 || fields[1].empty() || !std::all_of(fields[1].begin(), fields[1].end(), is_digit)) return std::nullopt;
      if (!twin.vocabulary_.insert(fields[0]).second) return std::nullopt;
    }
    if (twin.ranks_.empty()) return std::nullopt;
    return twin;
  }

  std::string apply(std::string_view text) const {
    std::string result;
    std::size_t begin = 0;
    for (std::size_t at = 0; at <= text.size(); ++at) {
      if (at != text.size() && text[at] != ' ' && text[at] != '\n') continue;
      if (at != begin) result += apply_to_word(text.substr(begin, at - begin));
      if (at != text.size()) result += text[at];
      begin = at + 1;
    }
    return result;
  }

 private:
  using Pair = std::pair<std::string_view, std::string_view>;

  static bool is_digit(char c) { return c >= '0' && c <= '9'; }

  std::string apply_to_word(std::string_view word) const {
    Pieces pieces;
    for (const char c : word) {
      if (pieces.empty() || (static_cast<unsigned char>(c) & 0xC0) != 0x80) pieces.emplace_back();
      pieces.back() += c;
    }
    pieces.back() += kWordEnd;
    while (const auto* best = best_pair(pieces)) pieces = merged(pieces, *best);
    if (!vocabulary_.empty()) {
      Pieces allowed;
      for (std::size_t i = 0; i < pieces.size(); ++i) undo(pieces[i], i + 1 == pieces.size(), allowed);
      pieces = allowed;
    }
    std::string joined, shown;
    for (const auto& piece : pieces) {
      joined += piece;
      shown += piece + "@@ ";
    }
    require(joined == std::string(word) + std::string(kWordEnd), "the pieces together are the word");
    return shown.substr(0, shown.size() - kWordEnd.size() - 3);
  }

  const Pair* best_pair(const Pieces& pieces) const {
    auto best = ranks_.end();
    for (std::size_t i = 0; i + 1 < pieces.size(); ++i) {
      const auto found = ranks_.find({pieces[i], pieces[i + 1]});
      if (found != ranks_.end() && (best == ranks_.end() || found->second < best->second)) best = found;
    }
    return best == ranks_.end() ? nullptr : &best->first;
  }

  static Pieces merged(const Pieces& pieces, const Pair& pair) {
    Pieces result;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const bool merges = i + 1 < pieces.size() && pieces[i] == pair.first && pieces[i + 1] == pair.second;
      result.push_back(merges ? pieces[i] + pieces[i + 1] : pieces[i]);
      if (merges) ++i;
    }
    return result;
  }

  void undo(const std::string& piece, bool last, Pieces& allowed) const {
    const auto parts = parts_.find(piece);
    const auto shown = last ? piece.substr(0, piece.size() - kWordEnd.size()) : piece + "@@";
    // A right part that is no more than `</w>`, or part of one, is not a piece of the word: such a merge stays.
    const auto is_last = [](std::string_view right) { return right.size() > kWordEnd.size() && right.ends_with(kWordEnd); };
    if (parts == parts_.end() || vocabulary_.contains(shown) || (last && !is_last(parts->second.second))) {
      allowed.push_back(piece);
      return;
    }
    undo(std::string(parts->second.first), false, allowed);
    undo(std::string(parts->second.second), last, allowed);
  }

  std::map<Pair, std::size_t> ranks_;
  std::map<std::string, Pair> parts_;
  std::set<std::string_view> vocabulary_;
};

}  // namespace

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
  const auto twin = Twin::of(codes, vocabulary);
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
