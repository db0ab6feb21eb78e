// A pair of files of any bytes, opened, read in blocks and counted. An input is the break mode (one byte, of which the two
// lowest bits count), the block's size less one, the size of the dictionary (two bytes), the .bin's size in bytes (two bytes; 0xFFFF
// for the one that fits, cut or filled up with zeros), the .idx's size (two bytes), the .idx and the .bin.
#include "xlm_ds/token_dataset.hpp"

#include <algorithm>
#include <fcntl.h>
#include <filesystem>
#include <limits>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

#include "fuzz.hpp"
#include "index_twin.hpp"

namespace {

using namespace xlm_ds_fuzz;
using xlm_ds::BreakMode;
using Ids = std::vector<std::int64_t>;

constexpr std::size_t kHeaderBytes = 8;
constexpr std::uint16_t kFitting = 0xFFFF;
constexpr std::uint64_t kLargestData = 4096;

/// A folder in memory if there is one, removed at the end.
class Folder {
 public:
  Folder() {
    const std::filesystem::path memory = "/dev/shm";
    const auto parent = std::filesystem::exists(memory) ? memory : std::filesystem::temp_directory_path();
    path_ = parent / ("xlm_ds_fuzz_" + std::to_string(::getpid()));
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  [[nodiscard]] std::filesystem::path prefix() const { return path_ / "train.ar"; }

  void write(const char* suffix, std::string_view content) const {
    const int file = ::open((prefix() += suffix).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    require(file >= 0 && ::write(file, content.data(), content.size()) == static_cast<ssize_t>(content.size()),
            "a file can be written");
    ::close(file);
  }

 private:
  std::filesystem::path path_;
};

std::int64_t id_at(std::string_view data, std::uint64_t i, const IndexTwin& twin) {
  const std::size_t at = i * twin.width;
  // By unsigned arithmetic, which wraps: a uint64 beyond int64 becomes a negative id, and so is refused.
  const auto stored = [&]() -> std::uint64_t {
    switch (twin.dtype) {
      case 1: return number_at<std::uint8_t>(data, at);
      case 2: return static_cast<std::uint64_t>(number_at<std::int8_t>(data, at));
      case 3: return static_cast<std::uint64_t>(number_at<std::int16_t>(data, at));
      case 4: return static_cast<std::uint64_t>(number_at<std::int32_t>(data, at));
      case 8: return number_at<std::uint16_t>(data, at);
      case 9: return number_at<std::uint32_t>(data, at);
      default: return number_at<std::uint64_t>(data, at);
    }
  }();
  return static_cast<std::int64_t>(stored - (twin.lazy() ? 1 : 0));
}

/// The blocks a dataset of this pair should have; none for a sequence that lies outside the .bin.
std::vector<std::optional<Ids>> blocks_of(const IndexTwin& twin, const Ids& ids, BreakMode mode, std::size_t size) {
  std::vector<std::optional<Ids>> blocks;
  const auto take = [&](std::uint64_t first, std::uint64_t length) {
    const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(first);
    blocks.emplace_back(Ids(begin, begin + static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(length, size))));
  };
  if (mode == BreakMode::none) {
    for (std::size_t at = 0; at < ids.size(); at += size) take(at, ids.size() - at);
    return blocks;
  }
  std::uint64_t first = 0, end = 0;  // of the block that is being filled
  const auto end_block = [&] {
    if (end != first) take(first, end - first);
    first = end;
  };
  for (std::size_t i = 0; i < twin.lengths.size(); ++i) {
    const auto length = static_cast<std::uint64_t>(twin.lengths[i]);
    if (mode == BreakMode::eos) {
      const std::uint64_t start = twin.lazy() ? twin.starts[i] : twin.starts[i] / twin.width;
      const bool inside = length <= ids.size() && start <= ids.size() - length;
      if (inside) take(start, length);
      if (!inside) blocks.emplace_back();
    } else if (mode == BreakMode::complete_doc && length == 1) {
      end_block();
      first = ++end;
    } else {
      if (end - first + length > size) end_block();
      end += length;
    }
  }
  end_block();
  return blocks;
}

bool all_below(const Ids& ids, std::int64_t vocab_size) {
  return std::all_of(ids.begin(), ids.end(), [&](auto id) { return id >= 0 && id < vocab_size; });
}

void compare(const xlm_ds::TokenDataset& dataset, const std::vector<std::optional<Ids>>& expected, std::int64_t vocab_size) {
  require(dataset.blocks() == expected.size(), "the blocks are counted");
  Ids out(dataset.block_size(), -7);
  for (std::uint64_t block = 0; block < expected.size(); ++block) {
    std::size_t length = 0;
    const bool placed = accepts([&] { length = dataset.block_length(block); });
    require(placed == expected[block].has_value(), "a sequence outside the .bin is refused");
    if (!placed) continue;
    require(length == expected[block]->size(), "a block's length is known");
    dataset.prefetch_block(block);
    const bool filled = accepts([&] { length = dataset.fill_block(block, vocab_size, out); });
    require(filled == all_below(*expected[block], vocab_size), "ids beyond the dictionary are refused");
    require(!filled || Ids(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(length)) == *expected[block], "blocks hold their ids");
  }
  try {
    (void)dataset.block_length(expected.size());
    require(false, "there is no block after the last");
  } catch (const std::out_of_range&) {
    return;
  }
}

void compare_counts(const xlm_ds::TokenDataset& dataset, const Ids& ids, std::int64_t vocab_size) {
  std::vector<std::uint64_t> found;
  const bool counted = accepts([&] { found = dataset.count_ids(vocab_size); });
  require(counted == all_below(ids, vocab_size), "only ids of the dictionary are counted");
  if (!counted) return;
  std::vector<std::uint64_t> expected(static_cast<std::size_t>(vocab_size));
  for (const auto id : ids) ++expected[static_cast<std::size_t>(id)];
  require(found == expected, "every id is counted");
}

std::string input_of(BreakMode mode, std::uint8_t block_size, std::uint16_t vocab_size, const std::string& index,
                     const std::string& data) {
  std::string bytes;
  put(bytes, static_cast<std::uint8_t>(mode));
  put(bytes, static_cast<std::uint8_t>(block_size - 1));
  put(bytes, vocab_size);
  put(bytes, kFitting);
  put(bytes, static_cast<std::uint16_t>(index.size()));
  return bytes + index + data;
}

}  // namespace

std::vector<std::string> xlm_ds_fuzz::seeds() {
  using namespace std::string_literals;
  const auto ids = "\5\0\6\0\7\0\2\0\5\0\3\0\2\0\2\0"s;
  const auto stored = "\6\0\0\0\3\0\0\0\7\0\0\0\3\0\0\0"s;
  return {input_of(BreakMode::none, 3, 9, mmap_index(8, {4, 3, 1}), ids),
          input_of(BreakMode::eos, 3, 9, mmap_index(8, {4, 3, 1}), ids),
          input_of(BreakMode::eos, 255, 200, mmap_index(1, {1, 2, 3}), "\1\2\3\4\5\2"),
          input_of(BreakMode::none, 200, 9, mmap_index(8, {}), ""),
          input_of(BreakMode::complete, 5, 9, mmap_index(8, {4, 1, 3}), ids),
          input_of(BreakMode::complete_doc, 9, 9, megatron_index(8, {4, 1, 3}, {0, 2, 3}), ids),
          input_of(BreakMode::none, 1, 300, lazy_index(4, {2, 2}), stored),
          input_of(BreakMode::eos, 2, 300, lazy_index(5, {1, 0, 1}), "\6\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0"s),
          input_of(BreakMode::none, 2, 300, lazy_index(5, {1}), "\0\0\0\0\0\0\0\x80"s)};  // less one, it is an overflow
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Folder folder;
  if (size < kHeaderBytes) return 0;
  const std::string_view input = text_of(data, size);
  const auto mode = static_cast<BreakMode>(number_at<std::uint8_t>(input, 0) % 4);
  const std::size_t block_size = std::size_t{1} + number_at<std::uint8_t>(input, 1);
  const std::int64_t vocab_size = number_at<std::uint16_t>(input, 2);
  const auto wanted = number_at<std::uint16_t>(input, 4);
  const std::string_view idx = input.substr(kHeaderBytes, number_at<std::uint16_t>(input, 6));
  std::string bin(input.substr(kHeaderBytes + idx.size()));

  const auto twin = parse_index(idx);
  const auto fitting = twin ? twin->data_bytes() : std::nullopt;
  if (wanted != kFitting) {
    bin.resize(std::min<std::size_t>(wanted, kLargestData));
  } else if (fitting && *fitting <= kLargestData) {
    bin.resize(*fitting);
  }
  folder.write(".idx", idx);
  folder.write(".bin", bin);
  const bool needs_all = mode == BreakMode::complete || mode == BreakMode::complete_doc;  // checks every sequence
  const bool good = fitting == bin.size() && (!needs_all || twin->whole());
  const bool accepted = accepts([&] {
    const xlm_ds::TokenDataset dataset(folder.prefix(), mode, block_size);
    require(good, "a pair whose sizes do not agree is refused");
    Ids ids;
    for (std::uint64_t i = 0; i < bin.size() / twin->width; ++i) ids.push_back(id_at(bin, i, *twin));
    require(dataset.tokens() == ids.size() && dataset.sequences() == twin->lengths.size(), "tokens and sequences are counted");
    compare(dataset, blocks_of(*twin, ids, mode, block_size), vocab_size);
    compare_counts(dataset, ids, vocab_size);
    const auto longer = std::count_if(twin->lengths.begin(), twin->lengths.end(),
                                      [&](auto length) { return static_cast<std::uint64_t>(length) > block_size; });
    require(dataset.count_cut() == (mode == BreakMode::none ? 0 : static_cast<std::uint64_t>(longer)), "sequences that are cut are counted");
  });
  require(accepted == good, "a pair whose sizes agree is taken");
  count(accepted);
  return 0;
}
