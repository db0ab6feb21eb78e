#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "xlm_ds/dictionary.hpp"
#include "xlm_ds/file.hpp"
#include "xlm_ds/progress.hpp"

namespace xlm_ds {

/// Bytes [begin, end) of a file. Both are where a file begins or ends, or right after an LF.
struct Piece {
  static constexpr std::uint64_t kToTheEnd = std::numeric_limits<std::uint64_t>::max();

  std::filesystem::path path;  // or kStandardInput
  std::uint64_t begin = 0;
  std::uint64_t end = kToTheEnd;
};

/// Bytes that grow without being set to zero first.
class Buffer {
 public:
  [[nodiscard]] std::string_view text() const noexcept { return {bytes_.get(), size_}; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  /// Room for `count` bytes after the first size(); what is there stays.
  [[nodiscard]] std::span<char> room(std::size_t count);
  /// The first `size` bytes are the content; they have been written.
  void set_size(std::size_t size) noexcept { size_ = size; }
  void append(std::string_view text);

 private:
  std::unique_ptr<char[]> bytes_;
  std::size_t capacity_ = 0;
  std::size_t size_ = 0;
};

/// A part of a text: whole words, never cut between CR and LF. Reused from chunk to chunk.
struct Chunk {
  std::uint64_t number = 0;      // 0, 1, 2, … in the order of the text
  const Piece* piece = nullptr;  // the file it is from
  std::uint64_t offset = 0;      // of its first byte in that file
  std::string_view text;         // kReadableAfter bytes after it are readable
  Buffer buffer;                 // what `text` views
};

/// Hands out a text, pieces of files one after another, in chunks to any number of threads. Read,
/// not mapped: a file that shrinks meanwhile or a failing disk is an exception instead of a signal,
/// the resident memory stays small, and the copy lands in the cache where it is used next.
class ChunkReader {
 public:
  /// Chunks have about `chunk_bytes` (at least 1), more only if a single stretch without a space or
  /// line feed does. `pieces` and `progress` must outlive the reader. Throws std::system_error if
  /// the first file cannot be opened.
  ChunkReader(std::span<const Piece> pieces, std::size_t chunk_bytes, const Progress& progress);

  /// False at the end of the text, or when `progress` is cancelled. The last line of a piece is
  /// given an LF if it has no line end of its own. Thread-safe. Throws std::system_error if a file
  /// cannot be read, InputError if it ends before its piece does.
  [[nodiscard]] bool next(Chunk& chunk);

 private:
  void open_piece();
  /// False at the end of the piece.
  [[nodiscard]] bool next_of_piece(Chunk& chunk);
  /// Reads up to chunk_bytes_ behind the content of `buffer`; returns whether the piece has ended.
  [[nodiscard]] bool read_into(Buffer& buffer);

  std::mutex mutex_;
  std::span<const Piece> pieces_;  // the first is being read
  std::optional<InputFile> file_;  // of that piece; none after the last
  std::size_t chunk_bytes_;
  const Progress* progress_;
  Buffer tail_;             // read, but after the last place to cut
  bool line_open_ = false;  // the last chunk ended within a line
  std::uint64_t offset_ = 0;  // of the next chunk in the file
  std::uint64_t unread_ = 0;  // bytes of the piece
  std::uint64_t number_ = 0;
};

}  // namespace xlm_ds
