#include "xlm_ds/index_format.hpp"

#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <functional>
#include <ios>
#include <optional>
#include <string>
#include <system_error>
#include <type_traits>
#include <vector>

#include "xlm_ds/error.hpp"

static_assert(std::endian::native == std::endian::little, "both formats are little-endian and are read without swapping");

namespace xlm_ds {
namespace {

// The magics contain NUL bytes: MMIDIDX is 9 bytes long, so that everything after it is unaligned.
constexpr std::array<char, 9> kMmapMagic{'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr std::array<char, 8> kLazyMagic{'T', 'N', 'T', 'I', 'D', 'X', '\0', '\0'};
constexpr std::uint64_t kVersion = 1;

constexpr std::size_t kMmapVersionOffset = 9, kMmapDtypeOffset = 17, kMmapCountOffset = 18, kMmapSizesOffset = 26;
constexpr std::size_t kLazyVersionOffset = 8, kLazyDtypeOffset = 16, kLazyElementOffset = 24, kLazyCountOffset = 32,
                      kLazySizesCountOffset = 40, kLazyDimOffset = 48;
constexpr std::uint64_t kMaxSequences = std::uint64_t{1} << 56;  // so that no size computed from a header overflows
constexpr std::uint64_t kFairseqUint16Limit = 65500;
constexpr std::uint64_t kUint32Limit = 4294967295;
constexpr std::size_t kWriteBufferBytes = std::size_t{1} << 18;

template <typename T>
T load(std::span<const std::byte> bytes, std::size_t offset) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value, bytes.subspan(offset, sizeof(T)).data(), sizeof(T));
  return value;
}

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& what) {
  throw InputError(path.string() + ": " + what);
}

template <std::size_t N>
bool starts_with(std::span<const std::byte> bytes, const std::array<char, N>& magic) {
  return bytes.size() >= N && std::memcmp(bytes.data(), magic.data(), N) == 0;
}

std::optional<Dtype> dtype_from_code(std::uint64_t code) {
  switch (code) {
    case 1: case 2: case 3: case 4: case 5: case 8: case 9: case 10:
      return static_cast<Dtype>(code);
    default:
      return std::nullopt;  // 6 and 7 are floating point: not token ids
  }
}

Dtype checked_dtype(std::uint64_t code, const std::filesystem::path& path) {
  const auto dtype = dtype_from_code(code);
  if (!dtype) refuse(path, "dtype code " + std::to_string(code) + " is not one of the integer types token ids are stored in");
  return *dtype;
}

void check_version(std::uint64_t version, const std::filesystem::path& path) {
  if (version != kVersion) refuse(path, "format version " + std::to_string(version) + ", expected 1");
}

void check_size(std::uint64_t found, std::uint64_t expected, std::uint64_t sequences, const std::filesystem::path& path) {
  if (found == expected) return;
  refuse(path, "the header says " + std::to_string(sequences) + " sequences, which take " + std::to_string(expected) +
                   " bytes, but the file has " + std::to_string(found) +
                   (found < expected ? " (truncated); binarize again" : " (another program's layout?); binarize again"));
}

void check_count(std::uint64_t sequences, const std::filesystem::path& path) {
  if (sequences > kMaxSequences) refuse(path, "impossible number of sequences " + std::to_string(sequences) + " in the header");
}

Index read_mmap_header(std::span<const std::byte> bytes, const std::filesystem::path& path) {
  if (bytes.size() < kMmapSizesOffset) refuse(path, "only " + std::to_string(bytes.size()) + " bytes: the header is truncated; binarize again");
  Index index{.kind = IndexKind::mmap};
  check_version(load<std::uint64_t>(bytes, kMmapVersionOffset), path);
  index.dtype = checked_dtype(load<std::uint8_t>(bytes, kMmapDtypeOffset), path);
  index.sequences = load<std::uint64_t>(bytes, kMmapCountOffset);
  check_count(index.sequences, path);
  check_size(bytes.size(), kMmapSizesOffset + 12 * index.sequences, index.sequences, path);
  index.sizes_offset = kMmapSizesOffset;
  index.pointers_offset = kMmapSizesOffset + 4 * index.sequences;
  return index;
}

Index read_lazy_header(std::span<const std::byte> bytes, const std::filesystem::path& path) {
  if (bytes.size() < kLazyDimOffset) refuse(path, "only " + std::to_string(bytes.size()) + " bytes: the header is truncated; binarize again");
  Index index{.kind = IndexKind::lazy};
  check_version(load<std::uint64_t>(bytes, kLazyVersionOffset), path);
  index.dtype = checked_dtype(load<std::uint64_t>(bytes, kLazyDtypeOffset), path);
  if (load<std::uint64_t>(bytes, kLazyElementOffset) != element_bytes(index.dtype)) refuse(path, "the element size in the header is not that of its dtype");
  index.sequences = load<std::uint64_t>(bytes, kLazyCountOffset);
  check_count(index.sequences, path);
  if (load<std::uint64_t>(bytes, kLazySizesCountOffset) != index.sequences) refuse(path, "items of more than one dimension are not token sequences");
  check_size(bytes.size(), kLazyDimOffset + 16 * (index.sequences + 1) + 8 * index.sequences, index.sequences, path);
  index.pointers_offset = kLazyDimOffset + 8 * (index.sequences + 1);
  index.sizes_offset = index.pointers_offset + 8 * (index.sequences + 1);
  return index;
}

/// A file written through one buffer; close() reports what a destructor would have to swallow.
class IndexFile {
 public:
  IndexFile(const std::filesystem::path& path, const std::function<void()>& after_block)
      : path_(path), stream_(path, std::ios::binary | std::ios::trunc), after_block_(after_block) {
    buffer_.reserve(kWriteBufferBytes);
    if (!stream_) fail();
  }
  template <typename T>
  void put(T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (buffer_.size() + sizeof(T) > kWriteBufferBytes) flush();
    const auto* const first = reinterpret_cast<const char*>(&value);
    buffer_.insert(buffer_.end(), first, first + sizeof(T));
  }
  void close() {
    flush();
    stream_.close();
    if (!stream_) fail();
  }

 private:
  void flush() {
    stream_.write(buffer_.data(), static_cast<std::streamsize>(buffer_.size()));
    if (!stream_) fail();
    buffer_.clear();
    if (after_block_) after_block_();
  }
  [[noreturn]] void fail() const {
    throw std::system_error(errno, std::generic_category(), "cannot write " + path_.string());
  }
  std::filesystem::path path_;
  std::ofstream stream_;
  std::function<void()> after_block_;
  std::vector<char> buffer_;
};

}  // namespace

std::size_t element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::uint8: case Dtype::int8: return 1;
    case Dtype::int16: case Dtype::uint16: return 2;
    case Dtype::int32: case Dtype::uint32: return 4;
    case Dtype::int64: case Dtype::uint64: return 8;
  }
  throw InputError("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

std::string_view dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::uint8: return "uint8";
    case Dtype::int8: return "int8";
    case Dtype::int16: return "int16";
    case Dtype::int32: return "int32";
    case Dtype::int64: return "int64";
    case Dtype::uint16: return "uint16";
    case Dtype::uint32: return "uint32";
    case Dtype::uint64: return "uint64";
  }
  throw InputError("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

Dtype dtype_to_write(IndexKind kind, std::uint64_t dictionary_size) {
  if (kind == IndexKind::lazy) return Dtype::int32;
  if (dictionary_size < kFairseqUint16Limit) return Dtype::uint16;
  return dictionary_size < kUint32Limit ? Dtype::uint32 : Dtype::int64;
}

Index read_index(std::span<const std::byte> index_bytes, std::uint64_t data_bytes, const std::filesystem::path& index_path) {
  const bool mmap = starts_with(index_bytes, kMmapMagic);
  if (!mmap && !starts_with(index_bytes, kLazyMagic)) {
    refuse(index_path, "starts with neither MMIDIDX nor TNTIDX, so it is not an index of binarized text; "
                       "binarize the text with python -m xlm_ds.binarize");
  }
  Index index = mmap ? read_mmap_header(index_bytes, index_path) : read_lazy_header(index_bytes, index_path);
  if (index.sequences != 0) {
    const std::uint64_t last = index.sequences - 1;
    const std::uint64_t start = sequence_start(index, index_bytes, last);
    const std::uint64_t length = sequence_length(index, index_bytes, last);
    if (start > kMaxSequences || length > kMaxSequences) refuse(index_path, "the last sequence's place is impossible; the file is damaged");
    index.tokens = start + length;
  }
  const std::uint64_t expected_bytes = index.tokens * element_bytes(index.dtype);
  if (data_bytes != expected_bytes) {
    refuse(index_path, "lists " + std::to_string(index.tokens) + " tokens of " + std::string(dtype_name(index.dtype)) + ", " +
                           std::to_string(expected_bytes) + " bytes, but the .bin beside it has " + std::to_string(data_bytes) +
                           " (truncated, or of another run); binarize again");
  }
  return index;
}

std::uint64_t sequence_length(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i) {
  if (index.kind == IndexKind::mmap) return static_cast<std::uint64_t>(load<std::int32_t>(index_bytes, index.sizes_offset + 4 * i));
  return load<std::uint64_t>(index_bytes, index.sizes_offset + 8 * i);
}

std::uint64_t sequence_start(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i) {
  const auto pointer = load<std::uint64_t>(index_bytes, index.pointers_offset + 8 * i);
  return index.kind == IndexKind::mmap ? pointer / element_bytes(index.dtype) : pointer;
}

void verify_index(const Index& index, std::span<const std::byte> index_bytes, const std::filesystem::path& index_path) {
  std::uint64_t expected = 0;
  for (std::uint64_t i = 0; i < index.sequences; ++i) {
    const std::uint64_t found = sequence_start(index, index_bytes, i);
    if (found != expected) {
      refuse(index_path, "sequence " + std::to_string(i) + " starts at token " + std::to_string(found) + ", expected " +
                             std::to_string(expected) + " from the lengths before it; the file is damaged, binarize again");
    }
    expected += sequence_length(index, index_bytes, i);
  }
}

void write_index(const std::filesystem::path& index_path, IndexKind kind, Dtype dtype, std::span<const std::byte> lengths,
                 const std::function<void()>& after_block) {
  const std::uint64_t sequences = lengths.size() / sizeof(std::uint32_t);
  const auto length_at = [&](std::uint64_t i) { return load<std::uint32_t>(lengths, sizeof(std::uint32_t) * i); };
  IndexFile file(index_path, after_block);
  if (kind == IndexKind::mmap) {
    for (const char c : kMmapMagic) file.put(c);
    file.put(kVersion);
    file.put(static_cast<std::uint8_t>(dtype));
    file.put(sequences);
    for (std::uint64_t i = 0; i < sequences; ++i) file.put(narrow_or_throw<std::int32_t>(length_at(i), "tokens in one line"));
    std::uint64_t bytes_before = 0;
    for (std::uint64_t i = 0; i < sequences; ++i) {
      file.put(bytes_before);
      bytes_before += length_at(i) * std::uint64_t{element_bytes(dtype)};
    }
  } else {
    for (const char c : kLazyMagic) file.put(c);
    file.put(kVersion);
    file.put(static_cast<std::uint64_t>(dtype));
    file.put(static_cast<std::uint64_t>(element_bytes(dtype)));
    file.put(sequences);
    file.put(sequences);
    for (std::uint64_t i = 0; i <= sequences; ++i) file.put(i);  // dim_offsets of one-dimensional items
    std::uint64_t tokens_before = 0;
    file.put(tokens_before);
    for (std::uint64_t i = 0; i < sequences; ++i) file.put(tokens_before += length_at(i));
    for (std::uint64_t i = 0; i < sequences; ++i) file.put(std::uint64_t{length_at(i)});
  }
  file.close();
}

}  // namespace xlm_ds
