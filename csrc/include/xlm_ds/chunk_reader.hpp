#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <string_view>
#include <vector>

#include "xlm_ds/dictionary.hpp"
#include "xlm_ds/file.hpp"

namespace xlm_ds {

/// A piece of a text: whole words, and never cut between CR and LF. Reused from piece to piece.
struct Chunk {
  std::uint64_t number = 0;  // 0, 1, 2, … in the order of the file
  std::uint64_t offset = 0;  // of its first byte in the file
  std::string_view text;     // kReadableAfter bytes after it are readable
  std::vector<char> buffer;  // what `text` views
};

/// Hands out a text file in chunks to any number of threads, one after another in the order of the
/// file. Read, not mapped: a file that shrinks meanwhile or a failing disk is an exception instead
/// of a signal, the resident memory stays small, and the copy lands in the cache where it is used
/// next.
class ChunkReader {
 public:
  /// Chunks have about `chunk_bytes` (at least 1), more only if a single stretch without a space or
  /// line feed does. Throws std::system_error if the file cannot be opened.
  ChunkReader(const std::filesystem::path& path, std::size_t chunk_bytes);

  /// False at the end of the file. The last line is given an LF if it has no line end of its own.
  /// Thread-safe. Throws std::system_error if reading fails.
  [[nodiscard]] bool next(Chunk& chunk);

 private:
  std::mutex mutex_;
  InputFile file_;
  std::size_t chunk_bytes_;
  std::vector<char> tail_;  // read, but after the last place to cut
  bool line_open_ = false;  // the last chunk ended within a line
  std::uint64_t offset_ = 0;
  std::uint64_t number_ = 0;
};

}  // namespace xlm_ds
