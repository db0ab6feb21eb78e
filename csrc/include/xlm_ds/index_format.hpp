#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>

/// The only place that knows a byte offset of a .bin/.idx pair. Three layouts (docs/formats.md): fairseq's MMIDIDX
/// ("mmap": ids as uint16 or uint32) and TNTIDX ("lazy", "cached": int32 of id + 1), and Megatron-LM's, which has the
/// magic and version of the first and is known by its size: documents are listed after the sequences.
namespace xlm_ds {

enum class IndexKind { mmap, lazy, megatron };

/// The two files of a pair, as PATH/train.ar: not replace_extension, which would take ".ar" for one.
[[nodiscard]] inline std::filesystem::path index_path_of(std::filesystem::path prefix) { return prefix += ".idx"; }
[[nodiscard]] inline std::filesystem::path data_path_of(std::filesystem::path prefix) { return prefix += ".bin"; }

/// fairseq's dtype codes, as stored in the files.
enum class Dtype : std::uint8_t {
  uint8 = 1, int8 = 2, int16 = 3, int32 = 4, int64 = 5, uint16 = 8, uint32 = 9, uint64 = 10
};

[[nodiscard]] std::size_t element_bytes(Dtype dtype);
[[nodiscard]] std::string_view dtype_name(Dtype dtype);

/// The element type the programs themselves write: int32 for lazy; below 65,500 symbols uint16, else uint32 (from 2^32 - 1
/// on int64) for mmap and int32 for megatron. The limit is theirs (65,500, strict), not 2^16: files must be equal byte for
/// byte. Throws InputError if the kind has no type for so many symbols.
[[nodiscard]] Dtype dtype_to_write(IndexKind kind, std::uint64_t dictionary_size);

/// What an .idx says, checked against its own size and against the size of its .bin.
struct Index {
  IndexKind kind{};
  Dtype dtype{};
  std::uint64_t sequences = 0;
  std::uint64_t tokens = 0;
  std::size_t sizes_offset = 0;     // byte offset in the .idx of the sequences' lengths
  std::size_t pointers_offset = 0;  // of their starts (mmap, megatron: bytes in the .bin; lazy: elements)
  std::uint64_t documents = 0;      // megatron only; the other layouts know of none
  std::size_t documents_offset = 0;

  /// What must be subtracted from a stored value to get the id: TNTIDX stores id + 1.
  [[nodiscard]] std::int64_t id_bias() const noexcept { return kind == IndexKind::lazy ? 1 : 0; }
};

/// Reads and checks the header in O(1): magic, version, dtype, file sizes, first pointer, last pointer + last length =
/// tokens, and of documents the first and the end. `index_path` appears in messages only. Throws InputError if anything
/// does not agree (a truncated file, another program's).
[[nodiscard]] Index read_index(std::span<const std::byte> index_bytes, std::uint64_t data_bytes,
                               const std::filesystem::path& index_path);

/// Length in tokens of sequence i, and its first token counted from the start of the .bin. O(1); i < index.sequences. Both
/// as stored, so maybe beyond index.tokens: a negative length is, and a start between two tokens is 2^64 - 1.
[[nodiscard]] std::uint64_t sequence_length(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i);
[[nodiscard]] std::uint64_t sequence_start(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i);

/// First sequence of document i of a megatron index; for i = index.documents, the number of sequences. O(1); not checked
/// by read_index except for the first and the last.
[[nodiscard]] std::uint64_t document_start(const Index& index, std::span<const std::byte> index_bytes, std::uint64_t i);

/// Checks entry i of TNTIDX's column of dimensions, i <= index.sequences: that the sequences before i have one each. O(1).
/// Throws InputError.
void verify_dimension(const Index& index, std::span<const std::byte> index_bytes, const std::filesystem::path& index_path,
                      std::uint64_t i);

/// Checks every sequence and document in O(sequences): starts follow from the lengths, documents from each other. Throws
/// InputError naming the first that differs.
void verify_index(const Index& index, std::span<const std::byte> index_bytes, const std::filesystem::path& index_path);

/// Writes the .idx of sequences whose lengths are in a file, native u32 each: there may be more than memory holds.
/// megatron gets one document per sequence. In place: callers give a temporary name. Throws std::system_error if a file
/// cannot be read or written, InputError if a sequence is too long for the layout.
void write_index(const std::filesystem::path& index_path, IndexKind kind, Dtype dtype,
                 const std::filesystem::path& lengths_path);

}  // namespace xlm_ds
