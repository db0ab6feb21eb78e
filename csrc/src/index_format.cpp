#include "xlm_ds/index_format.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "xlm_ds/error.hpp"
#include "xlm_ds/file.hpp"

static_assert(std::endian::native == std::endian::little, "both formats are little-endian and are read without swapping");

namespace xlm_ds {
namespace {

// The magics contain NUL bytes: MMIDIDX is 9 bytes long, so that everything after it is unaligned.
constexpr std::array<char, 9> kMmapMagic{'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr std::array<char, 8> kLazyMagic{'T', 'N', 'T', 'I', 'D', 'X', '\0', '\0'};
constexpr std::uint64_t kVersion = 1;

constexpr std::size_t kMmapVersionOffset = 9, kMmapDtypeOffset = 17, kMmapCountOffset = 18, kMmapSizesOffset = 26;
constexpr std::size_t kMegatronDocumentsOffset = 26, kMegatronSizesOffset = 34;
constexpr std::size_t kLazyVersionOffset = 8, kLazyDtypeOffset = 16, kLazyElementOffset = 24, kLazyCountOffset = 32,
                      kLazySizesCountOffset = 40, kLazyDimOffset = 48;
constexpr std::uint64_t kMaxSequences = std::uint64_t{1} << 56;  // so that no size computed from a header overflows
constexpr std::uint64_t kFairseqUint16Limit = 65500;
constexpr std::uint64_t kUint32Limit = 4294967295;
constexpr std::uint64_t kInt32Limit = std::uint64_t{1} << 31;
constexpr std::size_t kBufferBytes = std::size_t{1} << 16;

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
      return std::nullopt;
  }
}

Dtype checked_dtype(std::uint64_t code, const std::filesystem::path& path) {
  const auto dtype = dtype_from_code(code);
  if (dtype) return *dtype;
  if (code == 6 || code == 7) {  // fairseq: float64 under both; Megatron-LM: float64, float32
    refuse(path, "dtype code " + std::to_string(code) + " is floating point, so the .bin holds no token ids; binarize the text");
  }
  refuse(path, "dtype code " + std::to_string(code) + " is not one of the integer types token ids are stored in; the file "
               "is damaged or another program's, delete it and binarize again");
}

void check_header(std::size_t found, std::size_t needed, const std::filesystem::path& path) {
  if (found < needed) refuse(path, "only " + std::to_string(found) + " bytes: the header is truncated; delete it and binarize again");
}

void check_version(std::uint64_t version, const std::filesystem::path& path) {
  if (version != kVersion) refuse(path, "format version " + std::to_string(version) + ", expected 1");
}

void check_size(std::uint64_t found, std::uint64_t expected, std::uint64_t sequences, const std::filesystem::path& path) {
  if (found == expected) return;
  refuse(path, "the header says " + std::to_string(sequences) + " sequences, which take " + std::to_string(expected) +
                   " bytes, but the file has " + std::to_string(found) +
                   (found < expected ? " (truncated); delete it and binarize again"
                                     : " (damaged, or a layout other than fairseq's and Megatron-LM's); delete it and binarize again"));
}

void check_count(std::uint64_t sequences, const std::filesystem::path& path) {
  if (sequences > kMaxSequences) refuse(path, "impossible number of sequences " + std::to_string(sequences) + " in the header");
}

/// Whether a file of MMIDIDX is Megatron-LM's. Nothing in the header tells; no size fits both layouts. Multimodal data
/// has one byte more per sequence at the end, of which nothing is read here.
bool has_megatron_size(std::span<const std::byte> bytes, std::uint64_t sequences) {
  if (bytes.size() < kMegatronSizesOffset) return false;
  const auto document_entries = load<std::uint64_t>(bytes, kMegatronDocumentsOffset);
  if (document_entries > kMaxSequences) return false;
  const std::uint64_t size = kMegatronSizesOffset + 12 * sequences + 8 * document_entries;
  return bytes.size() == size || bytes.size() == size + sequences;
}

/// The documents after the sequences: where each begins, and after the last one the number of sequences.
void read_documents(Index& index, std::span<const std::byte> bytes, const std::filesystem::path& path) {
  if (index.dtype == Dtype::uint32 || index.dtype == Dtype::uint64) {
    refuse(path, "has Megatron-LM's layout, but " + std::string(dtype_name(index.dtype)) +
                     ", a type it does not know; write it again with int32");
  }
  const auto entries = load<std::uint64_t>(bytes, kMegatronDocumentsOffset);
  if (entries == 0) refuse(path, "lists no documents, not even where the last one ends; write it again");
  index.documents = entries - 1;
  index.documents_offset = index.pointers_offset + 8 * index.sequences;
  const std::uint64_t first = document_start(index, bytes, 0), end = document_start(index, bytes, index.documents);
  if (first != 0 || end != index.sequences) {
    refuse(path, "its documents hold the sequences from " + std::to_string(first) + " to " + std::to_string(end) +
                     ", expected from 0 to " + std::to_string(index.sequences) + "; the file is damaged, write it again");
  }
}

/// What a stored start counts: bytes of the .bin, or elements.
std::uint64_t pointer_unit(const Index& index) { return index.kind == IndexKind::lazy ? 1 : element_bytes(index.dtype); }

std::uint64_t pointer_at(const Index& index, std::span<const std::byte> bytes, std::uint64_t i) {
  return load<std::uint64_t>(bytes, index.pointers_offset + 8 * i);
}

/// A stored start in tokens, for a message.
std::string start_text(const Index& index, std::uint64_t pointer) {
  const std::uint64_t unit = pointer_unit(index);
  return std::to_string(pointer / unit) + (pointer % unit != 0 ? " and a part of one" : "");
}

Index read_mmap_header(std::span<const std::byte> bytes, const std::filesystem::path& path) {
  check_header(bytes.size(), kMmapSizesOffset, path);
  Index index{.kind = IndexKind::mmap};
  check_version(load<std::uint64_t>(bytes, kMmapVersionOffset), path);
  index.dtype = checked_dtype(load<std::uint8_t>(bytes, kMmapDtypeOffset), path);
  index.sequences = load<std::uint64_t>(bytes, kMmapCountOffset);
  check_count(index.sequences, path);
  const bool megatron = has_megatron_size(bytes, index.sequences);
  index.kind = megatron ? IndexKind::megatron : IndexKind::mmap;
  index.sizes_offset = megatron ? kMegatronSizesOffset : kMmapSizesOffset;
  index.pointers_offset = index.sizes_offset + 4 * index.sequences;
  if (megatron) {
    read_documents(index, bytes, path);
  } else {
    check_size(bytes.size(), kMmapSizesOffset + 12 * index.sequences, index.sequences, path);
  }
  return index;
}

Index read_lazy_header(std::span<const std::byte> bytes, const std::filesystem::path& path) {
  check_header(bytes.size(), kLazyDimOffset, path);
  Index index{.kind = IndexKind::lazy};
  check_version(load<std::uint64_t>(bytes, kLazyVersionOffset), path);
  index.dtype = checked_dtype(load<std::uint64_t>(bytes, kLazyDtypeOffset), path);
  if (load<std::uint64_t>(bytes, kLazyElementOffset) != element_bytes(index.dtype)) {
    refuse(path, "the element size in the header is not that of its dtype");
  }
  index.sequences = load<std::uint64_t>(bytes, kLazyCountOffset);
  check_count(index.sequences, path);
  if (load<std::uint64_t>(bytes, kLazySizesCountOffset) != index.sequences) {
    refuse(path, "items of more than one dimension are not token sequences");
  }
  check_size(bytes.size(), kLazyDimOffset + 16 * (index.sequences + 1) + 8 * index.sequences, index.sequences, path);
  index.pointers_offset = kLazyDimOffset + 8 * (index.sequences + 1);
  index.sizes_offset = index.pointers_offset + 8 * (index.sequences + 1);
  return index;
}

/// A file written front to back through one buffer; what is left in it is written by finish().
class IndexFile {
 public:
  explicit IndexFile(const std::filesystem::path& path) : file_(path) { buffer_.reserve(kBufferBytes); }
  template <typename T>
  void put(T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (buffer_.size() + sizeof(T) > kBufferBytes) finish();
    const auto* const first = reinterpret_cast<const std::byte*>(&value);
    buffer_.insert(buffer_.end(), first, first + sizeof(T));
  }
  void finish() {
    file_.write_at(written_, buffer_);
    written_ += buffer_.size();
    buffer_.clear();
  }

 private:
  OutputFile file_;
  std::vector<std::byte> buffer_;
  std::uint64_t written_ = 0;
};

/// A file of lengths, native u32 each, which may be more than memory holds.
class LengthsFile {
 public:
  explicit LengthsFile(const std::filesystem::path& path)
      : path_(path), file_(path), size_(file_.size() / sizeof(std::uint32_t)) {}
  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }

  /// Calls take(length) for each.
  template <typename Take>
  void for_each(Take take) const {
    std::vector<std::uint32_t> lengths(std::min<std::uint64_t>(size_, kBufferBytes / sizeof(std::uint32_t)));
    for (std::uint64_t done = 0; done < size_;) {
      const auto bytes = std::as_writable_bytes(std::span(lengths));
      const std::size_t count = file_.read_at(done * sizeof(std::uint32_t), bytes) / sizeof(std::uint32_t);
      if (count == 0) refuse(path_, "it became shorter while it was read");
      for (const std::uint32_t length : std::span(lengths).first(count)) take(length);
      done += count;
    }
  }

 private:
  std::filesystem::path path_;
  RandomAccessFile file_;
  std::uint64_t size_;
};

void put_mmap_header(IndexFile& file, Dtype dtype, std::uint64_t sequences) {
  for (const char c : kMmapMagic) file.put(c);
  file.put(kVersion);
  file.put(static_cast<std::uint8_t>(dtype));
  file.put(sequences);
}

/// Lengths and starts, as fairseq and Megatron-LM have them.
void put_mmap_sequences(IndexFile& file, Dtype dtype, const LengthsFile& lengths) {
  lengths.for_each([&](std::uint32_t length) { file.put(narrow_or_throw<std::int32_t>(length, "tokens in one line")); });
  std::uint64_t bytes_before = 0;
  lengths.for_each([&](std::uint32_t length) {
    file.put(bytes_before);
    bytes_before += length * std::uint64_t{element_bytes(dtype)};
  });
}

void put_lazy(IndexFile& file, Dtype dtype, const LengthsFile& lengths) {
  for (const char c : kLazyMagic) file.put(c);
  file.put(kVersion);
  file.put(static_cast<std::uint64_t>(dtype));
  file.put(static_cast<std::uint64_t>(element_bytes(dtype)));
  file.put(lengths.size());
  file.put(lengths.size());
  for (std::uint64_t i = 0; i <= lengths.size(); ++i) file.put(i);  // dim_offsets of one-dimensional items
  std::uint64_t tokens_before = 0;
  file.put(tokens_before);
  lengths.for_each([&](std::uint32_t length) { file.put(tokens_before += length); });
  lengths.for_each([&](std::uint32_t length) { file.put(std::uint64_t{length}); });
}

/// TNTIDX only: the columns that this program does not use, but fairseq does.
void verify_dimensions(const Index& index, std::span<const std::byte> bytes, const std::filesystem::path& path) {
  for (std::uint64_t i = 0; i <= index.sequences; ++i) verify_dimension(index, bytes, path, i);
  const auto total = load<std::uint64_t>(bytes, index.pointers_offset + 8 * index.sequences);
  if (total != index.tokens) {
    refuse(path, "says " + std::to_string(total) + " tokens after its last sequence, expected " + std::to_string(index.tokens) +
                     " from the lengths, at byte " + std::to_string(index.pointers_offset + 8 * index.sequences) +
                     "; the file is damaged, delete it and binarize again");
  }
}

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
  if (kind == IndexKind::megatron) {
    if (dictionary_size > kInt32Limit) {
      throw InputError("Megatron-LM's layout has no type for a dictionary of " + std::to_string(dictionary_size) + " symbols");
    }
    return Dtype::int32;
  }
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
    // A Megatron-LM file cut to the size of fairseq's layout shows here: lengths stand where starts should.
    const std::uint64_t first = pointer_at(index, index_bytes, 0);
    if (first != 0) {
      refuse(index_path, "the first sequence starts at token " + start_text(index, first) +
                             ", expected 0; the file is damaged, delete it and binarize again");
    }
    const std::uint64_t last = index.sequences - 1;
    const std::uint64_t start = sequence_start(index, index_bytes, last);
    const std::uint64_t length = sequence_length(index, index_bytes, last);
    if (start > kMaxSequences || length > kMaxSequences) {
      refuse(index_path, "the last sequence's place is impossible; the file is damaged, delete it and binarize again");
    }
    index.tokens = start + length;
  }
  const std::uint64_t expected_bytes = index.tokens * element_bytes(index.dtype);
  if (data_bytes != expected_bytes) {
    refuse(index_path, "lists " + std::to_string(index.tokens) + " tokens of " + std::string(dtype_name(index.dtype)) + ", " +
                           std::to_string(expected_bytes) + " bytes, but the .bin beside it has " + std::to_string(data_bytes) +
                           " (truncated, or of another run); delete it and binarize again");
  }
  return index;
}

std::uint64_t sequence_length(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i) {
  if (index.kind == IndexKind::lazy) return load<std::uint64_t>(index_bytes, index.sizes_offset + 8 * i);
  return static_cast<std::uint64_t>(load<std::int32_t>(index_bytes, index.sizes_offset + 4 * i));
}

std::uint64_t sequence_start(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i) {
  const std::uint64_t pointer = pointer_at(index, index_bytes, i), unit = pointer_unit(index);
  return pointer % unit == 0 ? pointer / unit : std::numeric_limits<std::uint64_t>::max();
}

std::uint64_t document_start(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i) {
  return load<std::uint64_t>(index_bytes, index.documents_offset + 8 * i);
}

void verify_dimension(const Index& index, std::span<const std::byte> index_bytes, const std::filesystem::path& index_path,
                      std::uint64_t i) {
  if (index.kind != IndexKind::lazy) return;
  const std::size_t offset = kLazyDimOffset + 8 * i;
  const auto dimensions_before = load<std::uint64_t>(index_bytes, offset);
  if (dimensions_before == i) return;
  refuse(index_path, "the items before item " + std::to_string(i) + " have " + std::to_string(dimensions_before) +
                         " dimensions together, expected one each, at byte " + std::to_string(offset) +
                         "; the file is damaged or not of text, delete it and binarize again");
}

void verify_index(const Index& index, std::span<const std::byte> index_bytes, const std::filesystem::path& index_path) {
  std::uint64_t expected = 0;
  for (std::uint64_t i = 0; i < index.sequences; ++i) {
    if (sequence_start(index, index_bytes, i) != expected) {
      const std::uint64_t pointer = pointer_at(index, index_bytes, i);
      refuse(index_path, "sequence " + std::to_string(i) + " starts at token " + start_text(index, pointer) +
                             ", expected " + std::to_string(expected) +
                             " from the lengths before it, at byte " + std::to_string(index.pointers_offset + 8 * i) +
                             "; the file is damaged, delete it and binarize again");
    }
    const std::uint64_t length = sequence_length(index, index_bytes, i);
    if (length > index.tokens - expected) {  // also a negative one, which the next start might agree with
      refuse(index_path, "sequence " + std::to_string(i) + " has a length of " +
                             std::to_string(static_cast<std::int64_t>(length)) + ", but only " + std::to_string(index.tokens - expected) + " tokens are left in the .bin, at byte " +
                             std::to_string(index.sizes_offset + (index.kind == IndexKind::lazy ? 8 : 4) * i) +
                             "; the file is damaged, delete it and binarize again");
    }
    expected += length;
  }
  if (index.kind == IndexKind::lazy) verify_dimensions(index, index_bytes, index_path);
  for (std::uint64_t i = 0; i < index.documents; ++i) {
    if (document_start(index, index_bytes, i + 1) < document_start(index, index_bytes, i)) {
      refuse(index_path, "document " + std::to_string(i) + " ends before it starts, at byte " +
                             std::to_string(index.documents_offset + 8 * (i + 1)) + "; the file is damaged, write it again");
    }
  }
}

void write_index(const std::filesystem::path& index_path, IndexKind kind, Dtype dtype,
                 const std::filesystem::path& lengths_path) {
  const LengthsFile lengths(lengths_path);
  IndexFile file(index_path);
  switch (kind) {
    case IndexKind::mmap:
      put_mmap_header(file, dtype, lengths.size());
      put_mmap_sequences(file, dtype, lengths);
      break;
    case IndexKind::megatron:
      put_mmap_header(file, dtype, lengths.size());
      file.put(lengths.size() + 1);
      put_mmap_sequences(file, dtype, lengths);
      for (std::uint64_t i = 0; i <= lengths.size(); ++i) file.put(i);
      break;
    case IndexKind::lazy:
      put_lazy(file, dtype, lengths);
      break;
  }
  file.finish();
}

}  // namespace xlm_ds
