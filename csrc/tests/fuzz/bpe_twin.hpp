#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fuzz.hpp"

/// fastBPE by its description, to compare the core's with: every step looks at everything again.
namespace xlm_ds_fuzz {

/// Views the codes and the vocabulary.
class BpeTwin {
 public:
  /// None if a line of either is wrong.
  static std::optional<BpeTwin> of(std::string_view codes, std::string_view vocabulary) {
    BpeTwin twin;
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

  [[nodiscard]] std::string apply(std::string_view text) const {
    std::string result;
    std::size_t begin = 0;
    for (std::size_t at = 0; at <= text.size(); ++at) {
      if (at != text.size() && text[at] != ' ' && text[at] != '\n') continue;
      if (at != begin) append_pieces(text.substr(begin, at - begin), result);
      if (at != text.size()) result += text[at];
      begin = at + 1;
    }
    return result;
  }

 private:
  using Pair = std::pair<std::string_view, std::string_view>;
  using Pieces = std::vector<std::string_view>;  // one after another in a word and its kWordEnd

  static constexpr std::string_view kWordEnd = "</w>";

  static bool is_digit(char c) { return c >= '0' && c <= '9'; }

  void append_pieces(std::string_view word, std::string& result) const {
    const std::string whole = std::string(word).append(kWordEnd);
    Pieces pieces;
    for (std::size_t at = 0; at < word.size(); ++at) {
      if (at != 0 && (static_cast<unsigned char>(word[at]) & 0xC0) == 0x80) continue;
      pieces.push_back(std::string_view(whole).substr(at));
      if (at != 0) end_before(pieces[pieces.size() - 2], pieces.back());
    }
    while (const auto* best = best_pair(pieces)) pieces = merged(pieces, *best);
    if (!vocabulary_.empty()) {
      Pieces allowed;
      for (const auto piece : pieces) undo(piece, piece.data() == pieces.back().data(), allowed);
      pieces = allowed;
    }
    std::size_t bytes = 0;
    for (const auto piece : pieces) {
      bytes += piece.size();
      result.append(piece).append("@@ ");
    }
    require(bytes == whole.size(), "the pieces together are the word");
    result.resize(result.size() - kWordEnd.size() - 3);
  }

  static void end_before(std::string_view& piece, std::string_view next) {
    piece = piece.substr(0, static_cast<std::size_t>(next.data() - piece.data()));
  }

  [[nodiscard]] const Pair* best_pair(const Pieces& pieces) const {
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
      result.push_back(merges ? joined(pieces[i], pieces[i + 1]) : pieces[i]);
      if (merges) ++i;
    }
    return result;
  }

  static std::string_view joined(std::string_view left, std::string_view right) {
    return {left.data(), left.size() + right.size()};
  }

  void undo(std::string_view piece, bool last, Pieces& allowed) const {
    const auto parts = parts_.find(piece);
    const auto shown = last ? std::string(piece.substr(0, piece.size() - kWordEnd.size())) : std::string(piece).append("@@");
    // A right part that is no more than `</w>`, or part of one, is not a piece of the word: such a merge stays.
    const auto is_last = [](std::string_view right) { return right.size() > kWordEnd.size() && right.ends_with(kWordEnd); };
    if (parts == parts_.end() || vocabulary_.contains(shown) || (last && !is_last(parts->second.second))) {
      allowed.push_back(piece);
      return;
    }
    const std::size_t left = parts->second.first.size();
    undo(piece.substr(0, left), false, allowed);
    undo(piece.substr(left), last, allowed);
  }

  std::map<Pair, std::size_t> ranks_;
  std::map<std::string, Pair, std::less<>> parts_;
  std::set<std::string_view> vocabulary_;
};

}  // namespace xlm_ds_fuzz
