#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "xlm_ds/bpe.hpp"
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

/// Where the result goes. The files are written in place: callers that must not leave half a file
/// give temporary names.
struct PairPaths {
  std::filesystem::path data;       // the .bin
  std::filesystem::path index;      // the .idx
  std::filesystem::path temporary;  // lengths of the lines; removed at the end
};

/// Text at a time of one thread. Small enough for the second-level cache's share of input and
/// output together, large enough that handing out chunks costs nothing.
inline constexpr std::size_t kBinarizeChunkBytes = std::size_t{1} << 18;

/// Writes the ids of every line of `text_path`, each line ended by eos, as a pair of files
/// (index_format.hpp). With `bpe`, of what it makes of the text. The bytes written do not depend on `threads` or `chunk_bytes` (at least 1).
/// Memory: a few chunks per thread, whatever the size of the text and of its lines (ChunkReader).
///
/// Throws InputError for text that is not UTF-8 (naming file, line and byte), std::system_error if
/// a file cannot be read or written. A cancelled call returns early; its files are then worthless.
TextCounts binarize_file(const std::filesystem::path& text_path, const Dictionary& dictionary,
                         IndexKind kind, const PairPaths& paths, std::size_t threads,
                         Progress& progress, std::size_t chunk_bytes = kBinarizeChunkBytes,
                         const Bpe* bpe = nullptr);

/// The words of a text file, or of what `bpe` makes of it, and how often each occurs, in no particular order; memory for each
/// distinct word once per thread. Throws as binarize_file does.
std::vector<std::pair<std::string, std::uint64_t>> count_text_words(
    const std::filesystem::path& text_path, std::size_t threads, Progress& progress,
    std::size_t chunk_bytes = kBinarizeChunkBytes, const Bpe* bpe = nullptr);

}  // namespace xlm_ds
