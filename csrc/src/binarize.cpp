#include "xlm_ds/binarize.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "xlm_ds/bpe_encoder.hpp"
#include "xlm_ds/bpe_splitter.hpp"
#include "xlm_ds/chunk_reader.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/file.hpp"
#include "xlm_ds/in_order.hpp"
#include "xlm_ds/special_ids.hpp"
#include "xlm_ds/word_counts.hpp"
#include "xlm_ds/words.hpp"

namespace xlm_ds {
namespace {

/// Lines before the byte at `offset`, and its own. Reads the file again: counting lines on the way
/// would slow every good text.
std::uint64_t line_at(const std::filesystem::path& path, std::uint64_t offset) {
  const std::array file{Piece{.path = path}};
  const Progress progress;
  ChunkReader reader(file, kBinarizeChunkBytes, progress);
  std::uint64_t line = 1;
  for (Chunk chunk; reader.next(chunk) && chunk.offset < offset;) {
    line += count_line_ends(chunk.text.substr(0, offset - chunk.offset));
  }
  return line;
}

/// Refuses a part of the chunk that is not UTF-8. A symbol of the dictionary is, and so is every
/// blank: when ids are made, only unknown words need a look.
void check_utf8(const Chunk& chunk, std::string_view part) {
  const std::size_t bad = first_invalid_utf8(part);
  if (bad == part.size()) return;
  constexpr std::string_view kDigits = "0123456789abcdef";
  const auto byte = static_cast<unsigned char>(part[bad]);
  const std::uint64_t offset =
      chunk.offset + static_cast<std::size_t>(part.data() - chunk.text.data()) + bad;
  const auto& path = chunk.piece->path;
  const std::string where = path == kStandardInput
                                ? "standard input"
                                : path.string() + ", line " + std::to_string(line_at(path, offset));
  throw InputError(where + ", byte " + std::to_string(offset) + ": 0x" + kDigits[byte >> 4U] +
                   kDigits[byte & 15U] + " is not UTF-8; convert the text to UTF-8");
}

/// Calls take(words) for every block of the text's words and line ends.
template <typename Take>
void for_each_block(std::string_view text, Take take) {
  std::array<std::string_view, kWordsPerBlock> words;
  WordSplitter splitter(text);
  while (const std::size_t count = splitter.next(words)) {
    take(std::span<const std::string_view>(words).first(count));
  }
}

/// Writes id + bias as Element, little-endian.
template <typename Element, std::uint32_t bias>
void store_ids(std::span<const std::uint32_t> ids, std::byte* to) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto element = static_cast<Element>(ids[i] + bias);
    std::memcpy(to + i * sizeof(element), &element, sizeof(element));
  }
}

using StoreIds = void (*)(std::span<const std::uint32_t>, std::byte*);

StoreIds store_ids_of(IndexKind kind, Dtype dtype) {
  if (kind == IndexKind::lazy) return store_ids<std::int32_t, 1>;
  return dtype == Dtype::uint16 ? store_ids<std::uint16_t, 0> : store_ids<std::uint32_t, 0>;
}

/// What has been written so far; changed only by the chunk whose turn it is.
struct Written {
  OutputFile data;
  OutputFile line_lengths;  // native u32; in a file, as there may be more lines than memory
  std::uint64_t data_bytes = 0;
  std::uint64_t open_line_tokens = 0;  // of the line that goes on in the next chunk
  std::uint64_t lines = 0;
  std::uint64_t blank_lines = 0;
};

/// Turns chunks into ids; one per thread.
class ChunkEncoder {
 public:
  ChunkEncoder(const Dictionary& dictionary, StoreIds store_ids, std::size_t id_bytes,
               Written& written, const Bpe* bpe)
      : dictionary_(&dictionary),
        store_ids_(store_ids),
        id_bytes_(id_bytes),
        written_(&written),
        id_counts_(dictionary.size()) {
    if (bpe != nullptr) bpe_encoder_.emplace(*bpe, dictionary);
  }

  void read(const Chunk& chunk) {
    tokens_ = 0;
    line_begin_ = 0;
    line_lengths_.clear();
    if (bpe_encoder_) {
      check_utf8(chunk, chunk.text);
      add_codes(bpe_encoder_->encode(chunk.text));
    } else {
      // Every token has a byte of its own in the text, if only its line's end.
      make_room(chunk.text.size());
      for_each_block(chunk.text, [&](auto words) { encode(chunk, words); });
    }
  }

  /// Joins the chunk to those before it: its first line may have begun there.
  void in_turn() {
    data_offset_ = written_->data_bytes;
    written_->data_bytes += tokens_ * id_bytes_;
    lengths_offset_ = written_->lines * sizeof(std::uint32_t);
    if (line_lengths_.empty()) {
      written_->open_line_tokens += tokens_;
      return;
    }
    line_lengths_.front() = checked_length(written_->open_line_tokens + line_lengths_.front());
    written_->open_line_tokens = tokens_ - line_begin_;
    written_->lines += line_lengths_.size();
    written_->blank_lines += static_cast<std::uint64_t>(std::ranges::count(line_lengths_, 1U));
  }

  void after_turn() const {
    written_->data.write_at(data_offset_, std::span(bytes_).first(tokens_ * id_bytes_));
    written_->line_lengths.write_at(lengths_offset_, std::as_bytes(std::span(line_lengths_)));
  }

  void add_to(TextCounts& sum) const {
    for (std::size_t id = 0; id < id_counts_.size(); ++id) sum.by_id[id] += id_counts_[id];
    sum.unknown += unknown_;
  }

 private:
  static std::uint32_t checked_length(std::uint64_t tokens) {
    return narrow_or_throw<std::uint32_t>(tokens, "tokens in one line");
  }

  void encode(const Chunk& chunk, std::span<const std::string_view> words) {
    std::array<std::uint32_t, kWordsPerBlock> id_block;
    std::array<std::uint32_t, kWordsPerBlock> unknown_block;
    std::array<std::uint32_t, kWordsPerBlock> line_end_block;
    const auto ids = std::span(id_block).first(words.size());
    const auto unknown = std::span(unknown_block).first(words.size());
    const auto unknown_words = unknown.first(dictionary_->look_up(words, ids, unknown));
    for (const std::uint32_t place : unknown_words) check_utf8(chunk, words[place]);
    unknown_ += unknown_words.size();
    store_ids_(ids, bytes_.data() + tokens_ * id_bytes_);
    std::size_t line_ends = 0;
    for (std::size_t i = 0; i < words.size(); ++i) {
      ++id_counts_[ids[i]];
      line_end_block[line_ends] = static_cast<std::uint32_t>(i);
      line_ends += words[i].empty() ? 1 : 0;  // without a branch: lines end where nobody can foresee
    }
    for (const std::uint32_t place : std::span(line_end_block).first(line_ends)) {
      const std::uint64_t line_end = tokens_ + place + 1;
      line_lengths_.push_back(checked_length(line_end - std::exchange(line_begin_, line_end)));
    }
    tokens_ += words.size();
  }

  /// Never shrinks: filling with zeros again for every chunk would cost.
  void make_room(std::size_t tokens) { bytes_.resize(std::max(bytes_.size(), tokens * id_bytes_)); }

  void add_codes(std::span<std::uint32_t> codes) {
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const bool flagged = (codes[i] & BpeEncoder::kFlag) != 0;
      codes[i] &= ~BpeEncoder::kFlag;
      ++id_counts_[codes[i]];
      if (!flagged) continue;
      if (codes[i] == kEos) {
        line_lengths_.push_back(checked_length(i + 1 - std::exchange(line_begin_, i + 1)));
      } else {
        ++unknown_;
      }
    }
    make_room(codes.size());
    store_ids_(codes, bytes_.data());
    tokens_ = codes.size();
  }

  const Dictionary* dictionary_;
  StoreIds store_ids_;
  std::size_t id_bytes_;
  Written* written_;
  std::optional<BpeEncoder> bpe_encoder_;
  std::vector<std::uint64_t> id_counts_;
  std::uint64_t unknown_ = 0;
  // of the present chunk:
  std::vector<std::byte> bytes_;  // `tokens_` ids, and room
  std::uint64_t tokens_ = 0;
  std::uint64_t line_begin_ = 0;  // the token that the line not yet ended begins with
  std::vector<std::uint32_t> line_lengths_;
  std::uint64_t data_offset_ = 0;
  std::uint64_t lengths_offset_ = 0;
};

/// Counts the words of chunks; one per thread.
class ChunkCounter {
 public:
  explicit ChunkCounter(const Bpe* bpe) {
    if (bpe != nullptr) splitter_.emplace(*bpe);
  }

  void read(const Chunk& chunk) {
    check_utf8(chunk, chunk.text);
    for_each_block(splitter_ ? splitter_->apply(chunk.text) : chunk.text, [this](auto words) {
      for (const std::string_view word : words) {
        if (!word.empty()) counts_.add(word);
      }
    });
  }
  void in_turn() const noexcept {}
  void after_turn() const noexcept {}

  void add(const ChunkCounter& other) { counts_.add(other.counts_); }

  [[nodiscard]] std::vector<std::pair<std::string, std::uint64_t>> counts() const {
    std::vector<std::pair<std::string, std::uint64_t>> pairs;
    pairs.reserve(counts_.size());
    for (WordCounts::Number number = 0; number < counts_.size(); ++number) {
      const std::string_view word = counts_.word(number);
      if (first_invalid_utf8(word) != word.size()) {
        throw InputError("the codes split a character into pieces that are not UTF-8; use codes that "
                         "were learnt from UTF-8 text");
      }
      pairs.emplace_back(word, counts_.count(number));
    }
    return pairs;
  }

 private:
  std::optional<BpeSplitter> splitter_;
  WordCounts counts_;
};

}  // namespace

TextCounts encode_text(std::span<const Piece> text, const Dictionary& dictionary, IndexKind kind,
                       const EncodedPaths& paths, std::size_t threads, Progress& progress,
                       std::size_t chunk_bytes, const Bpe* bpe) {
  const Dtype dtype = dtype_to_write(kind, dictionary.size());
  ChunkReader reader(text, chunk_bytes, progress);
  Written written{.data = OutputFile(paths.data), .line_lengths = OutputFile(paths.line_lengths)};
  std::vector<ChunkEncoder> encoders(
      std::max<std::size_t>(threads, 1),
      ChunkEncoder(dictionary, store_ids_of(kind, dtype), element_bytes(dtype), written, bpe));
  read_in_order(reader, std::span(encoders), progress);

  TextCounts counts{.lines = written.lines,
                    .tokens = written.data_bytes / element_bytes(dtype),
                    .blank_lines = written.blank_lines,
                    .by_id = std::vector<std::uint64_t>(dictionary.size())};
  for (const ChunkEncoder& encoder : encoders) encoder.add_to(counts);
  counts.literal_specials = counts.by_id[kBos] + counts.by_id[kPad] + counts.by_id[kMask] +
                            (counts.by_id[kEos] - counts.lines) + (counts.by_id[kUnk] - counts.unknown);
  return counts;
}

void write_text_index(const std::filesystem::path& index, IndexKind kind,
                      std::uint64_t dictionary_size, const std::filesystem::path& line_lengths) {
  write_index(index, kind, dtype_to_write(kind, dictionary_size), line_lengths);
}

std::vector<std::pair<std::string, std::uint64_t>> count_text_words(std::span<const Piece> text,
                                                                    std::size_t threads,
                                                                    Progress& progress,
                                                                    std::size_t chunk_bytes,
                                                                    const Bpe* bpe) {
  ChunkReader reader(text, chunk_bytes, progress);
  std::vector<ChunkCounter> counters(std::max<std::size_t>(threads, 1), ChunkCounter(bpe));
  read_in_order(reader, std::span(counters), progress);
  for (const ChunkCounter& counter : std::span(counters).subspan(1)) counters.front().add(counter);
  return counters.front().counts();
}

}  // namespace xlm_ds
