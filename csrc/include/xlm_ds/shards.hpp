#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <utility>
#include <vector>

#include "xlm_ds/binarize.hpp"
#include "xlm_ds/file.hpp"
#include "xlm_ds/index_format.hpp"
#include "xlm_ds/mapped_file.hpp"
#include "xlm_ds/progress.hpp"

/// Looking after pairs that exist: reading them line by line, checking every byte, writing them anew. The .bin is read
/// front to back in pieces, not mapped: a failing disk is an exception instead of a signal, and memory stays small.
namespace xlm_ds {

/// A .bin/.idx pair seen as lines. Throws as TokenDataset does.
class Pair {
 public:
  explicit Pair(const std::filesystem::path& prefix);

  [[nodiscard]] const Index& index() const noexcept { return index_; }
  [[nodiscard]] std::span<const std::byte> index_bytes() const noexcept { return index_file_.bytes(); }
  [[nodiscard]] const std::filesystem::path& index_path() const noexcept { return index_path_; }
  [[nodiscard]] const std::filesystem::path& data_path() const noexcept { return data_path_; }

  /// Tokens before line `line`, at most sequences(). O(1). Throws InputError if the .idx is damaged there, as do the three
  /// after it.
  [[nodiscard]] std::uint64_t tokens_before(std::uint64_t line) const;
  /// How many lines from the front end within the first `tokens` tokens. O(log lines).
  [[nodiscard]] std::uint64_t lines_within(std::uint64_t tokens) const;
  /// The ids of a line. Throws std::out_of_range beyond the last.
  [[nodiscard]] std::vector<std::int64_t> line(std::uint64_t number) const;
  /// Every length in tokens that occurs, ascending, and of how many lines. O(lines).
  [[nodiscard]] std::vector<std::pair<std::uint64_t, std::uint64_t>> count_lengths() const;

  /// How often each id occurs, (vocab_size). Throws as read_ids. O(tokens). A cancelled call returns early.
  [[nodiscard]] std::vector<std::uint64_t> count_ids(std::uint64_t vocab_size, Progress& progress) const;

  /// Reads ids.size() ids from token `first` on; `scratch` is reused from call to call. Throws InputError naming the
  /// file and the first bad byte if an id is not below vocab_size; std::system_error.
  void read_ids(std::uint64_t first, std::uint64_t vocab_size, std::span<std::int64_t> ids,
                std::vector<std::byte>& scratch) const;

 private:
  std::filesystem::path index_path_;
  std::filesystem::path data_path_;
  MappedFile index_file_;
  RandomAccessFile data_file_;
  Index index_;
};

/// Checks everything a pair says about itself: every start and length, every id against vocab_size, and that every
/// line ends with eos. Throws InputError naming the file and the first bad byte. O(bytes), in bounded memory.
/// Of the result, `unknown` includes words spelt <unk>, and literal_specials leaves them out: the ids do not tell.
TextCounts verify_pair(const Pair& pair, std::uint64_t vocab_size, Progress& progress);

/// Writes a new pair from lines of others, in bounded memory. In place: callers give temporary names. Throws
/// std::system_error if a file cannot be written.
class PairWriter {
 public:
  /// `lengths_path` gets the lines' lengths, native u32 each: they may be more than memory holds. It is the caller's to
  /// remove.
  PairWriter(const std::filesystem::path& data_path, std::filesystem::path lengths_path, IndexKind kind, Dtype dtype,
             std::uint64_t vocab_size);

  /// Appends lines [first, end) of a pair, checking them as verify_pair does. Returns early if cancelled.
  void append(const Pair& pair, std::uint64_t first, std::uint64_t end, Progress& progress);

  /// Appends lines of these lengths, eos included; their sum is ids.size(). Throws std::invalid_argument unless
  /// they are lines of the dictionary; InputError for an id that the dtype cannot hold.
  void append_ids(std::span<const std::int64_t> ids, std::span<const std::int64_t> lengths);

  /// Writes the .idx and returns the counts, as verify_pair does. To be called once, at the end.
  TextCounts finish(const std::filesystem::path& index_path);

 private:
  void store(std::span<const std::int64_t> ids);
  void add_line(std::uint64_t tokens);
  void flush_lengths();

  IndexKind kind_;
  Dtype dtype_;
  OutputFile data_;
  std::filesystem::path lengths_path_;
  OutputFile lengths_file_;
  TextCounts counts_;
  std::vector<std::uint32_t> lengths_;  // not yet in lengths_file_
  std::uint64_t lengths_written_ = 0;
  std::vector<std::byte> bytes_;
};

}  // namespace xlm_ds
