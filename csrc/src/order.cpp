#include "xlm_ds/order.hpp"

#include <algorithm>
#include <bit>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "xlm_ds/random.hpp"

namespace xlm_ds {
namespace {

constexpr std::uint64_t kMaxSize = std::uint64_t{1} << 63;
constexpr std::uint64_t kMaxSample = std::uint64_t{1} << 62;
constexpr std::uint64_t kMaxWeight = std::uint64_t{1} << 32;

// Chi-square over where pairs and triples of places go, a million keys: over 3 bits it still saw 16
// rounds but not 24, over 9 bits 6 rounds (12 standard deviations at size 512) but not 8, over 10
// and more it saw none of 6.
constexpr unsigned kFewBits = 8;
constexpr unsigned kRoundsForFewBits = 24;
constexpr unsigned kRounds = 8;

constexpr std::uint64_t low_mask(unsigned bits) noexcept { return (std::uint64_t{1} << bits) - 1; }

/// Of the first n visits to a node, those that go left: n·share rounded to the nearest.
std::uint64_t visits_left(std::uint64_t n, std::uint64_t share) noexcept {
  constexpr std::uint64_t kHalf = std::uint64_t{1} << 63;
  return static_cast<std::uint64_t>((Uint128{n} * share + kHalf) >> 64);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

Permutation::Permutation(std::uint64_t key, std::uint64_t size) : key_(key), size_(size) {
  require(size >= 1 && size <= kMaxSize, "a permutation's size must be from 1 to 2^63");
  const auto bits = static_cast<unsigned>(std::bit_width(size - 1));
  low_bits_ = bits / 2;
  high_bits_ = bits - low_bits_;
  rounds_ = bits <= kFewBits ? kRoundsForFewBits : kRounds;
}

std::uint64_t Permutation::operator()(std::uint64_t index) const {
  if (index >= size_) throw std::out_of_range("a permutation of [0, size) has no such index");
  do {
    std::uint64_t high = index >> low_bits_;
    std::uint64_t low = index & low_mask(low_bits_);
    for (unsigned round = 0; round < rounds_; round += 2) {
      high ^= random_at(key_ + round, low) & low_mask(high_bits_);
      low ^= random_at(key_ + round + 1, high) & low_mask(low_bits_);
    }
    index = high << low_bits_ | low;
  } while (index >= size_);
  return index;
}

StreamSchedule::StreamSchedule(std::uint64_t key, std::span<const std::uint64_t> weights,
                                   std::uint64_t first_window)
    : key_(key), first_window_(first_window), left_shares_(weights.size()) {
  require(!weights.empty(), "a schedule needs at least one stream");
  for (const std::uint64_t weight : weights) {
    require(weight >= 1 && weight <= kMaxWeight, "a stream's weight must be from 1 to 2^32");
  }
  const auto split = [&](const auto& self, std::size_t first, std::size_t end) -> std::uint64_t {
    if (end - first == 1) return weights[first];
    const std::size_t middle = std::midpoint(first, end);
    const std::uint64_t left = self(self, first, middle);
    const std::uint64_t right = self(self, middle, end);
    left_shares_[middle] = static_cast<std::uint64_t>((Uint128{left} << 64) / (left + right));
    return left + right;
  };
  (void)split(split, 0, weights.size());
}

StreamSchedule::Draw StreamSchedule::draw_without_chance(std::uint64_t visit) const noexcept {
  std::size_t first = 0;
  std::size_t end = left_shares_.size();
  while (end - first > 1) {
    const std::size_t middle = std::midpoint(first, end);
    const std::uint64_t left = visits_left(visit, left_shares_[middle]);
    const bool goes_left = visits_left(visit + 1, left_shares_[middle]) > left;
    visit = goes_left ? left : visit - left;
    (goes_left ? end : first) = middle;
  }
  return {first, visit};
}

std::array<StreamSchedule::Draw, StreamSchedule::kWindow> StreamSchedule::draws_of(
    std::uint64_t window) const noexcept {
  std::array<Draw, kWindow> draws;
  for (std::size_t i = 0; i < kWindow; ++i) draws[i] = draw_without_chance(window * kWindow + i);
  const std::uint64_t key = random_at(key_, first_window_ + window);
  for (std::size_t i = kWindow - 1; i > 0; --i) {
    std::swap(draws[i], draws[Digits(random_at(key, i)).take(i + 1)]);
  }
  // The streams are shuffled; a stream's draws are numbered in the order they come.
  for (std::size_t i = 0; i < kWindow; ++i) {
    for (std::size_t j = i + 1; j < kWindow; ++j) {
      if (draws[j].stream == draws[i].stream && draws[j].number < draws[i].number) {
        std::swap(draws[i].number, draws[j].number);
      }
    }
  }
  return draws;
}

std::vector<std::uint64_t> StreamSchedule::counts_of_first(std::uint64_t samples) const {
  std::vector<std::uint64_t> counts(left_shares_.size());
  const auto share_out = [&](const auto& self, std::size_t first, std::size_t end,
                             std::uint64_t visits) -> void {
    if (end - first == 1) {
      counts[first] = visits;
      return;
    }
    const std::size_t middle = std::midpoint(first, end);
    const std::uint64_t left = visits_left(visits, left_shares_[middle]);
    self(self, first, middle, left);
    self(self, middle, end, visits - left);
  };
  const std::uint64_t window = samples / kWindow;
  share_out(share_out, 0, counts.size(), window * kWindow);  // whole windows: their shuffle is no matter
  const auto draws = draws_of(window);
  for (const Draw& draw : std::span(draws).first(samples % kWindow)) ++counts[draw.stream];
  return counts;
}

Order::Order(std::uint64_t seed, std::span<const Segment> segments,
             std::span<const std::uint64_t> blocks)
    : block_key_(key_for(seed, Purpose::block_order)), blocks_(blocks.begin(), blocks.end()) {
  require(!segments.empty() && segments.front().first_sample == 0,
          "an order's first segment begins at sample 0");
  for (const std::uint64_t count : blocks) {
    require(count >= 1 && count <= kMaxSize, "a stream's blocks must be from 1 to 2^63");
  }
  const std::uint64_t key = key_for(seed, Purpose::language_order);
  std::uint64_t first_window = 0;
  std::vector<std::uint64_t> drawn(blocks.size());
  for (const auto& [first_sample, weights] : segments) {
    require(weights.size() == blocks.size(),
            "every stream needs a number of blocks and a weight");
    if (!parts_.empty()) {
      require(first_sample > parts_.back().first_sample && first_sample < kMaxSample,
              "segments begin one after another, below sample 2^62");
      const std::uint64_t samples = first_sample - parts_.back().first_sample;
      first_window += (samples + StreamSchedule::kWindow - 1) / StreamSchedule::kWindow;
      const auto counts = parts_.back().schedule.counts_of_first(samples);
      for (std::size_t l = 0; l < drawn.size(); ++l) drawn[l] += counts[l];
    }
    parts_.push_back({first_sample, StreamSchedule(key, weights, first_window), drawn});
  }
}

void Order::fill_samples(std::uint64_t first, const SampleColumns& out) const {
  const std::size_t count = out.streams.size();
  require(out.passes.size() == count && out.blocks.size() == count, "the columns' lengths differ");
  require(first <= kMaxSample && count <= kMaxSample - first, "sample numbers end at 2^62");
  const auto after = [](std::uint64_t sample, const Part& part) { return sample < part.first_sample; };
  auto next = std::upper_bound(parts_.begin(), parts_.end(), first, after);
  for (std::size_t row = 0; row < count;) {
    if (next != parts_.end() && first + row == next->first_sample) ++next;
    const Part& part = *std::prev(next);
    const std::uint64_t end = next == parts_.end() ? kMaxSample : next->first_sample;
    const std::uint64_t sample = first + row - part.first_sample;
    const auto draws = part.schedule.draws_of(sample / StreamSchedule::kWindow);
    for (std::size_t i = sample % draws.size();
         i < draws.size() && row < count && first + row < end; ++i) {
      const std::size_t stream = draws[i].stream;
      const std::uint64_t number = part.drawn_before[stream] + draws[i].number;
      const std::uint64_t pass = number / blocks_[stream];
      const std::uint64_t key = random_at(random_at(block_key_, stream), pass);
      const std::uint64_t block = Permutation(key, blocks_[stream])(number % blocks_[stream]);
      out.streams[row] = static_cast<std::int64_t>(stream);
      out.passes[row] = static_cast<std::int64_t>(pass);
      out.blocks[row] = static_cast<std::int64_t>(block);
      ++row;
    }
  }
}

}  // namespace xlm_ds
