#include "xlm_ds/binarize.hpp"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <functional>
#include <mutex>
#include <string_view>
#include <system_error>
#include <thread>
#include <unistd.h>

#include "xlm_ds/error.hpp"
#include "xlm_ds/mapped_file.hpp"
#include "xlm_ds/special_ids.hpp"
#include "xlm_ds/words.hpp"

namespace xlm_ds {
namespace {

constexpr std::string_view kUnkSymbol = "<unk>";

/// A file written at given places by several threads.
class OutputFile {
 public:
  explicit OutputFile(const std::filesystem::path& path)
      : path_(path), fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail();
  }
  ~OutputFile() {
    if (fd_ >= 0) ::close(fd_);
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write_at(std::uint64_t offset, const void* bytes, std::size_t count) const {
    const auto* from = static_cast<const char*>(bytes);
    while (count > 0) {
      const auto written = ::pwrite(fd_, from, count, static_cast<off_t>(offset));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail();
      from += written;
      offset += static_cast<std::uint64_t>(written);
      count -= static_cast<std::size_t>(written);
    }
  }

  void close() {
    if (::close(std::exchange(fd_, -1)) != 0) fail();
  }

 private:
  [[noreturn]] void fail() const {
    throw std::system_error(errno, std::generic_category(), "cannot write " + path_.string());
  }
  std::filesystem::path path_;
  int fd_;
};

/// Hands out the chunks of a text in order and lets their results through in the same order, whichever thread is done first:
/// offsets, and the first error, are those of a single thread.
class ChunkQueue {
 public:
  ChunkQueue(std::string_view text, std::size_t chunk_bytes) : text_(text), chunk_bytes_(std::max<std::size_t>(chunk_bytes, 1)) {}

  struct Chunk {
    std::size_t number;
    std::string_view text;  // whole lines; empty if a line is longer than a chunk
  };

  /// False when there is nothing left, or something went wrong.
  [[nodiscard]] bool next(Chunk& chunk) {
    std::size_t number = 0;
    {
      const std::scoped_lock lock(mutex_);
      if (failed_ || next_ * chunk_bytes_ >= text_.size()) return false;
      number = next_++;
    }
    const std::size_t begin = line_start_from(text_, number * chunk_bytes_);
    const std::size_t end = line_start_from(text_, std::min((number + 1) * chunk_bytes_, text_.size()));
    chunk = {number, text_.substr(begin, end - begin)};
    return true;
  }

  /// Waits for the chunks before `number`, then runs `action` (short; one at a time). False if an earlier chunk failed.
  [[nodiscard]] bool in_order(std::size_t number, const std::function<void()>& action) {
    std::unique_lock lock(mutex_);
    turn_.wait(lock, [&] { return failed_ || passed_ == number; });
    if (failed_) return false;
    try {
      action();
    } catch (...) {
      failed_ = std::current_exception();
    }
    ++passed_;
    turn_.notify_all();
    return !failed_;
  }

  /// For an error that is not a chunk's (a full disk): the first one stays.
  void fail(std::exception_ptr error) {
    const std::scoped_lock lock(mutex_);
    if (!failed_) failed_ = std::move(error);
    turn_.notify_all();
  }

  void rethrow() const {
    if (failed_) std::rethrow_exception(failed_);
  }

 private:
  std::string_view text_;
  std::size_t chunk_bytes_;
  std::mutex mutex_;
  std::condition_variable turn_;
  std::size_t next_ = 0, passed_ = 0;
  std::exception_ptr failed_;
};

std::string_view text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

std::uint64_t lines_in(std::string_view text) {
  std::uint64_t lines = 0;
  for_each_word(text, [](std::string_view) {}, [&] { ++lines; });
  return lines;
}

[[noreturn]] void refuse_bytes(const std::filesystem::path& path, std::string_view text, std::string_view chunk,
                               std::size_t bad, std::uint64_t lines_before) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  const auto byte = static_cast<unsigned char>(chunk[bad]);
  const auto offset = static_cast<std::size_t>(chunk.data() - text.data()) + bad;
  const auto before = chunk.substr(0, bad);
  const auto line = lines_before + lines_in(before) + (line_start_from(text, offset) == offset ? 1 : 0);
  throw InputError(path.string() + ", line " + std::to_string(line) + ", byte " + std::to_string(offset) + ": 0x" +
                   kDigits[byte >> 4U] + kDigits[byte & 15U] + " is not UTF-8; convert the file to UTF-8");
}

/// Runs `work(queue)` on `threads` threads and rethrows the first error of theirs.
void run_threads(std::size_t threads, ChunkQueue& queue, const std::function<void(std::size_t)>& work) {
  const auto guarded = [&](std::size_t thread) {
    try {
      work(thread);
    } catch (...) {
      queue.fail(std::current_exception());
    }
  };
  {
    std::vector<std::jthread> others;
    for (std::size_t thread = 1; thread < threads; ++thread) others.emplace_back(guarded, thread);
    guarded(0);
  }
  queue.rethrow();
}

/// One chunk's ids as they are stored, and the lengths of its lines.
template <typename Stored>
struct Encoded {
  std::vector<Stored> ids;
  std::vector<std::uint32_t> lengths;
};

/// Encodes whole lines into `out` and adds them to `counts`. `bias` is what is added to an id on disk.
template <typename Stored>
void encode(std::string_view text, const Dictionary& dictionary, std::uint32_t bias, Encoded<Stored>& out, TextCounts& counts) {
  out.ids.clear();
  out.lengths.clear();
  std::size_t line_begin = 0;
  const auto put = [&](std::uint32_t id) {
    ++counts.by_id[id];
    out.ids.push_back(static_cast<Stored>(id + bias));
  };
  const auto word = [&](std::string_view bytes) {
    const auto id = dictionary.find(bytes);
    if (id == Dictionary::kUnknown) {
      ++counts.unknown;
      put(kUnk);
    } else {
      counts.literal_specials += id < kSpecials ? 1 : 0;
      put(id);
    }
  };
  const auto line_end = [&] {
    counts.blank_lines += out.ids.size() == line_begin ? 1 : 0;
    put(kEos);
    out.lengths.push_back(narrow_or_throw<std::uint32_t>(out.ids.size() - line_begin, "tokens in one line"));
    line_begin = out.ids.size();
  };
  for_each_word(text, word, line_end);
  counts.lines += out.lengths.size();
  counts.tokens += out.ids.size();
}

void add(TextCounts& sum, const TextCounts& part) {
  sum.lines += part.lines;
  sum.tokens += part.tokens;
  sum.unknown += part.unknown;
  sum.blank_lines += part.blank_lines;
  sum.literal_specials += part.literal_specials;
  for (std::size_t id = 0; id < sum.by_id.size(); ++id) sum.by_id[id] += part.by_id[id];
}

template <typename Stored>
TextCounts write_ids(const std::filesystem::path& text_path, const Dictionary& dictionary, std::uint32_t bias,
                     const PairPaths& paths, std::size_t threads, Progress& progress, std::size_t chunk_bytes) {
  const MappedFile file(text_path);
  const auto text = text_of(file);
  OutputFile data(paths.data), lengths(paths.temporary);
  ChunkQueue queue(text, chunk_bytes);
  std::uint64_t tokens_before = 0, lines_before = 0;  // of the chunk whose turn it is
  std::vector<TextCounts> counts(threads);

  run_threads(threads, queue, [&](std::size_t thread) {
    Encoded<Stored> encoded;
    ChunkQueue::Chunk chunk{};
    counts[thread].by_id.resize(dictionary.size());
    while (!progress.cancelled() && queue.next(chunk)) {
      const auto bad = first_invalid_utf8(chunk.text);
      if (bad == std::string_view::npos) encode(chunk.text, dictionary, bias, encoded, counts[thread]);
      std::uint64_t first_token = 0, first_line = 0;
      const bool passed = queue.in_order(chunk.number, [&] {
        if (bad != std::string_view::npos) refuse_bytes(text_path, text, chunk.text, bad, lines_before);
        first_token = std::exchange(tokens_before, tokens_before + encoded.ids.size());
        first_line = std::exchange(lines_before, lines_before + encoded.lengths.size());
      });
      if (!passed) return;
      data.write_at(first_token * sizeof(Stored), encoded.ids.data(), encoded.ids.size() * sizeof(Stored));
      lengths.write_at(first_line * sizeof(std::uint32_t), encoded.lengths.data(), encoded.lengths.size() * sizeof(std::uint32_t));
      progress.add(chunk.text.size());
    }
    // A cancelled thread holds no chunk, so nobody waits for it.
  });
  data.close();
  lengths.close();
  TextCounts sum{.by_id = std::vector<std::uint64_t>(dictionary.size())};
  for (const auto& part : counts) add(sum, part);
  return sum;
}

}  // namespace

TextCounts binarize_file(const std::filesystem::path& text_path, const Dictionary& dictionary, IndexKind kind,
                         const PairPaths& paths, std::size_t threads, Progress& progress, std::size_t chunk_bytes) {
  const auto dtype = dtype_to_write(kind, dictionary.size());
  const std::uint32_t bias = kind == IndexKind::lazy ? 1 : 0;
  const auto write = dtype == Dtype::uint16 ? &write_ids<std::uint16_t> : &write_ids<std::uint32_t>;
  auto counts = write(text_path, dictionary, bias, paths, std::max<std::size_t>(threads, 1), progress, chunk_bytes);
  if (!progress.cancelled()) {
    const MappedFile lengths(paths.temporary);
    write_index(paths.index, kind, dtype, lengths.bytes());
  }
  std::filesystem::remove(paths.temporary);
  return counts;
}

std::vector<std::pair<std::string, std::uint64_t>> count_text_words(const std::filesystem::path& text_path,
                                                                    std::size_t threads, Progress& progress,
                                                                    std::size_t chunk_bytes) {
  struct Counts {
    ByteTable words;
    std::vector<std::uint64_t> times;
    void add(std::string_view word, std::uint64_t by) {
      const auto number = words.insert(word);
      if (number == times.size()) times.push_back(0);
      times[number] += by;
    }
  };
  const MappedFile file(text_path);
  const auto text = text_of(file);
  ChunkQueue queue(text, chunk_bytes);
  std::vector<Counts> counts(std::max<std::size_t>(threads, 1));
  std::uint64_t lines_before = 0;

  run_threads(counts.size(), queue, [&](std::size_t thread) {
    ChunkQueue::Chunk chunk{};
    while (!progress.cancelled() && queue.next(chunk)) {
      const auto bad = first_invalid_utf8(chunk.text);
      std::uint64_t lines = 0;
      if (bad == std::string_view::npos) {
        for_each_word(chunk.text, [&](std::string_view word) { counts[thread].add(word, 1); }, [&] { ++lines; });
      }
      const bool passed = queue.in_order(chunk.number, [&] {
        if (bad != std::string_view::npos) refuse_bytes(text_path, text, chunk.text, bad, lines_before);
        lines_before += lines;
      });
      if (!passed) return;
      progress.add(chunk.text.size());
    }
  });
  auto& all = counts.front();
  for (std::size_t thread = 1; thread < counts.size(); ++thread) {
    const auto& part = counts[thread];
    for (ByteTable::Number i = 0; i < part.times.size(); ++i) all.add(part.words[i], part.times[i]);
  }
  std::vector<std::pair<std::string, std::uint64_t>> result;
  result.reserve(all.times.size());
  for (ByteTable::Number i = 0; i < all.times.size(); ++i) result.emplace_back(all.words[i], all.times[i]);
  return result;
}

}  // namespace xlm_ds
