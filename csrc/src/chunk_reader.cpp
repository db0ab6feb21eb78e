#include "xlm_ds/chunk_reader.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "xlm_ds/error.hpp"

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

std::span<char> Buffer::room(std::size_t count) {
  if (size_ + count > capacity_) {
    // Twice as much as there is, so that one long word is not copied for each of its chunks.
    const std::size_t capacity = std::max(size_ + count, 2 * size_);
    auto larger = std::make_unique_for_overwrite<char[]>(capacity);
    if (size_ != 0) std::memcpy(larger.get(), bytes_.get(), size_);
    bytes_ = std::move(larger);
    capacity_ = capacity;
  }
  return {bytes_.get() + size_, count};
}

void Buffer::append(std::string_view text) {
  std::ranges::copy(text, room(text.size()).begin());
  size_ += text.size();
}

ChunkReader::ChunkReader(std::span<const Piece> pieces, std::size_t chunk_bytes,
                         const Progress& progress)
    : pieces_(pieces), chunk_bytes_(std::max<std::size_t>(chunk_bytes, 1)), progress_(&progress) {
  open_piece();
}

void ChunkReader::open_piece() {
  file_.reset();
  if (pieces_.empty()) return;
  file_.emplace(pieces_.front().path, pieces_.front().begin);
  offset_ = pieces_.front().begin;
  unread_ = pieces_.front().end - offset_;
  line_open_ = false;
}

bool ChunkReader::next(Chunk& chunk) {
  const std::lock_guard lock(mutex_);
  try {
    while (file_ && !progress_->cancelled()) {
      if (next_of_piece(chunk)) return !progress_->cancelled();
      pieces_ = pieces_.subspan(1);
      open_piece();
    }
  } catch (...) {
    file_.reset();  // or another thread would read on, from a place that is not the next
    throw;
  }
  return false;
}

bool ChunkReader::read_into(Buffer& buffer) {
  const Piece& piece = pieces_.front();
  const auto wanted = static_cast<std::size_t>(std::min<std::uint64_t>(chunk_bytes_, unread_));
  // Also what next_of_piece adds behind it, so that this alone decides the buffer's capacity.
  const auto room = buffer.room(wanted + 1 + kReadableAfter);
  const std::size_t read = file_->read(room.first(wanted), *progress_);
  buffer.set_size(buffer.size() + read);
  unread_ -= read;
  const bool ended = read < wanted;
  if (ended && piece.end != Piece::kToTheEnd && !progress_->cancelled()) {
    throw InputError(piece.path.string() + ": ends at byte " + std::to_string(piece.end - unread_) +
                     ", but had at least " + std::to_string(piece.end) +
                     " when the run began; start again when nothing writes to it");
  }
  return ended || unread_ == 0;
}

bool ChunkReader::next_of_piece(Chunk& chunk) {
  auto& buffer = chunk.buffer;
  buffer.set_size(0);
  buffer.append(tail_.text());
  std::size_t cut = 0;
  bool at_end = false;
  while (cut == 0 && !at_end) {
    const std::size_t known = buffer.size();
    at_end = read_into(buffer);
    const std::size_t in_new = last_cut(buffer.text().substr(known));
    if (in_new != 0) cut = known + in_new;
  }
  if (at_end) {
    const auto text = buffer.text();
    if (text.empty() ? line_open_ : !is_line_end(text.back())) buffer.append("\n");
    cut = buffer.size();
  }
  tail_.set_size(0);
  tail_.append(buffer.text().substr(cut));
  const auto after = buffer.room(kReadableAfter);
  std::memset(after.data(), 0, after.size());
  chunk.text = buffer.text().substr(0, cut);
  chunk.number = number_;
  chunk.piece = &pieces_.front();
  chunk.offset = offset_;
  if (cut == 0) return false;
  ++number_;
  offset_ += cut;
  line_open_ = !is_line_end(chunk.text.back());
  return true;
}

}  // namespace xlm_ds
