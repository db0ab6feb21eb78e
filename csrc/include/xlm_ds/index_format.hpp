#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string_view>

/// The only place that knows a byte offset of a .bin/.idx pair. Two layouts, both fairseq's (docs/formats.md):
/// MMIDIDX ("mmap": ids as uint16 or uint32) and TNTIDX ("lazy", "cached": int32 of id + 1).
namespace xlm_ds {

enum class IndexKind { mmap, lazy };

/// fairseq's dtype codes, as stored in the files.
enum class Dtype : std::uint8_t {
  uint8 = 1, int8 = 2, int16 = 3, int32 = 4, int64 = 5, uint16 = 8, uint32 = 9, uint64 = 10
};

[[nodiscard]] std::size_t element_bytes(Dtype dtype);
[[nodiscard]] std::string_view dtype_name(Dtype dtype);

/// The element type fairseq writes: int32 for lazy; for mmap uint16 below 65,500 symbols, else uint32.
/// The limit is fairseq's (65,500, strict), not 2^16: files must be equal byte for byte.
[[nodiscard]] Dtype dtype_to_write(IndexKind kind, std::uint64_t dictionary_size);

/// What an .idx says, checked against its own size and against the size of its .bin.
struct Index {
  IndexKind kind{};
  Dtype dtype{};
  std::uint64_t sequences = 0;
  std::uint64_t tokens = 0;
  std::size_t sizes_offset = 0;     // byte offset in the .idx of the sequences' lengths
  std::size_t pointers_offset = 0;  // of their starts (mmap: bytes in the .bin; lazy: elements)

  /// What must be subtracted from a stored value to get the id: TNTIDX stores id + 1.
  [[nodiscard]] std::int64_t id_bias() const noexcept { return kind == IndexKind::lazy ? 1 : 0; }
};

/// Reads and checks the header in O(1): magic, version, dtype, file sizes, last pointer + last length = tokens.
/// `index_path` appears in messages only. Throws InputError if anything does not agree (a truncated file, another
/// program's, Megatron's variant).
[[nodiscard]] Index read_index(std::span<const std::byte> index_bytes, std::uint64_t data_bytes,
                               const std::filesystem::path& index_path);

/// Length in tokens of sequence i, and its first token counted from the start of the .bin. O(1); i < index.sequences.
[[nodiscard]] std::uint64_t sequence_length(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i);
[[nodiscard]] std::uint64_t sequence_start(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i);

/// Checks every sequence in O(sequences): starts follow from the lengths. Throws InputError naming the first that differs.
void verify_index(const Index& index, std::span<const std::byte> index_bytes, const std::filesystem::path& index_path);

/// Writes an .idx for sequences of the given lengths, in bounded memory (`lengths` may be a mapped file of native u32,
/// any alignment; its size is 4 bytes per sequence). Calls `after_block` for every quarter of a megabyte written. Throws
/// std::system_error if it cannot be written.
void write_index(const std::filesystem::path& index_path, IndexKind kind, Dtype dtype, std::span<const std::byte> lengths,
                 const std::function<void()>& after_block = {});

}  // namespace xlm_ds
