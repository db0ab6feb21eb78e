#include "xlm_ds/shards.hpp"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <vector>

#include "check.hpp"
#include "scratch.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/stored_ids.hpp"

namespace {

using xlm_ds::Dtype;
using xlm_ds::IndexKind;
using xlm_ds_test::Scratch;

xlm_ds::TextCounts write_pair(const std::filesystem::path& prefix, IndexKind kind, Dtype dtype,
                              const std::vector<std::int64_t>& ids, const std::vector<std::int64_t>& lengths) {
  xlm_ds::PairWriter writer(xlm_ds::data_path_of(prefix), prefix, kind, dtype, 10);
  writer.append_ids(ids, lengths);
  return writer.finish(xlm_ds::index_path_of(prefix));
}

/// Writes a number over bytes of a file.
template <typename T>
void overwrite(const std::filesystem::path& path, std::streamoff at, T number) {
  std::fstream(path, std::ios::in | std::ios::out | std::ios::binary).seekp(at).write(reinterpret_cast<const char*>(&number), sizeof(number));
}

}  // namespace

TEST(pairs_are_written_and_read_back) {
  const Scratch scratch("shards");
  xlm_ds::Progress progress;
  for (const auto kind : {IndexKind::mmap, IndexKind::lazy, IndexKind::megatron}) {
    const auto dtype = xlm_ds::dtype_to_write(kind, 10);
    const auto written = write_pair(scratch / "a", kind, dtype, {5, 6, 2, 2, 3, 4, 2}, {3, 1, 3});
    CHECK(written.lines == 3 && written.tokens == 7 && written.blank_lines == 1);
    CHECK(written.unknown == 1 && written.literal_specials == 1);
    const xlm_ds::Pair pair(scratch / "a");
    CHECK(pair.line(0) == std::vector<std::int64_t>({5, 6, 2}) && pair.line(2) == std::vector<std::int64_t>({3, 4, 2}));
    CHECK(pair.lines_within(0) == 0 && pair.lines_within(3) == 1 && pair.lines_within(6) == 2 && pair.lines_within(7) == 3);
    CHECK(xlm_ds::verify_pair(pair, 10, progress).by_id == written.by_id);
    CHECK(pair.count_ids(10, progress) == written.by_id);
    CHECK_THROWS(xlm_ds::verify_pair(pair, 6, progress), xlm_ds::InputError);
    CHECK_THROWS((void)pair.line(3), std::out_of_range);

    xlm_ds::PairWriter writer(scratch / "b.bin", scratch / "lengths", kind, dtype, 10);
    writer.append(pair, 1, 3, progress);
    writer.append(pair, 0, 1, progress);
    CHECK(writer.finish(scratch / "b.idx").by_id == written.by_id);
    CHECK(xlm_ds::Pair(scratch / "b").line(2) == pair.line(0));
  }
}

TEST(a_gap_after_the_last_line_asked_for_is_refused) {
  const Scratch scratch("shards");
  write_pair(scratch / "a", IndexKind::mmap, Dtype::uint16, {5, 6, 2, 2, 3, 4, 2}, {3, 1, 3});
  // Line 0 becomes shorter, and ends with eos as well; reading the pair's other lines shows nothing.
  overwrite(scratch / "a.idx", 26, std::int32_t{2});
  overwrite(scratch / "a.bin", 2, std::int16_t{2});
  xlm_ds::Progress progress;
  const xlm_ds::Pair pair(scratch / "a");
  xlm_ds::PairWriter writer(scratch / "b.bin", scratch / "lengths", IndexKind::mmap, Dtype::uint16, 10);
  writer.append(pair, 1, 3, progress);
  CHECK_THROWS(writer.append(pair, 0, 1, progress), xlm_ds::InputError);
}

TEST(lengths_and_starts_outside_the_data_are_refused) {
  const Scratch scratch("shards");
  const auto pair_with = [&](std::streamoff at, auto number) {
    write_pair(scratch / "a", IndexKind::mmap, Dtype::uint16, {5, 6, 2, 2, 3, 4, 2}, {3, 1, 3});
    overwrite(scratch / "a.idx", at, number);
    return xlm_ds::Pair(scratch / "a");
  };
  for (const std::int32_t length : {-1, 8}) {
    const auto pair = pair_with(26 + 4, length);
    CHECK_THROWS((void)pair.count_lengths(), xlm_ds::InputError);
    CHECK_THROWS((void)pair.line(1), xlm_ds::InputError);
  }
  for (const std::int64_t start : {-2, 16, 7}) {  // the last is between two tokens
    const auto pair = pair_with(26 + 3 * 4 + 8, start);
    CHECK_THROWS((void)pair.tokens_before(1), xlm_ds::InputError);
    CHECK_THROWS((void)pair.line(1), xlm_ds::InputError);
    CHECK(pair.count_lengths().size() == 2);
  }
}

TEST(items_of_another_shape_are_not_copied) {
  const Scratch scratch("shards");
  write_pair(scratch / "a", IndexKind::lazy, Dtype::int32, {5, 6, 2, 2, 3, 4, 2}, {3, 1, 3});
  const std::int64_t dimensions = 2;  // of item 0; item 1 has none then
  overwrite(scratch / "a.idx", 48 + 8, dimensions);
  xlm_ds::Progress progress;
  const xlm_ds::Pair pair(scratch / "a");
  xlm_ds::PairWriter writer(scratch / "b.bin", scratch / "lengths", IndexKind::mmap, Dtype::uint16, 10);
  writer.append(pair, 2, 3, progress);
  CHECK_THROWS(writer.append(pair, 0, 1, progress), xlm_ds::InputError);
  CHECK_THROWS(writer.append(pair, 1, 2, progress), xlm_ds::InputError);
}

TEST(what_is_no_line_is_not_written) {
  const Scratch scratch("shards");
  CHECK_THROWS(write_pair(scratch / "a", IndexKind::mmap, Dtype::uint16, {5, 6}, {2}), std::invalid_argument);
  CHECK_THROWS(write_pair(scratch / "a", IndexKind::mmap, Dtype::uint16, {5, 2}, {1, 2}), std::invalid_argument);
  CHECK_THROWS(write_pair(scratch / "a", IndexKind::mmap, Dtype::uint16, {5, 2, 2}, {2}), std::invalid_argument);
  CHECK_THROWS(write_pair(scratch / "a", IndexKind::mmap, Dtype::uint16, {2}, {0, 1}), std::invalid_argument);
  CHECK_THROWS(write_pair(scratch / "a", IndexKind::mmap, Dtype::uint16, {10, 2}, {2}), std::invalid_argument);
  CHECK_THROWS(write_pair(scratch / "a", IndexKind::mmap, Dtype::uint16, {-1, 2}, {2}), std::invalid_argument);
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
