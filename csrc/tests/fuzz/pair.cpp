// A pair of files of any bytes (pair_files.hpp), read in lines, verified and written anew. The input's first byte is the
// layout and element type to write: 0x20 for those of the pair, else of its five lower bits two for the layout (0 and 3 are
// mmap, 1 lazy, 2 megatron) and three for the type. The second is which lines: the lower half where they begin, the upper
// how many at the end are left out.
#include "xlm_ds/shards.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "files.hpp"
#include "fuzz.hpp"
#include "index_twin.hpp"
#include "pair_files.hpp"
#include "xlm_ds/special_ids.hpp"

namespace {

using namespace xlm_ds_fuzz;
using xlm_ds::Dtype;
using xlm_ds::IndexKind;
using Lines = std::vector<Ids>;

constexpr std::array kDtypes{Dtype::uint16, Dtype::int32, Dtype::uint32, Dtype::int64,
                             Dtype::uint8,  Dtype::int8,  Dtype::int16,  Dtype::uint64};

/// None if the line is not within the .bin, or is a matrix.
std::optional<Ids> line_of(const PairFiles& files, std::size_t i) {
  if (!files.twin->is_flat(i)) return std::nullopt;
  const auto start = files.twin->start(i);
  const auto length = static_cast<std::uint64_t>(files.twin->lengths[i]);
  if (!start || length > files.ids.size() || *start > files.ids.size() - length) return std::nullopt;
  const auto begin = files.ids.begin() + static_cast<std::ptrdiff_t>(*start);
  return Ids(begin, begin + static_cast<std::ptrdiff_t>(length));
}

/// Lines [first, end); none unless each begins where the one before it ends, ends with eos, and has no other ids than the
/// dictionary.
std::optional<Lines> lines_of(const PairFiles& files, std::size_t first, std::size_t end) {
  const auto start = [&](std::size_t i) -> std::optional<std::uint64_t> {
    return i == files.twin->lengths.size() ? files.ids.size() : files.twin->start(i);
  };
  auto at = start(first);
  if (!at || *at > files.ids.size()) return std::nullopt;
  Lines lines;
  for (std::size_t i = first; i < end; ++i) {
    const auto line = line_of(files, i);
    if (!line || start(i) != at || line->empty() || line->back() != xlm_ds::kEos) return std::nullopt;
    if (!all_below(*line, static_cast<std::uint64_t>(files.vocab_size))) return std::nullopt;
    *at += line->size();
    lines.push_back(*line);
  }
  return start(end) == at ? std::optional(lines) : std::nullopt;
}

std::vector<std::uint64_t> counts_of(const Ids& ids, std::int64_t vocab_size) {
  std::vector<std::uint64_t> counts(static_cast<std::size_t>(vocab_size));
  for (const auto id : ids) ++counts[static_cast<std::size_t>(id)];
  return counts;
}

void compare_counts(const xlm_ds::TextCounts& counts, const Lines& lines, std::int64_t vocab_size) {
  Ids all;
  std::uint64_t blank = 0, unknown = 0, literal = 0;
  for (const auto& line : lines) {
    all.insert(all.end(), line.begin(), line.end());
    blank += line.size() == 1 ? 1 : 0;
    for (std::size_t i = 0; i + 1 < line.size(); ++i) literal += line[i] < xlm_ds::kSpecials && line[i] != xlm_ds::kUnk ? 1 : 0;
    unknown += static_cast<std::uint64_t>(std::count(line.begin(), line.end(), xlm_ds::kUnk));
  }
  require(counts.lines == lines.size() && counts.tokens == all.size() && counts.blank_lines == blank, "lines are counted");
  require(counts.unknown == unknown && counts.literal_specials == literal, "special words are counted");
  require(counts.by_id == counts_of(all, vocab_size), "every id is counted");
}

void compare_reading(const xlm_ds::Pair& pair, const PairFiles& files) {
  const auto& lengths = files.twin->lengths;
  require(pair.index().sequences == lengths.size() && pair.index().tokens == files.ids.size(), "lines and tokens are counted");
  std::map<std::uint64_t, std::uint64_t> expected;
  bool possible = true;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const auto line = line_of(files, i);
    Ids found;
    const bool read = accepts([&] { found = pair.line(i); });
    const bool readable = line && all_below(*line, std::numeric_limits<std::int64_t>::max());
    require(read == readable && (!read || found == *line), "a line has the ids between its start and its end");
    const auto start = files.twin->start(i);
    const bool placed = accepts([&] { require(pair.tokens_before(i) == start, "a line begins at its start"); });
    require(placed == (start && *start <= files.ids.size()), "a start outside the .bin is refused");
    const auto length = static_cast<std::uint64_t>(lengths[i]);
    possible = possible && length <= files.ids.size();
    ++expected[length];
  }
  std::vector<std::pair<std::uint64_t, std::uint64_t>> by_length;
  require(accepts([&] { by_length = pair.count_lengths(); }) == possible, "a length that cannot be is refused");
  const bool same = std::equal(by_length.begin(), by_length.end(), expected.begin(), expected.end(),
                               [](const auto& a, const auto& b) { return a.first == b.first && a.second == b.second; });
  require(!possible || same, "lengths are counted");
  xlm_ds::Progress progress;
  std::vector<std::uint64_t> by_id;
  const bool counted = accepts([&] { by_id = pair.count_ids(static_cast<std::uint64_t>(files.vocab_size), progress); });
  require(counted == all_below(files.ids, static_cast<std::uint64_t>(files.vocab_size)), "only ids of the dictionary are counted");
  require(!counted || by_id == counts_of(files.ids, files.vocab_size), "every id of the .bin is counted");
}

void compare_places(const xlm_ds::Pair& pair, const PairFiles& files) {
  std::uint64_t lines = 0, end = 0;  // of all lines before
  for (std::uint64_t tokens = 0; tokens <= files.ids.size(); ++tokens) {
    for (; lines < files.twin->lengths.size(); ++lines) {
      const std::uint64_t next = end + static_cast<std::uint64_t>(files.twin->lengths[lines]);
      if (next > tokens) break;
      end = next;
    }
    require(pair.lines_within(tokens) == lines, "lines within so many tokens are counted");
  }
}

struct Wanted {
  IndexKind kind;
  Dtype dtype;
  std::size_t first, middle, end;  // lines, appended in two parts

  Wanted(std::string_view input, const IndexTwin& twin) {
    const auto shape = number_at<std::uint8_t>(input, 0), place = number_at<std::uint8_t>(input, 1);
    constexpr std::array kKinds{IndexKind::mmap, IndexKind::lazy, IndexKind::megatron, IndexKind::mmap};
    kind = kKinds[shape % 4];
    dtype = kDtypes[shape / 4 % 8];
    if (kind == IndexKind::megatron && dtype >= Dtype::uint32) dtype = Dtype::int32;  // it knows no others
    if ((shape & 0x20) != 0) {
      kind = twin.kind;
      dtype = static_cast<Dtype>(twin.dtype);
    }
    const std::size_t lines = twin.lengths.size();
    first = std::min<std::size_t>(place % 16, lines);
    end = lines - std::min<std::size_t>(place / 16, lines - first);
    middle = first + (end - first) / 2;
  }
};

bool fit(const Lines& lines, const Wanted& wanted) {
  const bool is_signed = wanted.dtype >= Dtype::int8 && wanted.dtype <= Dtype::int64;
  const std::size_t bits = 8 * width_of(static_cast<std::uint64_t>(wanted.dtype)) - (is_signed ? 1 : 0);
  const std::uint64_t greatest = std::numeric_limits<std::uint64_t>::max() >> (64 - bits);
  const std::uint64_t bias = wanted.kind == IndexKind::lazy ? 1 : 0;
  return std::all_of(lines.begin(), lines.end(), [&](const Ids& line) { return all_below(line, greatest - bias + (bits < 64 ? 1 : 0)); });
}

/// Of whole lines, as the layout describes it.
std::pair<std::string, std::string> files_of(const Lines& lines, const Wanted& wanted) {
  std::string bin;
  std::vector<std::int32_t> lengths;
  std::vector<std::uint64_t> lazy_lengths, documents;
  for (const auto& line : lines) {
    documents.push_back(lengths.size());
    lengths.push_back(static_cast<std::int32_t>(line.size()));
    lazy_lengths.push_back(line.size());
    for (const auto id : line) {
      std::string stored;
      put(stored, id + (wanted.kind == IndexKind::lazy ? 1 : 0));
      bin += stored.substr(0, width_of(static_cast<std::uint64_t>(wanted.dtype)));  // little-endian
    }
  }
  documents.push_back(lengths.size());
  const auto dtype = static_cast<std::uint8_t>(wanted.dtype);
  switch (wanted.kind) {
    case IndexKind::mmap: return {mmap_index(dtype, lengths), bin};
    case IndexKind::lazy: return {lazy_index(dtype, lazy_lengths), bin};
    case IndexKind::megatron: break;
  }
  return {megatron_index(dtype, lengths, documents), bin};
}

/// A document for each line, as they are written.
bool has_simple_documents(const IndexTwin& twin, const Wanted& wanted) {
  if (twin.documents.size() != twin.lengths.size() + 1) return false;
  for (std::size_t i = wanted.first; i < wanted.end; ++i) {
    if (twin.documents[i] != i) return false;
  }
  return true;
}

void compare_writing(const xlm_ds::Pair& pair, const PairFiles& files, const Wanted& wanted, const Folder& folder) {
  const auto lines = lines_of(files, wanted.first, wanted.end);
  const bool both_megatron = files.twin->kind == IndexKind::megatron && wanted.kind == IndexKind::megatron;
  const bool good = lines && fit(*lines, wanted) && (!both_megatron || has_simple_documents(*files.twin, wanted));
  xlm_ds::Progress progress;
  const bool written = accepts([&] {
    xlm_ds::PairWriter writer(folder / "new.ar.bin", folder / "lengths", wanted.kind, wanted.dtype,
                              static_cast<std::uint64_t>(files.vocab_size));
    writer.append(pair, wanted.first, wanted.middle, progress);
    writer.append(pair, wanted.middle, wanted.end, progress);
    const auto counts = writer.finish(folder / "new.ar.idx");
    require(good, "what are no whole lines, or do not fit the new pair, is refused");
    compare_counts(counts, *lines, files.vocab_size);
  });
  require(written == good, "whole lines are written");
  if (!written) return;
  const auto [idx, bin] = files_of(*lines, wanted);
  require(folder.read("new.ar.idx") == idx && folder.read("new.ar.bin") == bin, "a new pair has the bytes of its layout");
}

constexpr std::uint8_t kSame = 0x20;

}  // namespace

std::vector<std::string> xlm_ds_fuzz::seeds() {
  using namespace std::string_literals;
  const auto ids = "\5\0\6\0\7\0\2\0\5\0\3\0\2\0\2\0"s;
  const auto stored = "\6\0\0\0\3\0\0\0\7\0\0\0\3\0\0\0"s;
  const auto input_of = PairFiles::input_of;
  return {input_of(kSame, 0, 9, mmap_index(8, {4, 3, 1}), ids),
          input_of(1, 0x01, 300, mmap_index(8, {1, 3, 3, 1}), "\2\0"s + ids.substr(0, 4) + "\2\0"s + ids.substr(8)),
          input_of(4 + 1, 0x10, 9, mmap_index(1, {1, 2, 3}), "\2\4\2\0\1\2"s),
          input_of(kSame, 0, 9, mmap_index(8, {}), ""),
          input_of(kSame, 0x11, 9, megatron_index(8, {4, 3, 1}, {0, 1, 2, 3}), ids),
          input_of(4 + 2, 0, 9, mmap_index(9, {1, 1}), "\2\0\0\0\2\0\0\0"s),
          input_of(3, 0, 9, megatron_index(8, {4, 3, 1}, {0, 2, 3}), ids),
          input_of(kSame, 0, 300, lazy_index(4, {2, 2}), stored),
          input_of(28, 0, 70, lazy_index(5, {1, 2}), "\3\0\0\0\0\0\0\0\6\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0"s)};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Folder folder;
  if (size < PairFiles::kHeaderBytes) return 0;
  const PairFiles files(text_of(data, size));
  files.write_to(folder);
  bool verified = false;
  const bool opened = accepts([&] {
    const xlm_ds::Pair pair(folder / "train.ar");
    require(files.fits, "a pair whose sizes do not agree is refused");
    compare_reading(pair, files);
    const bool whole = files.twin->whole();
    const auto lines = lines_of(files, 0, files.twin->lengths.size());
    verified = accepts([&] {
      xlm_ds::Progress progress;
      const auto counts = xlm_ds::verify_pair(pair, static_cast<std::uint64_t>(files.vocab_size), progress);
      require(whole && lines, "what is verified are whole lines of the dictionary, one after another");
      compare_counts(counts, *lines, files.vocab_size);
    });
    require(verified == (whole && lines), "whole lines of the dictionary are verified");
    if (whole) compare_places(pair, files);
    compare_writing(pair, files, Wanted(text_of(data, size), *files.twin), folder);
  });
  require(opened == files.fits, "a pair whose sizes agree is opened");
  count(verified);
  return 0;
}
