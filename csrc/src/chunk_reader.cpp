#include "xlm_ds/chunk_reader.hpp"

#include <algorithm>
#include <span>

namespace xlm_ds {
namespace {

/// The number of bytes up to and including the last space or line feed, or 0. After these two no
/// word, no UTF-8 sequence and no CRLF goes on.
std::size_t last_cut(std::string_view text) {
  const std::size_t at = text.find_last_of(" \n");
  return at == std::string_view::npos ? 0 : at + 1;
}

bool is_line_end(char c) { return c == '\n' || c == '\r'; }

}  // namespace

ChunkReader::ChunkReader(const std::filesystem::path& path, std::size_t chunk_bytes)
    : file_(path), chunk_bytes_(std::max<std::size_t>(chunk_bytes, 1)) {}

bool ChunkReader::next(Chunk& chunk) {
  const std::lock_guard lock(mutex_);
  auto& buffer = chunk.buffer;
  buffer.assign(tail_.begin(), tail_.end());
  std::size_t cut = 0;
  bool at_end = false;
  while (cut == 0 && !at_end) {
    const std::size_t known = buffer.size();
    buffer.resize(known + chunk_bytes_);
    const std::size_t read = file_.read(std::span(buffer).subspan(known));
    buffer.resize(known + read);
    at_end = read < chunk_bytes_;
    const std::size_t in_new = last_cut(std::string_view(buffer.data() + known, read));
    if (in_new != 0) cut = known + in_new;
  }
  if (at_end) {
    if (buffer.empty() ? line_open_ : !is_line_end(buffer.back())) buffer.push_back('\n');
    cut = buffer.size();
  }
  tail_.assign(buffer.begin() + static_cast<std::ptrdiff_t>(cut), buffer.end());
  buffer.resize(cut + kReadableAfter);
  chunk.text = {buffer.data(), cut};
  chunk.number = number_++;
  chunk.offset = offset_;
  offset_ += cut;
  line_open_ = cut != 0 && !is_line_end(chunk.text.back());
  return cut != 0;
}

}  // namespace xlm_ds
