#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

#include "xlm_ds/progress.hpp"

namespace xlm_ds {

/// An open file, closed with the object. Movable, not copyable.
class FileHandle {
 public:
  explicit FileHandle(int descriptor) noexcept : descriptor_(descriptor) {}
  ~FileHandle();
  FileHandle(FileHandle&& other) noexcept;
  FileHandle& operator=(FileHandle&& other) noexcept;
  FileHandle(const FileHandle&) = delete;
  FileHandle& operator=(const FileHandle&) = delete;
  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }

 private:
  int descriptor_;
};

/// The name under which InputFile reads standard input.
inline constexpr const char* kStandardInput = "-";

/// A file read from some byte onwards. All throw std::system_error naming the file.
class InputFile {
 public:
  /// Standard input is read from where it is; it has no other `begin` than 0.
  explicit InputFile(std::filesystem::path path, std::uint64_t begin = 0);
  /// Fills `bytes` from the front; returns how many, fewer than asked for only at the end of the
  /// file, or when `progress` is cancelled while a pipe has nothing to give.
  [[nodiscard]] std::size_t read(std::span<char> bytes, const Progress& progress);

 private:
  std::filesystem::path path_;
  FileHandle handle_;
};

/// A new file, or one emptied, written at any place by any number of threads. All throw
/// std::system_error naming the file.
class OutputFile {
 public:
  explicit OutputFile(std::filesystem::path path);
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes) const;

 private:
  std::filesystem::path path_;
  FileHandle handle_;
};

/// A file read at any place by any number of threads. All throw std::system_error naming the file.
class RandomAccessFile {
 public:
  explicit RandomAccessFile(std::filesystem::path path);
  [[nodiscard]] std::uint64_t size() const;
  /// Fills `bytes` from byte `offset` on; returns how many, fewer than asked for only at the end of
  /// the file.
  [[nodiscard]] std::size_t read_at(std::uint64_t offset, std::span<std::byte> bytes) const;

 private:
  std::filesystem::path path_;
  FileHandle handle_;
};

}  // namespace xlm_ds
