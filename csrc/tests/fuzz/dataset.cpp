// A pair of files of any bytes (pair_files.hpp), opened and read in blocks. The input's first byte is the break mode, of
// which the two lowest bits count; the second the block's size less one.
#include "xlm_ds/token_dataset.hpp"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "files.hpp"
#include "fuzz.hpp"
#include "index_twin.hpp"
#include "pair_files.hpp"

namespace {

using namespace xlm_ds_fuzz;
using xlm_ds::BreakMode;

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
      const auto start = twin.start(i);
      const bool inside = start && length <= ids.size() && *start <= ids.size() - length;
      if (inside) take(*start, length);
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
    require(filled == all_below(*expected[block], static_cast<std::uint64_t>(vocab_size)), "ids beyond the dictionary are refused");
    require(!filled || Ids(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(length)) == *expected[block], "blocks hold their ids");
  }
  try {
    (void)dataset.block_length(expected.size());
    require(false, "there is no block after the last");
  } catch (const std::out_of_range&) {
    return;
  }
}

std::string input_of(BreakMode mode, std::uint8_t block_size, std::uint16_t vocab_size, const std::string& index,
                     const std::string& data) {
  return PairFiles::input_of(static_cast<std::uint8_t>(mode), static_cast<std::uint8_t>(block_size - 1), vocab_size, index, data);
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
  if (size < PairFiles::kHeaderBytes) return 0;
  const std::string_view input = text_of(data, size);
  const auto mode = static_cast<BreakMode>(number_at<std::uint8_t>(input, 0) % 4);
  const std::size_t block_size = std::size_t{1} + number_at<std::uint8_t>(input, 1);
  const PairFiles files(input);
  files.write_to(folder);
  const bool needs_all = mode == BreakMode::complete || mode == BreakMode::complete_doc;  // checks every sequence
  const bool good = files.fits && (!needs_all || files.twin->whole());
  const bool accepted = accepts([&] {
    const xlm_ds::TokenDataset dataset(folder / "train.ar", mode, block_size);
    require(good, "a pair whose sizes do not agree is refused");
    const auto& lengths = files.twin->lengths;
    require(dataset.tokens() == files.ids.size() && dataset.sequences() == lengths.size(), "tokens and sequences are counted");
    compare(dataset, blocks_of(*files.twin, files.ids, mode, block_size), files.vocab_size);
    const auto longer = std::count_if(lengths.begin(), lengths.end(),
                                      [&](auto length) { return static_cast<std::uint64_t>(length) > block_size; });
    require(dataset.count_cut() == (mode == BreakMode::none ? 0 : static_cast<std::uint64_t>(longer)), "sequences that are cut are counted");
  });
  require(accepted == good, "a pair whose sizes agree is taken");
  count(accepted);
  return 0;
}
