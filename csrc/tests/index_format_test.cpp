#include "xlm_ds/index_format.hpp"

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <unistd.h>
#include <vector>

#include "check.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/mapped_file.hpp"

namespace {

std::filesystem::path scratch(const char* name) {
  return std::filesystem::temp_directory_path() / (std::to_string(::getpid()) + name);
}

std::vector<std::byte> written(xlm_ds::IndexKind kind, xlm_ds::Dtype dtype, const std::vector<std::uint32_t>& lengths) {
  const auto path = scratch(".idx");
  xlm_ds::write_index(path, kind, dtype, std::as_bytes(std::span(lengths)));
  std::vector<std::byte> bytes;
  {
    const xlm_ds::MappedFile file(path);
    bytes.assign(file.bytes().begin(), file.bytes().end());
  }
  std::filesystem::remove(path);
  return bytes;
}

}  // namespace

TEST(index_round_trip) {
  const std::vector<std::uint32_t> lengths{4, 3, 1};
  for (const auto kind : {xlm_ds::IndexKind::mmap, xlm_ds::IndexKind::lazy}) {
    const auto dtype = xlm_ds::dtype_to_write(kind, 9);
    const auto bytes = written(kind, dtype, lengths);
    CHECK(bytes.size() == (kind == xlm_ds::IndexKind::mmap ? 26 + 12 * 3 : 64 + 24 * 3));
    const auto index = xlm_ds::read_index(bytes, 8 * xlm_ds::element_bytes(dtype), "x.idx");
    CHECK(index.sequences == 3 && index.tokens == 8);
    CHECK(xlm_ds::sequence_start(index, bytes, 2) == 7 && xlm_ds::sequence_length(index, bytes, 1) == 3);
    xlm_ds::verify_index(index, bytes, "x.idx");
  }
}

TEST(every_truncation_is_refused) {
  for (const auto kind : {xlm_ds::IndexKind::mmap, xlm_ds::IndexKind::lazy}) {
    const auto bytes = written(kind, xlm_ds::dtype_to_write(kind, 9), {4, 3});
    for (std::size_t n = 0; n < bytes.size(); ++n) {
      CHECK_THROWS((void)xlm_ds::read_index(std::span(bytes).first(n), 14, "x.idx"), xlm_ds::InputError);
    }
  }
}

TEST(every_flipped_header_byte_is_refused_or_harmless) {
  for (const auto kind : {xlm_ds::IndexKind::mmap, xlm_ds::IndexKind::lazy}) {
    const auto dtype = xlm_ds::dtype_to_write(kind, 9);
    const auto bytes = written(kind, dtype, {4, 3});
    const std::size_t header = kind == xlm_ds::IndexKind::mmap ? 26 : 48;
    for (std::size_t at = 0; at < header; ++at) {
      auto damaged = bytes;
      damaged[at] ^= std::byte{0x10};
      CHECK_THROWS((void)xlm_ds::read_index(damaged, 7 * xlm_ds::element_bytes(dtype), "x.idx"), xlm_ds::InputError);
    }
  }
}

TEST(dtype_follows_fairseq) {
  using xlm_ds::Dtype;
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::mmap, 65499) == Dtype::uint16);
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::mmap, 65500) == Dtype::uint32);
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::lazy, 9) == Dtype::int32);
}
