#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace xlm_ds {

/// A whole file mapped read-only. An empty file gives an empty span (the kernel refuses to map zero bytes).
/// Throws std::system_error if the file cannot be opened or mapped. Movable, not copyable.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  /// Valid as long as this object lives, also after it has been moved into another.
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }

  /// A hint to the kernel, which may ignore it. A file that memory cannot hold is not read ahead where reads are random:
  /// what was fetched beside a block would be gone before it is asked for. A smaller one is, and is soon in memory.
  void expect_random_reads() const noexcept;

 private:
  void unmap() noexcept;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace xlm_ds
