#include "xlm_ds/shards.hpp"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <unistd.h>
#include <vector>

#include "check.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/stored_ids.hpp"

namespace {

using xlm_ds::Dtype;
using xlm_ds::IndexKind;

/// A folder that goes with the object.
struct Scratch {
  std::filesystem::path folder = std::filesystem::temp_directory_path() / (std::to_string(::getpid()) + ".shards");
  Scratch() { std::filesystem::create_directory(folder); }
  ~Scratch() { std::filesystem::remove_all(folder); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  [[nodiscard]] std::filesystem::path path(const char* name) const { return folder / name; }

  xlm_ds::TextCounts write(const char* name, IndexKind kind, Dtype dtype, const std::vector<std::int64_t>& ids,
                           const std::vector<std::int64_t>& lengths) const {
    xlm_ds::PairWriter writer(path(name) += ".bin", path("lengths"), kind, dtype, 10);
    writer.append_ids(ids, lengths);
    return writer.finish(path(name) += ".idx");
  }
};

}  // namespace

TEST(pairs_are_written_and_read_back) {
  const Scratch scratch;
  xlm_ds::Progress progress;
  for (const auto kind : {IndexKind::mmap, IndexKind::lazy, IndexKind::megatron}) {
    const auto dtype = xlm_ds::dtype_to_write(kind, 10);
    const auto written = scratch.write("a", kind, dtype, {5, 6, 2, 2, 3, 4, 2}, {3, 1, 3});
    CHECK(written.lines == 3 && written.tokens == 7 && written.blank_lines == 1);
    CHECK(written.unknown == 1 && written.literal_specials == 1);
    const xlm_ds::Pair pair(scratch.path("a"));
    CHECK(pair.line(0) == std::vector<std::int64_t>({5, 6, 2}) && pair.line(2) == std::vector<std::int64_t>({3, 4, 2}));
    CHECK(pair.lines_within(0) == 0 && pair.lines_within(3) == 1 && pair.lines_within(6) == 2 && pair.lines_within(7) == 3);
    CHECK(xlm_ds::verify_pair(pair, 10, progress).by_id == written.by_id);
    CHECK(pair.count_ids(10, progress) == written.by_id);
    CHECK_THROWS(xlm_ds::verify_pair(pair, 6, progress), xlm_ds::InputError);
    CHECK_THROWS((void)pair.line(3), std::out_of_range);

    xlm_ds::PairWriter writer(scratch.path("b.bin"), scratch.path("lengths"), kind, dtype, 10);
    writer.append(pair, 1, 3, progress);
    writer.append(pair, 0, 1, progress);
    CHECK(writer.finish(scratch.path("b.idx")).by_id == written.by_id);
    CHECK(xlm_ds::Pair(scratch.path("b")).line(2) == pair.line(0));
  }
}

TEST(a_gap_after_the_last_line_asked_for_is_refused) {
  const Scratch scratch;
  scratch.write("a", IndexKind::mmap, Dtype::uint16, {5, 6, 2, 2, 3, 4, 2}, {3, 1, 3});
  const std::int32_t shorter = 2;  // than line 0 is; reading the pair's other lines shows nothing
  {
    std::fstream index(scratch.path("a.idx"), std::ios::in | std::ios::out | std::ios::binary);
    index.seekp(26).write(reinterpret_cast<const char*>(&shorter), sizeof(shorter));
    std::fstream data(scratch.path("a.bin"), std::ios::in | std::ios::out | std::ios::binary);
    data.seekp(2).write("\2", 1);  // that line ends with eos as well
  }
  xlm_ds::Progress progress;
  const xlm_ds::Pair pair(scratch.path("a"));
  xlm_ds::PairWriter writer(scratch.path("b.bin"), scratch.path("lengths"), IndexKind::mmap, Dtype::uint16, 10);
  writer.append(pair, 1, 3, progress);
  CHECK_THROWS(writer.append(pair, 0, 1, progress), xlm_ds::InputError);
}

TEST(items_of_another_shape_are_not_copied) {
  const Scratch scratch;
  scratch.write("a", IndexKind::lazy, Dtype::int32, {5, 6, 2, 2, 3, 4, 2}, {3, 1, 3});
  const std::int64_t dimensions = 2;  // of item 0; item 1 has none then
  std::fstream(scratch.path("a.idx"), std::ios::in | std::ios::out | std::ios::binary)
      .seekp(48 + 8)
      .write(reinterpret_cast<const char*>(&dimensions), sizeof(dimensions));
  xlm_ds::Progress progress;
  const xlm_ds::Pair pair(scratch.path("a"));
  xlm_ds::PairWriter writer(scratch.path("b.bin"), scratch.path("lengths"), IndexKind::mmap, Dtype::uint16, 10);
  writer.append(pair, 2, 3, progress);
  CHECK_THROWS(writer.append(pair, 0, 1, progress), xlm_ds::InputError);
  CHECK_THROWS(writer.append(pair, 1, 2, progress), xlm_ds::InputError);
}

TEST(what_is_no_line_is_not_written) {
  const Scratch scratch;
  CHECK_THROWS(scratch.write("a", IndexKind::mmap, Dtype::uint16, {5, 6}, {2}), std::invalid_argument);
  CHECK_THROWS(scratch.write("a", IndexKind::mmap, Dtype::uint16, {5, 2}, {1, 2}), std::invalid_argument);
  CHECK_THROWS(scratch.write("a", IndexKind::mmap, Dtype::uint16, {5, 2, 2}, {2}), std::invalid_argument);
  CHECK_THROWS(scratch.write("a", IndexKind::mmap, Dtype::uint16, {2}, {0, 1}), std::invalid_argument);
  CHECK_THROWS(scratch.write("a", IndexKind::mmap, Dtype::uint16, {10, 2}, {2}), std::invalid_argument);
  CHECK_THROWS(scratch.write("a", IndexKind::mmap, Dtype::uint16, {-1, 2}, {2}), std::invalid_argument);
}

TEST(stored_ids_round_trip) {
  const std::vector<std::int64_t> ids{0, 1, 100, 126};
  for (const auto dtype : {Dtype::uint8, Dtype::int8, Dtype::int16, Dtype::int32, Dtype::int64, Dtype::uint16, Dtype::uint32,
                           Dtype::uint64}) {
    for (const std::int64_t bias : {0, 1}) {
      std::vector<std::byte> stored(ids.size() * xlm_ds::element_bytes(dtype));
      xlm_ds::narrow_ids(dtype, ids, bias, stored);
      std::vector<std::int64_t> back(ids.size());
      CHECK(xlm_ds::widen_ids(dtype, stored.data(), bias, back) == 126);
      CHECK(back == ids);
      CHECK(xlm_ds::greatest_id(dtype, bias) >= 126);
    }
  }
  CHECK(xlm_ds::greatest_id(Dtype::uint16, 0) == 65535 && xlm_ds::greatest_id(Dtype::int32, 1) == 2147483646);
  const std::byte zeros[4] = {};
  std::int64_t id = 0;
  const auto greatest = xlm_ds::widen_ids(Dtype::int32, zeros, 1, {&id, 1});  // a stored 0 of TNTIDX is the id -1
  CHECK(id == -1 && greatest == std::numeric_limits<std::uint64_t>::max());
}
