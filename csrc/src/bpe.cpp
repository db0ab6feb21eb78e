#include "xlm_ds/bpe.hpp"

#include <algorithm>
#include <exception>
#include <functional>
#include <mutex>
#include <numeric>
#include <queue>
#include <span>
#include <system_error>
#include <thread>
#include <utility>

#include "xlm_ds/bpe_splitter.hpp"
#include "xlm_ds/bpe_words.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/file.hpp"
#include "xlm_ds/mapped_file.hpp"
#include "xlm_ds/word_counts.hpp"

namespace xlm_ds {
namespace {

constexpr std::string_view kWordEnd = "</w>";
constexpr std::string_view kPieceMark = "@@";
constexpr std::string_view kPieceEnd = "@@ ";
constexpr std::size_t kChunkBytes = std::size_t{1} << 22;  // of text that a thread takes at a time
constexpr std::size_t kPackable = 8;  // bytes of a character that pack() takes
// Characters from which merge_long is used. Measured on words of equal length that are never seen again (4,000 merges,
// 3 MB, 2026-11): at 32 characters merge_short takes 0.87 of merge_long's time, at 64 0.93, at 128 1.3, at 256 1.6.
constexpr std::size_t kLongWord = 64;

std::string_view text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

/// The first place at or after `at` where `text` may be cut: a separator, or the end.
std::size_t cut_after(std::string_view text, std::size_t at) {
  return static_cast<std::size_t>(word_end(text.data() + at, text.data() + text.size()) - text.data());
}

std::size_t character_end(std::string_view word, std::size_t at) {
  do ++at;
  while (at < word.size() && (static_cast<unsigned char>(word[at]) & 0xC0) == 0x80);
  return at;
}

bool is_packable_character(std::string_view bytes) {
  return bytes.size() <= kPackable && character_end(bytes, 0) == bytes.size();
}

/// Different characters give different numbers: none but the first byte can be zero.
std::uint64_t pack(std::string_view character) {
  std::uint64_t packed = 0;
  for (std::size_t i = 0; i < character.size(); ++i) {
    packed |= std::uint64_t{static_cast<unsigned char>(character[i])} << (8 * i);
  }
  return packed;
}

std::string_view without_word_end(std::string_view symbol) {
  return symbol.ends_with(kWordEnd) ? symbol.substr(0, symbol.size() - kWordEnd.size()) : symbol;
}

[[noreturn]] void refuse(const std::filesystem::path& path, std::size_t line, const std::string& what) {
  throw InputError(path.string() + ":" + std::to_string(line) + ": " + what);
}

/// Calls take(line, number) for every line, numbered from 1; one without a line end at the end of the file counts.
template <typename Take>
void for_each_line(std::string_view text, Take take) {
  std::size_t number = 0;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    take(text.substr(0, end), ++number);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
}

std::vector<std::string_view> fields_of(std::string_view line) {
  std::vector<std::string_view> fields;
  for (std::size_t end = line.find(' '); end != std::string_view::npos; end = line.find(' ')) {
    fields.push_back(line.substr(0, end));
    line.remove_prefix(end + 1);
  }
  fields.push_back(line);
  return fields;
}

/// Runs work(0) … work(count - 1) in that many threads, the last in the caller's; rethrows the first exception.
template <typename Work>
void run_in_threads(std::size_t count, Work work) {
  std::vector<std::exception_ptr> errors(count);
  const auto guarded = [&](std::size_t i) {
    try {
      work(i);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 0; i + 1 < count; ++i) threads.emplace_back(guarded, i);
    guarded(count - 1);
  }
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace

std::uint32_t Bpe::NumberTable::insert(std::uint64_t key, std::uint32_t value) {
  if (2 * (used_ + 1) > slots_.size()) grow();
  Slot& slot = slots_[slot_of(key)];
  if (slot.value == kNone) {
    slot = {key, value};
    ++used_;
  }
  return slot.value;
}

void Bpe::NumberTable::grow() {
  std::vector<Slot> smaller(2 * slots_.size());
  slots_.swap(smaller);
  for (const Slot& slot : smaller) {
    if (slot.value != kNone) slots_[slot_of(slot.key)] = slot;
  }
}

Bpe::Bpe(const std::filesystem::path& codes_path, const std::optional<std::filesystem::path>& vocabulary_path) {
  read_codes(codes_path);
  if (vocabulary_path) read_vocabulary(*vocabulary_path);
}

void Bpe::read_codes(const std::filesystem::path& path) {
  const MappedFile file(path);
  for_each_line(text_of(file), [&](std::string_view line, std::size_t number) {
    if (line.starts_with("#version")) {
      refuse(path, number, "subword-nmt's header found, expected `left right count`; remove it and add a count to every line");
    }
    const auto fields = fields_of(line);
    if (fields.size() != 3 || fields[0].empty() || fields[1].empty()) {
      refuse(path, number, "found " + std::to_string(fields.size()) +
                               " fields, expected `left right count` with single blanks between; is this a codes file?");
    }
    add_merge(fields[0], fields[1], path);
  });
  if (merges_.empty()) throw InputError(path.string() + ": no merges found, expected lines `left right count`");
}

void Bpe::add_merge(std::string_view left, std::string_view right, const std::filesystem::path& path) {
  // The line number, counted from 1, is the rank + 1: every line of the file before this one was a merge.
  const auto rank = narrow_or_throw<Rank>(merges_.size(), "merges in a codes file");
  const Merge merge{add_symbol(left), add_symbol(right), add_symbol(std::string(left).append(right))};
  const char* const cure = "; learnbpe writes such lines once it has run out of pairs: keep those before this one";
  const Rank same_pair = ranks_.insert(std::uint64_t{merge.left} << 32 | merge.right, rank);
  if (same_pair != rank) refuse(path, rank + 1, "same pair as line " + std::to_string(same_pair + 1) + cure);
  Rank& made_by = symbols_[merge.merged].made_by;
  if (made_by != kNoRank) refuse(path, rank + 1, "makes the same symbol as line " + std::to_string(made_by + 1) + cure);
  made_by = rank;
  merges_.push_back(merge);
}

Bpe::SymbolId Bpe::add_symbol(std::string_view bytes) {
  const SymbolId id = symbol_bytes_.insert(bytes);
  if (id < symbols_.size()) return id;
  Symbol symbol;
  symbol.bytes = narrow_or_throw<std::uint32_t>(bytes.size(), "bytes of one symbol");
  symbol.ends_word = bytes.size() > kWordEnd.size() && bytes.ends_with(kWordEnd);
  symbols_.push_back(symbol);
  const auto packed_symbols = [this](std::string_view character) -> CharacterSymbols& {
    const auto number = characters_.insert(pack(character), static_cast<std::uint32_t>(character_symbols_.size()));
    if (number == character_symbols_.size()) character_symbols_.emplace_back();
    return character_symbols_[number];
  };
  const auto stem = without_word_end(bytes);
  if (is_packable_character(bytes)) packed_symbols(bytes).inside = id;
  if (symbol.ends_word && is_packable_character(stem)) packed_symbols(stem).last = id;
  return id;
}

void Bpe::read_vocabulary(const std::filesystem::path& path) {
  const MappedFile file(path);
  ByteTable words;
  for_each_line(text_of(file), [&](std::string_view line, std::size_t number) {
    const auto fields = fields_of(line);
    const bool counted = fields.size() == 2 && !fields[1].empty() &&
                         fields[1].find_first_not_of("0123456789") == std::string_view::npos;
    if (!counted) refuse(path, number, "expected `word count` with one blank between; is this a vocabulary file?");
    const auto same_word = words.insert(fields[0]);
    if (same_word + 1 != number) {
      refuse(path, number, "same word as line " + std::to_string(same_word + 1) + "; remove one of them");
    }
  });
  for (std::size_t i = 0; i < symbols_.size(); ++i) {
    const auto bytes = symbol_bytes_[static_cast<SymbolId>(i)];
    symbols_[i].allowed_inside = words.find(std::string(bytes).append(kPieceMark)) != ByteTable::kNone;
    symbols_[i].allowed_last = symbols_[i].ends_word && words.find(without_word_end(bytes)) != ByteTable::kNone;
  }
  has_vocabulary_ = words.size() > 0;  // fastBPE too takes an empty vocabulary for none
}

std::string Bpe::apply(std::string_view text) const { return std::string(BpeSplitter(*this).apply(text)); }

void Bpe::split(std::string_view word, Scratch& scratch, std::string& result) const {
  auto pieces = characters_of(word, scratch);
  pieces = pieces.size() < kLongWord ? merge_short(pieces) : merge_long(pieces);
  if (has_vocabulary_) pieces = within_vocabulary(pieces, scratch);
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const bool last = i + 1 == pieces.size();
    const std::size_t end = last ? word.size() : pieces[i + 1].begin;
    result.append(word, pieces[i].begin, end - pieces[i].begin);
    if (!last) result += kPieceEnd;
  }
}

Bpe::CharacterSymbols Bpe::symbols_of(std::string_view character) const {
  if (character.size() > kPackable) {  // not UTF-8
    return {symbol_bytes_.find(character), symbol_bytes_.find(std::string(character).append(kWordEnd))};
  }
  const auto number = characters_.find(pack(character));
  return number == NumberTable::kNone ? CharacterSymbols{} : character_symbols_[number];
}

Bpe::Pieces Bpe::characters_of(std::string_view word, Scratch& scratch) const {
  auto& pieces = scratch.pieces_;
  if (pieces.size() < word.size()) pieces.resize(word.size());
  std::size_t count = 0;
  for (std::size_t begin = 0, end = 0; begin < word.size(); begin = end) {
    end = character_end(word, begin);
    const auto symbols = symbols_of(word.substr(begin, end - begin));
    pieces[count++] = {begin, end == word.size() ? symbols.last : symbols.inside, kNoRank};
  }
  for (std::size_t i = 0; i + 1 < count; ++i) pieces[i].rank = rank_of(pieces[i].symbol, pieces[i + 1].symbol);
  return Pieces(pieces).first(count);
}

/// The best merge there is, at all its places from left to right; again until there is none. O(n) per round.
Bpe::Pieces Bpe::merge_short(Pieces pieces) const {
  const auto better = [](const Piece& a, const Piece& b) { return a.rank < b.rank; };
  for (;;) {
    const Rank best = std::min_element(pieces.begin(), pieces.end(), better)->rank;
    if (best == kNoRank) return pieces;
    pieces = merge_everywhere(pieces, best);
  }
}

Bpe::Pieces Bpe::merge_everywhere(Pieces pieces, Rank rank) const {
  std::size_t kept = 0;
  bool merged_before = false;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    Piece piece = pieces[i];
    const bool merges = piece.rank == rank;
    if (merges) {
      piece.symbol = merges_[rank].merged;
      ++i;
    }
    if (kept > 0 && (merges || merged_before)) {
      pieces[kept - 1].rank = rank_of(pieces[kept - 1].symbol, piece.symbol);
    }
    pieces[kept++] = piece;
    merged_before = merges;
  }
  pieces[kept - 1].rank = kNoRank;
  return pieces.first(kept);
}

/// The same in O(n log n) for a word of n characters: a queue of the merges there are, the pieces chained. A round takes
/// one rank from the queue; the pairs it brings about wait until it is over, as some could have a lower rank.
Bpe::Pieces Bpe::merge_long(Pieces pieces) const {
  const std::size_t count = pieces.size();
  std::vector<std::size_t> next(count), previous(count);
  std::priority_queue<std::pair<Rank, std::size_t>, std::vector<std::pair<Rank, std::size_t>>, std::greater<>> queue;
  for (std::size_t i = 0; i < count; ++i) {
    next[i] = i + 1;
    previous[i] = i == 0 ? count : i - 1;
    if (pieces[i].rank != kNoRank) queue.emplace(pieces[i].rank, i);
  }
  const auto rank_again = [&](std::size_t at) {
    if (at == count) return;
    pieces[at].rank = next[at] == count ? kNoRank : rank_of(pieces[at].symbol, pieces[next[at]].symbol);
    if (pieces[at].rank != kNoRank) queue.emplace(pieces[at].rank, at);
  };
  std::vector<std::size_t> merged;
  while (!queue.empty()) {
    const Rank best = queue.top().first;
    for (merged.clear(); !queue.empty() && queue.top().first == best; queue.pop()) {
      const std::size_t at = queue.top().second;
      if (pieces[at].rank != best) continue;  // one of the two has been merged since
      const std::size_t right = next[at];
      pieces[at].symbol = merges_[best].merged;
      pieces[at].rank = pieces[right].rank = kNoRank;
      next[at] = next[right];
      if (next[at] != count) previous[next[at]] = at;
      merged.push_back(at);
    }
    for (const std::size_t at : merged) {
      rank_again(previous[at]);
      rank_again(at);
    }
  }
  std::size_t kept = 0;
  for (std::size_t at = 0; at != count; at = next[at]) pieces[kept++] = pieces[at];
  return pieces.first(kept);
}

/// Undoes merges until every piece may stand. The pieces still to be looked at form a stack with the leftmost on top, so
/// the one taken from it is the word's last when it leaves the stack empty.
Bpe::Pieces Bpe::within_vocabulary(Pieces pieces, Scratch& scratch) const {
  auto& kept = scratch.kept_;
  auto& open = scratch.open_;
  kept.clear();
  open.assign(pieces.rbegin(), pieces.rend());
  while (!open.empty()) {
    const Piece piece = open.back();
    open.pop_back();
    if (may_stand(piece.symbol, open.empty())) {
      kept.push_back(piece);
      continue;
    }
    const Merge& merge = merges_[symbols_[piece.symbol].made_by];
    open.push_back({piece.begin + symbols_[merge.left].bytes, merge.right, kNoRank});
    open.push_back({piece.begin, merge.left, kNoRank});
  }
  return kept;
}

bool Bpe::may_stand(SymbolId id, bool last) const {
  if (id == kNoSymbol) return true;
  const Symbol& symbol = symbols_[id];
  if (symbol.made_by == kNoRank || (last ? symbol.allowed_last : symbol.allowed_inside)) return true;
  // Codes learnt from text that has `</w>` in it can make a word's end of `<` and `/w>`: such a merge cannot be undone.
  return last && !symbols_[merges_[symbol.made_by].right].ends_word;
}

void Bpe::apply_file(const std::filesystem::path& input_path, const std::filesystem::path& output_path,
                     std::size_t threads) const {
  const MappedFile input(input_path);
  std::error_code not_there_yet;
  if (std::filesystem::equivalent(input_path, output_path, not_there_yet)) {
    throw InputError(output_path.string() + ": is the input too; give another name for the output");
  }
  const auto text = text_of(input);
  const OutputFile output(output_path);
  std::uint64_t written = 0;
  std::vector<BpeSplitter> splitters(std::max<std::size_t>(threads, 1), BpeSplitter(*this));
  std::vector<std::string_view> results(splitters.size());
  for (std::size_t begin = 0; begin < text.size();) {
    std::vector<std::string_view> chunks;
    while (chunks.size() < splitters.size() && begin < text.size()) {
      const std::size_t end = cut_after(text, begin + std::min(kChunkBytes, text.size() - begin));
      chunks.push_back(text.substr(begin, end - begin));
      begin = end;
    }
    run_in_threads(chunks.size(), [&](std::size_t i) { results[i] = splitters[i].apply(chunks[i]); });
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      output.write_at(written, std::as_bytes(std::span(results[i])));
      written += results[i].size();
    }
  }
}

namespace {

void count_words_of(std::string_view text, WordCounts& counts) {
  const char* const end = text.data() + text.size();
  for (const char* at = word_begin(text.data(), end); at != end;) {
    // fastBPE loses a last word that no line end follows; here it counts.
    const char* const begin = std::exchange(at, word_end(at, end));
    counts.add({begin, at});
    at = word_begin(at, end);
  }
}

/// Lines `word count`, most frequent first, equal counts in the order of their bytes.
std::string lines_of(const WordCounts& counts) {
  std::vector<WordCounts::Number> order(counts.size());
  std::iota(order.begin(), order.end(), WordCounts::Number{0});
  std::sort(order.begin(), order.end(), [&](auto a, auto b) {
    return counts.count(a) != counts.count(b) ? counts.count(a) > counts.count(b) : counts.word(a) < counts.word(b);
  });
  std::string lines;
  for (const auto number : order) {
    lines.append(counts.word(number)).append(1, ' ').append(std::to_string(counts.count(number))).append(1, '\n');
  }
  return lines;
}

}  // namespace

std::size_t count_words(const std::vector<std::filesystem::path>& paths, const std::filesystem::path& output_path,
                        std::size_t threads) {
  std::vector<WordCounts> counts(std::max<std::size_t>(threads, 1));
  for (const auto& path : paths) {
    const MappedFile file(path);
    const auto text = text_of(file);
    std::mutex mutex;
    std::size_t taken = 0;
    const auto next_chunk = [&] {
      const std::lock_guard lock(mutex);
      const std::size_t begin = std::exchange(taken, cut_after(text, taken + std::min(kChunkBytes, text.size() - taken)));
      return text.substr(begin, taken - begin);
    };
    run_in_threads(counts.size(), [&](std::size_t i) {
      for (auto chunk = next_chunk(); !chunk.empty(); chunk = next_chunk()) count_words_of(chunk, counts[i]);
    });
  }
  for (std::size_t i = 1; i < counts.size(); ++i) counts.front().add(std::exchange(counts[i], {}));
  const std::string lines = lines_of(counts.front());
  OutputFile(output_path).write_at(0, std::as_bytes(std::span(lines)));
  return counts.front().size();
}

}  // namespace xlm_ds
