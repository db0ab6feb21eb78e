#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "xlm_ds/bpe.hpp"
#include "xlm_ds/chunk_reader.hpp"
#include "xlm_ds/dictionary.hpp"
#include "xlm_ds/index_format.hpp"
#include "xlm_ds/progress.hpp"

namespace xlm_ds {

/// What a text file contains, in the terms of a dictionary.
struct TextCounts {
  std::uint64_t lines = 0;
  std::uint64_t tokens = 0;       // one eos a line included
  std::uint64_t unknown = 0;      // words that are not in the dictionary; a literal <unk> is
  std::uint64_t blank_lines = 0;  // lines without a word
  /// Words spelt like a special symbol: they get its id, as with fairseq.
  std::uint64_t literal_specials = 0;
  std::vector<std::uint64_t> by_id;  // u64[dictionary size]
};

/// Where an encoded text goes. The files are written in place: callers that must not leave half a
/// file give temporary names.
struct EncodedPaths {
  std::filesystem::path data;          // the .bin
  std::filesystem::path line_lengths;  // native u32 each; what an .idx is made from
};

/// Text at a time of one thread. Small enough for the second-level cache's share of input and
/// output together, large enough that handing out chunks costs nothing.
inline constexpr std::size_t kBinarizeChunkBytes = std::size_t{1} << 18;

/// Writes the ids of every line of a text, or with `bpe` of what it makes of the text, each line
/// ended by eos, and the lines' lengths. Those of a text's parts, one file after another, are those
/// of the text. The bytes written do not depend on `threads` or `chunk_bytes` (at least 1). Memory:
/// a few chunks per thread, whatever the size of the text and of its lines (ChunkReader), and with
/// `bpe` a cache of words.
///
/// Throws InputError for text that is not UTF-8 (naming file, line and byte; of standard input the
/// byte only) or a `bpe` that splits a character, std::system_error if a file cannot be read or
/// written. A cancelled call returns early; its files are then worthless.
TextCounts encode_text(std::span<const Piece> text, const Dictionary& dictionary, IndexKind kind,
                       const EncodedPaths& paths, std::size_t threads, Progress& progress,
                       std::size_t chunk_bytes = kBinarizeChunkBytes, const Bpe* bpe = nullptr);

/// The .idx (index_format.hpp) that belongs to a file of line lengths. Throws std::system_error,
/// and InputError for a line too long for the format.
void write_text_index(const std::filesystem::path& index, IndexKind kind,
                      std::uint64_t dictionary_size, const std::filesystem::path& line_lengths);

/// The words of a text, or with `bpe` of what it makes of the text, and how often each occurs, in no
/// particular order; memory for each distinct word once per thread. Throws as encode_text does.
std::vector<std::pair<std::string, std::uint64_t>> count_text_words(
    std::span<const Piece> text, std::size_t threads, Progress& progress,
    std::size_t chunk_bytes = kBinarizeChunkBytes, const Bpe* bpe = nullptr);

}  // namespace xlm_ds
