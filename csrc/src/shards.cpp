#include "xlm_ds/shards.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "xlm_ds/error.hpp"
#include "xlm_ds/special_ids.hpp"
#include "xlm_ds/stored_ids.hpp"

namespace xlm_ds {
namespace {

constexpr std::size_t kTokensPerStep = std::size_t{1} << 15;  // ids of one step stay in the second-level cache
constexpr std::size_t kLengthsPerWrite = std::size_t{1} << 16;
constexpr std::size_t kUsualLength = std::size_t{1} << 12;  // of a line; shorter ones are counted in an array

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& what) {
  throw InputError(path.string() + ": " + what + "; the file is damaged, or not binarized text: delete it and binarize again");
}

[[noreturn]] void refuse_line(const Pair& pair, std::uint64_t number) {
  refuse(pair.index_path(), "line " + std::to_string(number) + " lies outside the .bin");
}

/// Where line `number` is: [first, end) in tokens. Throws InputError if it is not within the .bin, or no line but a matrix.
std::pair<std::uint64_t, std::uint64_t> range_of(const Pair& pair, std::uint64_t number) {
  const Index& index = pair.index();
  for (const std::uint64_t i : {number, number + 1}) verify_dimension(index, pair.index_bytes(), pair.index_path(), i);
  const std::uint64_t first = sequence_start(index, pair.index_bytes(), number);
  const std::uint64_t length = sequence_length(index, pair.index_bytes(), number);
  if (length > index.tokens || first > index.tokens - length) refuse_line(pair, number);
  return {first, first + length};
}

/// Reads lines [first, end): take_ids(ids) for all ids in turn, take_line(tokens) for every line. Checks that each line
/// begins where the one before it ends, also the one at `end`, and ends with eos.
template <typename TakeIds, typename TakeLine>
void walk(const Pair& pair, std::uint64_t first, std::uint64_t end, std::uint64_t vocab_size, Progress& progress,
          TakeIds take_ids, TakeLine take_line) {
  const std::size_t width = element_bytes(pair.index().dtype);
  std::uint64_t done = pair.tokens_before(first);
  std::uint64_t line = first;
  std::uint64_t line_start = done;  // of the line that the next ids belong to
  const std::uint64_t stop = pair.tokens_before(end);
  if (stop < done) refuse_line(pair, end);
  std::vector<std::int64_t> buffer(std::min<std::uint64_t>(kTokensPerStep, stop - done));
  std::vector<std::byte> scratch;
  while (line < end && !progress.cancelled()) {
    const std::uint64_t step = std::min<std::uint64_t>(kTokensPerStep, stop - done);
    const auto ids = std::span(buffer).first(static_cast<std::size_t>(step));
    pair.read_ids(done, vocab_size, ids, scratch);
    take_ids(std::span<const std::int64_t>(ids));
    for (; line < end; ++line) {
      const auto [line_first, line_end] = range_of(pair, line);
      if (line_first != line_start) {
        refuse(pair.index_path(), "line " + std::to_string(line) + " starts at token " + std::to_string(line_first) +
                                      ", but the lines before it end at " + std::to_string(line_start));
      }
      if (line_end > stop) {
        refuse(pair.index_path(), "line " + std::to_string(line) + " is longer than the next one's start says");
      }
      if (line_end > done + step) break;
      if (line_end == line_start) refuse(pair.index_path(), "line " + std::to_string(line) + " has no tokens, not even </s>");
      const std::int64_t last = ids[static_cast<std::size_t>(line_end - 1 - done)];
      if (last != kEos) {
        refuse(pair.data_path(), "line " + std::to_string(line) + " ends with id " + std::to_string(last) + " instead of </s> (" +
                                     std::to_string(kEos) + "), at byte " + std::to_string((line_end - 1) * width));
      }
      take_line(line_end - line_start);
      line_start = line_end;
    }
    done += step;
    progress.add(step * width);
  }
  if (line == end && line_start != stop) {
    refuse(pair.index_path(), "line " + std::to_string(end) + " starts at token " + std::to_string(stop) +
                                  ", but the lines before it end at " + std::to_string(line_start));
  }
}

void count_ids(std::span<const std::int64_t> ids, TextCounts& counts) {
  counts.tokens += ids.size();
  for (const std::int64_t id : ids) ++counts.by_id[static_cast<std::size_t>(id)];
}

void count_line(std::uint64_t tokens, TextCounts& counts) {
  ++counts.lines;
  counts.blank_lines += tokens == 1 ? 1 : 0;
}

/// What the ids tell of the words: a literal <unk> looks like an unknown word.
void count_words(TextCounts& counts) {
  const auto count_of = [&](std::int64_t id) {
    const auto row = static_cast<std::size_t>(id);
    return row < counts.by_id.size() ? counts.by_id[row] : 0;
  };
  counts.unknown = count_of(kUnk);
  counts.literal_specials = count_of(kBos) + count_of(kPad) + count_of(kMask) + count_of(kEos) - counts.lines;
}

/// write_index gives every line a document of its own; another division would be lost without a word.
void check_documents(const Pair& pair, std::uint64_t first, std::uint64_t end) {
  bool one_each = pair.index().documents == pair.index().sequences;
  for (std::uint64_t i = first; one_each && i < end; ++i) one_each = document_start(pair.index(), pair.index_bytes(), i) == i;
  if (one_each) return;
  throw InputError(pair.index_path().string() + ": has documents of several lines, which are not kept when a Megatron-LM pair is "
                   "written anew; convert it with --to mmap first");
}

}  // namespace

Pair::Pair(const std::filesystem::path& prefix)
    : index_path_(index_path_of(prefix)),
      data_path_(data_path_of(prefix)),
      index_file_(index_path_),
      data_file_(data_path_),
      index_(read_index(index_file_.bytes(), data_file_.size(), index_path_)) {}

std::uint64_t Pair::tokens_before(std::uint64_t line) const {
  if (line > index_.sequences) throw std::out_of_range("there is no such line");
  if (line == index_.sequences) return index_.tokens;
  const std::uint64_t start = sequence_start(index_, index_file_.bytes(), line);
  if (start > index_.tokens) refuse_line(*this, line);
  return start;
}

std::uint64_t Pair::lines_within(std::uint64_t tokens) const {
  std::uint64_t within = 0, beyond = index_.sequences + 1;  // of lines counted from the first; by halving
  while (beyond - within > 1) {
    const std::uint64_t middle = within + (beyond - within) / 2;
    (tokens_before(middle) <= tokens ? within : beyond) = middle;
  }
  return within;
}

std::vector<std::int64_t> Pair::line(std::uint64_t number) const {
  if (number >= index_.sequences) throw std::out_of_range("there is no such line");
  const auto [first, end] = range_of(*this, number);
  std::vector<std::int64_t> ids(static_cast<std::size_t>(end - first));
  std::vector<std::byte> scratch;
  read_ids(first, greatest_id(Dtype::int64, 0), ids, scratch);
  return ids;
}

std::vector<std::pair<std::uint64_t, std::uint64_t>> Pair::count_lengths() const {
  std::array<std::uint64_t, kUsualLength> usual{};
  std::map<std::uint64_t, std::uint64_t> longer;
  for (std::uint64_t i = 0; i < index_.sequences; ++i) {
    const std::uint64_t length = sequence_length(index_, index_file_.bytes(), i);
    if (length > index_.tokens) {
      refuse(index_path_, "line " + std::to_string(i) + " has a length of " + std::to_string(static_cast<std::int64_t>(length)) +
                              ", but the .bin has " + std::to_string(index_.tokens) + " tokens");
    }
    ++(length < kUsualLength ? usual[static_cast<std::size_t>(length)] : longer[length]);
  }
  std::vector<std::pair<std::uint64_t, std::uint64_t>> counts;
  for (std::size_t length = 0; length < usual.size(); ++length) {
    if (usual[length] != 0) counts.emplace_back(length, usual[length]);
  }
  counts.insert(counts.end(), longer.begin(), longer.end());
  return counts;
}

void Pair::read_ids(std::uint64_t first, std::uint64_t vocab_size, std::span<std::int64_t> ids,
                    std::vector<std::byte>& scratch) const {
  const std::size_t width = element_bytes(index_.dtype);
  scratch.resize(ids.size() * width);
  if (data_file_.read_at(first * width, scratch) != scratch.size()) refuse(data_path_, "it became shorter while it was read");
  if (widen_ids(index_.dtype, scratch.data(), index_.id_bias(), ids) < vocab_size) return;
  const auto bad = std::ranges::find_if(ids, [&](std::int64_t id) { return static_cast<std::uint64_t>(id) >= vocab_size; });
  if (bad == ids.end()) return;  // there were no ids, and no vocabulary
  const std::uint64_t token = first + static_cast<std::uint64_t>(bad - ids.begin());
  throw InputError(data_path_.string() + ": id " + std::to_string(*bad) + " at byte " + std::to_string(token * width) +
                   " (token " + std::to_string(token) + "), but the dictionary ends at " + std::to_string(vocab_size - 1) +
                   "; it was made with another dictionary, or is damaged: delete it and binarize again");
}

std::vector<std::uint64_t> Pair::count_ids(std::uint64_t vocab_size, Progress& progress) const {
  TextCounts counts{.by_id = std::vector<std::uint64_t>(vocab_size)};
  std::vector<std::int64_t> buffer(std::min<std::uint64_t>(kTokensPerStep, index_.tokens));
  std::vector<std::byte> scratch;
  while (counts.tokens < index_.tokens && !progress.cancelled()) {
    const auto ids = std::span(buffer).first(std::min<std::uint64_t>(kTokensPerStep, index_.tokens - counts.tokens));
    read_ids(counts.tokens, vocab_size, ids, scratch);
    xlm_ds::count_ids(ids, counts);
    progress.add(scratch.size());
  }
  return counts.by_id;
}

TextCounts verify_pair(const Pair& pair, std::uint64_t vocab_size, Progress& progress) {
  verify_index(pair.index(), pair.index_bytes(), pair.index_path());
  TextCounts counts{.by_id = std::vector<std::uint64_t>(vocab_size)};
  walk(
      pair, 0, pair.index().sequences, vocab_size, progress, [&](auto ids) { count_ids(ids, counts); },
      [&](std::uint64_t tokens) { count_line(tokens, counts); });
  count_words(counts);
  return counts;
}

PairWriter::PairWriter(const std::filesystem::path& data_path, std::filesystem::path lengths_path, IndexKind kind,
                       Dtype dtype, std::uint64_t vocab_size)
    : kind_(kind),
      dtype_(dtype),
      data_(data_path),
      lengths_path_(std::move(lengths_path)),
      lengths_file_(lengths_path_),
      counts_{.by_id = std::vector<std::uint64_t>(vocab_size)} {}

void PairWriter::append(const Pair& pair, std::uint64_t first, std::uint64_t end, Progress& progress) {
  if (kind_ == IndexKind::megatron && pair.index().kind == IndexKind::megatron) check_documents(pair, first, end);
  walk(
      pair, first, end, counts_.by_id.size(), progress, [&](auto ids) { store(ids); },
      [&](std::uint64_t tokens) { add_line(tokens); });
}

void PairWriter::append_ids(std::span<const std::int64_t> ids, std::span<const std::int64_t> lengths) {
  std::size_t end = 0;
  for (const std::int64_t length : lengths) {
    if (length < 1 || static_cast<std::size_t>(length) > ids.size() - end) {
      throw std::invalid_argument("lengths that are not those of the ids");
    }
    end += static_cast<std::size_t>(length);
    if (ids[end - 1] != kEos) throw std::invalid_argument("a line must end with eos");
    add_line(static_cast<std::uint64_t>(length));
  }
  if (end != ids.size()) throw std::invalid_argument("lengths that are not those of the ids");
  for (const std::int64_t id : ids) {
    if (static_cast<std::uint64_t>(id) >= counts_.by_id.size()) throw std::invalid_argument("an id beyond the dictionary");
  }
  store(ids);
}

TextCounts PairWriter::finish(const std::filesystem::path& index_path) {
  flush_lengths();
  write_index(index_path, kind_, dtype_, lengths_path_);
  count_words(counts_);
  return counts_;
}

void PairWriter::store(std::span<const std::int64_t> ids) {
  const std::int64_t bias = Index{.kind = kind_}.id_bias();
  const std::size_t width = element_bytes(dtype_);
  if (!ids.empty() && static_cast<std::uint64_t>(std::ranges::max(ids)) > greatest_id(dtype_, bias)) {
    throw InputError("id " + std::to_string(std::ranges::max(ids)) + " does not fit " + std::string(dtype_name(dtype_)) +
                     "; convert the pairs to one layout first");
  }
  bytes_.resize(ids.size() * width);
  narrow_ids(dtype_, ids, bias, bytes_);
  data_.write_at(counts_.tokens * width, bytes_);
  count_ids(ids, counts_);
}

void PairWriter::add_line(std::uint64_t tokens) {
  lengths_.push_back(narrow_or_throw<std::uint32_t>(tokens, "tokens in one line"));
  if (lengths_.size() == kLengthsPerWrite) flush_lengths();
  count_line(tokens, counts_);
}

void PairWriter::flush_lengths() {
  const auto bytes = std::as_bytes(std::span(lengths_));
  lengths_file_.write_at(lengths_written_, bytes);
  lengths_written_ += bytes.size();
  lengths_.clear();
}

}  // namespace xlm_ds
