#include "xlm_ds/file.hpp"

#include <cerrno>
#include <fcntl.h>
#include <poll.h>
#include <string>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>
#include <utility>

namespace xlm_ds {
namespace {

constexpr int kClosed = -1;

[[noreturn]] void throw_errno(const char* verb, const std::filesystem::path& path) {
  throw std::system_error(errno, std::generic_category(),
                          std::string("cannot ") + verb + " " + path.string());
}

FileHandle open_or_throw(const std::filesystem::path& path, int flags, const char* verb) {
  const int descriptor =
      ::open(path.c_str(), flags | O_CLOEXEC, 0666);  // less the umask, as for any new file
  if (descriptor < 0) throw_errno(verb, path);
  return FileHandle(descriptor);
}

FileHandle open_to_read(const std::filesystem::path& path) {
  FileHandle handle = open_or_throw(path, O_RDONLY | O_NONBLOCK, "read");  // a pipe without a writer would block
  struct stat status{};
  if (::fstat(handle.descriptor(), &status) != 0) throw_errno("read", path);
  if (!S_ISREG(status.st_mode)) {
    errno = S_ISDIR(status.st_mode) ? EISDIR : ESPIPE;
    throw_errno("read", path);
  }
  return handle;
}

/// A duplicate of descriptor 0 and not /dev/stdin: that cannot be opened when it is a socket, and
/// of a file it would begin anew.
FileHandle open_input(const std::filesystem::path& path) {
  if (path != kStandardInput) return open_to_read(path);
  const int descriptor = ::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0);
  if (descriptor < 0) throw_errno("read", path);
  return FileHandle(descriptor);
}

/// Returns whether there is something to read, the end of the file included; at once for a regular
/// file. False if `progress` is cancelled before.
bool wait_for_bytes(int descriptor, const Progress& progress) {
  constexpr int kMilliseconds = 100;
  pollfd waiting{.fd = descriptor, .events = POLLIN, .revents = 0};
  while (!progress.cancelled()) {
    // A failing poll is the read's to report.
    if (::poll(&waiting, 1, kMilliseconds) != 0) return true;
  }
  return false;
}

}  // namespace

FileHandle::~FileHandle() {
  if (descriptor_ != kClosed) ::close(descriptor_);
}

FileHandle::FileHandle(FileHandle&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, kClosed)) {}

FileHandle& FileHandle::operator=(FileHandle&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

InputFile::InputFile(std::filesystem::path path, std::uint64_t begin)
    : path_(std::move(path)), handle_(open_input(path_)) {
  if (begin != 0 && ::lseek(handle_.descriptor(), static_cast<off_t>(begin), SEEK_SET) < 0) {
    throw_errno("read", path_);
  }
}

std::size_t InputFile::read(std::span<char> bytes, const Progress& progress) {
  std::size_t filled = 0;
  while (filled < bytes.size() && wait_for_bytes(handle_.descriptor(), progress)) {
    const auto rest = bytes.subspan(filled);
    const ssize_t count = ::read(handle_.descriptor(), rest.data(), rest.size());
    if (count == 0) break;
    if (count > 0) {
      filled += static_cast<std::size_t>(count);
    } else if (errno != EINTR && errno != EAGAIN) {
      throw_errno("read", path_);
    }
  }
  return filled;
}

OutputFile::OutputFile(std::filesystem::path path)
    : path_(std::move(path)),
      handle_(open_or_throw(path_, O_WRONLY | O_CREAT | O_TRUNC, "write")) {}

void OutputFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t count =
        ::pwrite(handle_.descriptor(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count >= 0) {
      bytes = bytes.subspan(static_cast<std::size_t>(count));
      offset += static_cast<std::uint64_t>(count);
    } else if (errno != EINTR) {
      throw_errno("write", path_);
    }
  }
}

RandomAccessFile::RandomAccessFile(std::filesystem::path path)
    : path_(std::move(path)), handle_(open_to_read(path_)) {}

std::uint64_t RandomAccessFile::size() const {
  struct stat status{};
  if (::fstat(handle_.descriptor(), &status) != 0) throw_errno("read the size of", path_);
  return static_cast<std::uint64_t>(status.st_size);
}

std::size_t RandomAccessFile::read_at(std::uint64_t offset, std::span<std::byte> bytes) const {
  std::size_t filled = 0;
  while (filled < bytes.size()) {
    const auto rest = bytes.subspan(filled);
    const ssize_t count = ::pread(handle_.descriptor(), rest.data(), rest.size(),
                                  static_cast<off_t>(offset + filled));
    if (count == 0) break;
    if (count > 0) {
      filled += static_cast<std::size_t>(count);
    } else if (errno != EINTR) {
      throw_errno("read", path_);
    }
  }
  return filled;
}

}  // namespace xlm_ds
