#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <string_view>

#include "fuzz.hpp"

/// Files for what the core reads from files, in memory: a disk would be the slowest part.
namespace xlm_ds_fuzz {

/// Makes it the content of an open file, whose pages are used again: a file emptied first would give them back.
inline void overwrite(int file, std::string_view content) {
  const auto written = ::pwrite(file, content.data(), content.size(), 0);
  require(written == static_cast<ssize_t>(content.size()), "a file can be written");
  require(::ftruncate(file, written) == 0, "a file can be cut");
}

/// A file without a name.
class MemoryFile {
 public:
  explicit MemoryFile(const char* name) : descriptor_(::memfd_create(name, MFD_CLOEXEC)) {
    require(descriptor_ >= 0, "there is room for a file in memory");
  }
  [[nodiscard]] std::filesystem::path with(std::string_view content) const {
    overwrite(descriptor_, content);
    return "/proc/self/fd/" + std::to_string(descriptor_);
  }

 private:
  int descriptor_;
};

/// A folder in memory if there is one, removed at the end.
class Folder {
 public:
  Folder() {
    const std::filesystem::path memory = "/dev/shm";
    const auto parent = std::filesystem::exists(memory) ? memory : std::filesystem::temp_directory_path();
    path_ = parent / ("xlm_ds_fuzz_" + std::to_string(::getpid()));
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  [[nodiscard]] std::filesystem::path operator/(const char* name) const { return path_ / name; }

  void write(const char* name, std::string_view content) const {
    const int file = ::open((path_ / name).c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    require(file >= 0, "a file can be opened");
    overwrite(file, content);
    ::close(file);
  }

  [[nodiscard]] std::string read(const char* name) const {
    const int file = ::open((path_ / name).c_str(), O_RDONLY | O_CLOEXEC);
    const off_t size = file < 0 ? -1 : ::lseek(file, 0, SEEK_END);
    require(size >= 0, "there is such a file");
    std::string content(static_cast<std::size_t>(size), '\0');
    require(::pread(file, content.data(), content.size(), 0) == static_cast<ssize_t>(content.size()), "a file can be read");
    ::close(file);
    return content;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace xlm_ds_fuzz
