#include "xlm_ds/index_format.hpp"

#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

#include "check.hpp"
#include "fuzz/index_twin.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/file.hpp"
#include "xlm_ds/mapped_file.hpp"

namespace {

constexpr std::array kKinds{xlm_ds::IndexKind::mmap, xlm_ds::IndexKind::lazy, xlm_ds::IndexKind::megatron};

std::filesystem::path scratch(const char* name) {
  return std::filesystem::temp_directory_path() / (std::to_string(::getpid()) + name);
}

std::vector<std::byte> taken(const std::filesystem::path& path) {
  std::vector<std::byte> bytes;
  {
    const xlm_ds::MappedFile file(path);
    bytes.assign(file.bytes().begin(), file.bytes().end());
  }
  std::filesystem::remove(path);
  return bytes;
}

std::vector<std::byte> written(xlm_ds::IndexKind kind, xlm_ds::Dtype dtype, const std::vector<std::uint32_t>& lengths) {
  xlm_ds::OutputFile(scratch(".lengths")).write_at(0, std::as_bytes(std::span(lengths)));
  xlm_ds::write_index(scratch(".idx"), kind, dtype, scratch(".lengths"));
  std::filesystem::remove(scratch(".lengths"));
  return taken(scratch(".idx"));
}

std::vector<std::byte> with_documents(const std::vector<std::int32_t>& lengths, const std::vector<std::uint64_t>& starts) {
  const auto index = xlm_ds_fuzz::megatron_index(static_cast<std::uint8_t>(xlm_ds::Dtype::uint16), lengths, starts);
  const auto bytes = std::as_bytes(std::span(index));
  return {bytes.begin(), bytes.end()};
}

std::vector<std::byte> from_hex(const std::string& digits) {
  std::vector<std::byte> bytes;
  for (std::size_t i = 0; i < digits.size(); i += 2) bytes.push_back(static_cast<std::byte>(std::stoi(digits.substr(i, 2), nullptr, 16)));
  return bytes;
}

template <typename T>
std::vector<std::byte> with(std::vector<std::byte> bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(T));
  return bytes;
}

/// Opens a damaged index whose header and size still agree, and checks every sequence.
void verified(const std::vector<std::byte>& bytes, std::uint64_t data_bytes) {
  xlm_ds::verify_index(xlm_ds::read_index(bytes, data_bytes, "x.idx"), bytes, "x.idx");
}

}  // namespace

TEST(index_round_trip) {
  const std::vector<std::uint32_t> lengths{4, 3, 1};
  for (const auto kind : kKinds) {
    const auto dtype = xlm_ds::dtype_to_write(kind, 9);
    const auto bytes = written(kind, dtype, lengths);
    const std::size_t expected = kind == xlm_ds::IndexKind::mmap ? 26 + 12 * 3 : kind == xlm_ds::IndexKind::lazy ? 64 + 24 * 3 : 34 + 12 * 3 + 8 * 4;
    CHECK(bytes.size() == expected);
    const auto index = xlm_ds::read_index(bytes, 8 * xlm_ds::element_bytes(dtype), "x.idx");
    CHECK(index.kind == kind && index.sequences == 3 && index.tokens == 8);
    CHECK(xlm_ds::sequence_start(index, bytes, 2) == 7 && xlm_ds::sequence_length(index, bytes, 1) == 3);
    xlm_ds::verify_index(index, bytes, "x.idx");
  }
}

TEST(every_truncation_is_refused) {
  for (const auto kind : kKinds) {
    const auto bytes = written(kind, xlm_ds::dtype_to_write(kind, 9), {4, 3});
    for (std::size_t n = 0; n < bytes.size(); ++n) {
      CHECK_THROWS((void)xlm_ds::read_index(std::span(bytes).first(n), 14, "x.idx"), xlm_ds::InputError);
    }
  }
}

TEST(every_flipped_header_byte_is_refused_or_harmless) {
  for (const auto kind : kKinds) {
    const auto dtype = xlm_ds::dtype_to_write(kind, 9);
    const auto bytes = written(kind, dtype, {4, 3});
    const std::size_t header = kind == xlm_ds::IndexKind::mmap ? 26 : kind == xlm_ds::IndexKind::lazy ? 48 : 34;
    for (std::size_t at = 0; at < header; ++at) {
      auto damaged = bytes;
      damaged[at] ^= std::byte{0x10};
      CHECK_THROWS((void)xlm_ds::read_index(damaged, 7 * xlm_ds::element_bytes(dtype), "x.idx"), xlm_ds::InputError);
    }
  }
}

TEST(megatron_bytes_are_the_formats) {
  // Sequences 4 and 3 tokens long, one document each: computed by hand from the layout.
  const auto expected = from_hex("4d4d494449445800000100000000000000" "08" "0200000000000000" "0300000000000000"
                                 "0400000003000000" "0000000000000000" "0800000000000000"
                                 "0000000000000000" "0100000000000000" "0200000000000000");
  CHECK(expected.size() == 82);
  CHECK(written(xlm_ds::IndexKind::megatron, xlm_ds::Dtype::uint16, {4, 3}) == expected);
  CHECK(with_documents({4, 3}, {0, 1, 2}) == expected);
}

TEST(documents_are_read) {
  const auto bytes = with_documents({4, 3, 1, 2}, {0, 3, 3, 4});
  const auto index = xlm_ds::read_index(bytes, 20, "x.idx");
  CHECK(index.kind == xlm_ds::IndexKind::megatron && index.tokens == 10 && index.documents == 3);
  CHECK(xlm_ds::document_start(index, bytes, 0) == 0 && xlm_ds::document_start(index, bytes, 1) == 3);
  CHECK(xlm_ds::document_start(index, bytes, 2) == 3 && xlm_ds::document_start(index, bytes, 3) == 4);
  xlm_ds::verify_index(index, bytes, "x.idx");

  auto multimodal = bytes;  // a mode for each sequence follows the documents
  multimodal.resize(bytes.size() + 4);
  CHECK(xlm_ds::read_index(multimodal, 20, "x.idx").documents == 3);
  multimodal.pop_back();
  CHECK_THROWS((void)xlm_ds::read_index(multimodal, 20, "x.idx"), xlm_ds::InputError);

  const auto empty = with_documents({}, {0});
  CHECK(xlm_ds::read_index(empty, 0, "x.idx").documents == 0);
}

TEST(damaged_documents_are_refused) {
  const auto bytes = with_documents({4, 3}, {0, 1, 2});
  const std::size_t documents = 34 + 12 * 2;
  const auto read = [](const std::vector<std::byte>& damaged) { (void)xlm_ds::read_index(damaged, 14, "x.idx"); };
  CHECK_THROWS(read(with<std::int64_t>(bytes, documents, 1)), xlm_ds::InputError);
  CHECK_THROWS(read(with<std::int64_t>(bytes, documents + 16, 3)), xlm_ds::InputError);
  CHECK_THROWS(read(with<std::uint8_t>(bytes, 17, 7)), xlm_ds::InputError);  // float32
  CHECK_THROWS((void)xlm_ds::read_index(with<std::uint8_t>(bytes, 17, 9), 28, "x.idx"), xlm_ds::InputError);  // fairseq's uint32
  for (const std::int64_t start : {-1, 3}) CHECK_THROWS(verified(with(bytes, documents + 8, start), 14), xlm_ds::InputError);
  auto none = std::vector<std::byte>(bytes.begin(), bytes.end() - 24);
  CHECK_THROWS(read(with<std::uint64_t>(none, 26, 0)), xlm_ds::InputError);
}

TEST(verifying_finds_what_opening_does_not_look_at) {
  for (const auto kind : kKinds) {
    const auto dtype = xlm_ds::dtype_to_write(kind, 9);
    const std::size_t element = xlm_ds::element_bytes(dtype);
    const auto bytes = written(kind, dtype, {4, 3, 1});
    const auto index = xlm_ds::read_index(bytes, 8 * element, "x.idx");
    const std::size_t lengths = index.sizes_offset, starts = index.pointers_offset;
    verified(bytes, 8 * element);
    if (kind == xlm_ds::IndexKind::lazy) {
      CHECK_THROWS(verified(with<std::int64_t>(bytes, lengths + 8, -1), 32), xlm_ds::InputError);
      CHECK_THROWS(verified(with<std::int64_t>(bytes, 48 + 8, 2), 32), xlm_ds::InputError);            // dimensions
      CHECK_THROWS(verified(with<std::int64_t>(bytes, starts + 24, 9), 32), xlm_ds::InputError);       // total
      CHECK_THROWS(verified(with<std::int64_t>(bytes, starts + 8, 3), 32), xlm_ds::InputError);
      continue;
    }
    for (const std::int32_t length : {-1, 2, 5}) CHECK_THROWS(verified(with(bytes, lengths + 4, length), 16), xlm_ds::InputError);
    for (const std::int64_t start : {-8, 6, 9, 10}) CHECK_THROWS(verified(with(bytes, starts + 8, start), 16), xlm_ds::InputError);
    // A negative length with which the starts agree: sequence 1 takes its only token back.
    const auto agreeing = with<std::int64_t>(with<std::int32_t>(with<std::int32_t>(bytes, lengths + 4, -1), lengths + 8, 5), starts + 16, 6);
    CHECK_THROWS(verified(agreeing, 16), xlm_ds::InputError);
  }
}

TEST(dtype_follows_fairseq_and_megatron) {
  using xlm_ds::Dtype;
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::megatron, 65499) == Dtype::uint16);
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::megatron, 65500) == Dtype::int32);
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::megatron, std::uint64_t{1} << 31) == Dtype::int32);
  CHECK_THROWS((void)xlm_ds::dtype_to_write(xlm_ds::IndexKind::megatron, (std::uint64_t{1} << 31) + 1), xlm_ds::InputError);
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::mmap, 65499) == Dtype::uint16);
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::mmap, 65500) == Dtype::uint32);
  CHECK(xlm_ds::dtype_to_write(xlm_ds::IndexKind::lazy, 9) == Dtype::int32);
}
