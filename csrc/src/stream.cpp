#include "xlm_ds/stream.hpp"

#include <stdexcept>

#include "xlm_ds/special_ids.hpp"

namespace xlm_ds {
namespace {

constexpr std::size_t kShortestBlock = 5;  // word eos, eos word eos

/// The start of a line, ended by an eos also where the line has been cut.
void fill_half(const TokenDataset& lines, std::uint64_t line, std::int64_t vocab_size,
               std::span<std::int64_t> out) {
  lines.fill_start(line, vocab_size, out);
  if (out.size() < lines.block_length(line)) out.back() = kEos;
}

}  // namespace

Stream::Stream(const TokenDataset& blocks, std::int64_t language)
    : first_(&blocks), language_(language) {}

Stream::Stream(const TokenDataset& first, std::int64_t language, const TokenDataset& second,
               std::int64_t second_language)
    : first_(&first), second_(&second), language_(language), second_language_(second_language) {
  if (first.blocks() != second.blocks() || first.block_size() != second.block_size()) {
    throw std::invalid_argument("the two sides of a pair differ in blocks or block size");
  }
  if (first.block_size() < kShortestBlock) {
    throw std::invalid_argument("a row of a pair has at least 6 tokens: eos word eos eos word eos");
  }
}

Stream::Halves Stream::halves_of(std::uint64_t block) const {
  const std::size_t room = block_size() - 1;  // without the eos that begins the second half
  const std::size_t first = first_->block_length(block);
  const std::size_t second = second_->block_length(block);
  if (first + second <= room) return {first, second};
  const std::size_t half = room - room / 2;
  if (first <= half) return {first, room - first};
  if (second <= room - half) return {room - second, second};
  return {half, room - half};
}

Stream::Row Stream::row_of_pair(std::uint64_t pair) const {
  const auto [first, second] = halves_of(pair);
  return {first + 1 + second, first + 1};
}

Stream::Row Stream::fill_pair(std::uint64_t pair, std::int64_t vocab_size,
                              std::span<std::int64_t> out) const {
  if (out.size() < block_size()) throw std::invalid_argument("there must be room for a whole row");
  const auto [first, second] = halves_of(pair);
  fill_half(*first_, pair, vocab_size, out.first(first));
  out[first] = kEos;
  fill_half(*second_, pair, vocab_size, out.subspan(first + 1, second));
  return {first + 1 + second, first + 1};
}

std::uint64_t Stream::count_cut() const {
  if (!is_pair()) return first_->count_cut();
  std::uint64_t cut = 0;
  for (std::uint64_t pair = 0; pair < blocks(); ++pair) {
    if (first_->block_length(pair) + 1 + second_->block_length(pair) > block_size()) ++cut;
  }
  return cut;
}

}  // namespace xlm_ds
