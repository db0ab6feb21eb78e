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
#include "xlm_ds/byte_table.hpp"
#include "xlm_ds/chunk_reader.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/file.hpp"
#include "xlm_ds/in_order.hpp"
#include "xlm_ds/mapped_file.hpp"
#include "xlm_ds/special_ids.hpp"
#include "xlm_ds/words.hpp"

namespace xlm_ds {
namespace {

constexpr std::string_view kUnkSymbol = "<unk>";

/// Reads the text again up to the bad byte: counting lines on the way would slow every good text.
[[noreturn]] void refuse_byte(const std::filesystem::path& path, std::uint64_t offset, char found) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  const auto byte = static_cast<unsigned char>(found);
  ChunkReader reader(path, kBinarizeChunkBytes);
  std::uint64_t line = 1;
  for (Chunk chunk; reader.next(chunk) && chunk.offset < offset;) {
    line += count_line_ends(chunk.text.substr(0, offset - chunk.offset));
  }
  throw InputError(path.string() + ", line " + std::to_string(line) + ", byte " +
                   std::to_string(offset) + ": 0x" + kDigits[byte >> 4U] + kDigits[byte & 15U] +
                   " is not UTF-8; convert the file to UTF-8");
}

void check_utf8(const std::filesystem::path& path, const Chunk& chunk) {
  const std::size_t bad = first_invalid_utf8(chunk.text);
  if (bad != chunk.text.size()) refuse_byte(path, chunk.offset + bad, chunk.text[bad]);
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

/// Appends id + bias as Element, little-endian.
template <typename Element, std::uint32_t bias>
void append_ids(std::span<const std::uint32_t> ids, std::vector<std::byte>& bytes) {
  const std::size_t before = bytes.size();
  bytes.resize(before + ids.size() * sizeof(Element));
  std::byte* to = bytes.data() + before;
  for (const std::uint32_t id : ids) {
    const auto element = static_cast<Element>(id + bias);
    std::memcpy(to, &element, sizeof(element));
    to += sizeof(element);
  }
}

using AppendIds = void (*)(std::span<const std::uint32_t>, std::vector<std::byte>&);

AppendIds append_ids_of(IndexKind kind, Dtype dtype) {
  if (kind == IndexKind::lazy) return append_ids<std::int32_t, 1>;
  return dtype == Dtype::uint16 ? append_ids<std::uint16_t, 0> : append_ids<std::uint32_t, 0>;
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
  ChunkEncoder(const std::filesystem::path& text_path, const Dictionary& dictionary,
               AppendIds append_ids, Written& written, const Bpe* bpe)
      : text_path_(&text_path),
        dictionary_(&dictionary),
        append_ids_(append_ids),
        written_(&written),
        id_counts_(dictionary.size()) {
    if (bpe != nullptr) bpe_encoder_.emplace(*bpe, dictionary);
  }

  void read(const Chunk& chunk) {
    check_utf8(*text_path_, chunk);
    bytes_.clear();
    line_lengths_.clear();
    open_line_tokens_ = 0;
    if (bpe_encoder_) {
      add_codes(bpe_encoder_->encode(chunk.text));
    } else {
      for_each_block(chunk.text, [this](auto words) { encode(words); });
    }
  }

  /// Joins the chunk to those before it: its first line may have begun there.
  void in_turn() {
    data_offset_ = std::exchange(written_->data_bytes, written_->data_bytes + bytes_.size());
    lengths_offset_ = written_->lines * sizeof(std::uint32_t);
    if (line_lengths_.empty()) {
      written_->open_line_tokens += open_line_tokens_;
      return;
    }
    line_lengths_.front() = checked_length(written_->open_line_tokens + line_lengths_.front());
    written_->open_line_tokens = open_line_tokens_;
    written_->lines += line_lengths_.size();
    written_->blank_lines += static_cast<std::uint64_t>(std::ranges::count(line_lengths_, 1U));
  }

  void after_turn() const {
    written_->data.write_at(data_offset_, bytes_);
    written_->line_lengths.write_at(lengths_offset_, std::as_bytes(std::span(line_lengths_)));
  }

  void add_to(TextCounts& sum) const {
    for (std::size_t id = 0; id < id_counts_.size(); ++id) sum.by_id[id] += id_counts_[id];
    sum.literal_specials += literal_specials_;
    sum.unknown += unknown_;
  }

 private:
  static std::uint32_t checked_length(std::uint64_t tokens) {
    return narrow_or_throw<std::uint32_t>(tokens, "tokens in one line");
  }

  void encode(std::span<const std::string_view> words) {
    std::array<std::uint32_t, kWordsPerBlock> block;
    const auto ids = std::span(block).first(words.size());
    dictionary_->look_up(words, ids);
    append_ids_(ids, bytes_);
    for (std::size_t i = 0; i < words.size(); ++i) {
      ++id_counts_[ids[i]];
      ++open_line_tokens_;
      if (words[i].empty()) {
        line_lengths_.push_back(checked_length(std::exchange(open_line_tokens_, 0)));
      } else if (ids[i] < kSpecials) {
        const bool unknown = ids[i] == kUnk && words[i] != kUnkSymbol;
        ++(unknown ? unknown_ : literal_specials_);
      }
    }
  }

  void add_codes(std::span<std::uint32_t> codes) {
    for (std::uint32_t& code : codes) {
      const bool flagged = (code & BpeEncoder::kFlag) != 0;
      code &= ~BpeEncoder::kFlag;
      ++id_counts_[code];
      ++open_line_tokens_;
      if (code >= kSpecials) continue;
      if (flagged && code == kEos) {
        line_lengths_.push_back(checked_length(std::exchange(open_line_tokens_, 0)));
      } else {
        ++(flagged ? unknown_ : literal_specials_);
      }
    }
    append_ids_(codes, bytes_);
  }

  const std::filesystem::path* text_path_;
  const Dictionary* dictionary_;
  AppendIds append_ids_;
  Written* written_;
  std::optional<BpeEncoder> bpe_encoder_;
  std::vector<std::uint64_t> id_counts_;
  std::uint64_t unknown_ = 0;
  std::uint64_t literal_specials_ = 0;
  // of the present chunk:
  std::vector<std::byte> bytes_;
  std::vector<std::uint32_t> line_lengths_;
  std::uint64_t open_line_tokens_ = 0;
  std::uint64_t data_offset_ = 0;
  std::uint64_t lengths_offset_ = 0;
};

/// Counts the words of chunks; one per thread.
class ChunkCounter {
 public:
  ChunkCounter(const std::filesystem::path& text_path, const Bpe* bpe) : text_path_(&text_path) {
    if (bpe != nullptr) splitter_.emplace(*bpe);
  }

  void read(const Chunk& chunk) {
    check_utf8(*text_path_, chunk);
    for_each_block(splitter_ ? splitter_->apply(chunk.text) : chunk.text, [this](auto words) {
      for (const std::string_view word : words) {
        if (!word.empty()) count(word, 1);
      }
    });
  }
  void in_turn() const noexcept {}
  void after_turn() const noexcept {}

  void add(const ChunkCounter& other) {
    for (ByteTable::Number number = 0; number < other.counts_.size(); ++number) {
      count(other.words_[number], other.counts_[number]);
    }
  }

  [[nodiscard]] std::vector<std::pair<std::string, std::uint64_t>> counts() const {
    std::vector<std::pair<std::string, std::uint64_t>> pairs;
    pairs.reserve(counts_.size());
    for (ByteTable::Number number = 0; number < counts_.size(); ++number) {
      pairs.emplace_back(words_[number], counts_[number]);
    }
    return pairs;
  }

 private:
  void count(std::string_view word, std::uint64_t times) {
    const auto number = words_.insert(word);
    if (number == counts_.size()) counts_.push_back(0);
    counts_[number] += times;
  }

  const std::filesystem::path* text_path_;
  std::optional<BpeSplitter> splitter_;
  ByteTable words_;
  std::vector<std::uint64_t> counts_;  // by number in words_
};

}  // namespace

TextCounts binarize_file(const std::filesystem::path& text_path, const Dictionary& dictionary,
                         IndexKind kind, const PairPaths& paths, std::size_t threads,
                         Progress& progress, std::size_t chunk_bytes, const Bpe* bpe) {
  const Dtype dtype = dtype_to_write(kind, dictionary.size());
  ChunkReader reader(text_path, chunk_bytes);
  Written written{.data = OutputFile(paths.data), .line_lengths = OutputFile(paths.temporary)};
  std::vector<ChunkEncoder> encoders(
      std::max<std::size_t>(threads, 1),
      ChunkEncoder(text_path, dictionary, append_ids_of(kind, dtype), written, bpe));
  read_in_order(reader, std::span(encoders), progress);
  if (!progress.cancelled()) {
    const MappedFile line_lengths(paths.temporary);
    write_index(paths.index, kind, dtype, line_lengths.bytes());
  }
  std::filesystem::remove(paths.temporary);

  TextCounts counts{.lines = written.lines,
                    .tokens = written.data_bytes / element_bytes(dtype),
                    .blank_lines = written.blank_lines,
                    .by_id = std::vector<std::uint64_t>(dictionary.size())};
  for (const ChunkEncoder& encoder : encoders) encoder.add_to(counts);
  return counts;
}

std::vector<std::pair<std::string, std::uint64_t>> count_text_words(
    const std::filesystem::path& text_path, std::size_t threads, Progress& progress,
    std::size_t chunk_bytes, const Bpe* bpe) {
  ChunkReader reader(text_path, chunk_bytes);
  std::vector<ChunkCounter> counters(std::max<std::size_t>(threads, 1),
                                     ChunkCounter(text_path, bpe));
  read_in_order(reader, std::span(counters), progress);
  for (const ChunkCounter& counter : std::span(counters).subspan(1)) counters.front().add(counter);
  return counters.front().counts();
}

}  // namespace xlm_ds
