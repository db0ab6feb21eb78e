#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

/// Sample number -> (stream, pass, block): a pure function of the seed, without tables of the
/// data's size.
namespace xlm_ds {

/// A random permutation of [0, size) that is computed, not stored: a Feistel network over the next
/// power of two, applied again while it leads outside. Equal keys give equal permutations.
class Permutation {
 public:
  /// size is from 1 to 2^63; throws std::invalid_argument otherwise.
  Permutation(std::uint64_t key, std::uint64_t size);

  /// Where `index` goes. O(1): fewer than two walks of the network on average. Throws
  /// std::out_of_range unless index < size.
  [[nodiscard]] std::uint64_t operator()(std::uint64_t index) const;

 private:
  std::uint64_t key_;
  std::uint64_t size_;
  unsigned low_bits_;
  unsigned high_bits_;
  unsigned rounds_;
};

/// Which stream (a language's text, or a pair of languages') each sample has. Stream l's quota of any n samples is n·weight_l / Σ weights,
/// exactly that fraction.
///
/// Without chance: the streams are the leaves of a binary tree; of n visits to a node, the
/// nearest whole number to n·(share of its left half) goes left. So the place of visit n is
/// computed, not counted, and each level adds at most half a sample to a stream's distance from
/// its quota. Then chance: every window of kWindow consecutive samples is shuffled by itself. After
/// every prefix, |count_l - quota_l| <= ceil(log2 streams)/2 + kWindow·p_l·(1 - p_l).
class StreamSchedule {
 public:
  static constexpr std::size_t kWindow = 16;

  /// Draw `number` of `stream`, counted from 0 in the order of the samples.
  struct Draw {
    std::size_t stream;
    std::uint64_t number;
  };

  /// Weights are from 1 to 2^32; throws std::invalid_argument otherwise, or if there are none.
  /// Window w is shuffled by number first_window + w of the key's stream, so that schedules one
  /// after another need not share any.
  StreamSchedule(std::uint64_t key, std::span<const std::uint64_t> weights,
                   std::uint64_t first_window = 0);

  /// The draws of samples [window·kWindow, (window + 1)·kWindow). O(log streams) for each.
  [[nodiscard]] std::array<Draw, kWindow> draws_of(std::uint64_t window) const noexcept;

  /// How often each stream is drawn in the first `samples` samples, exactly. O(streams).
  [[nodiscard]] std::vector<std::uint64_t> counts_of_first(std::uint64_t samples) const;

 private:
  [[nodiscard]] Draw draw_without_chance(std::uint64_t visit) const noexcept;

  std::uint64_t key_;
  std::uint64_t first_window_;
  // The tree splits streams [first, end) at their middle, which names the node.
  // left_shares_[middle] = share·2^64.
  std::vector<std::uint64_t> left_shares_;
};

/// Columns of samples; all three have the same length.
struct SampleColumns {
  std::span<std::int64_t> streams;
  std::span<std::int64_t> passes;
  std::span<std::int64_t> blocks;
};

/// A part of a run in which the streams keep their weights, up to the next part's first sample.
struct Segment {
  std::uint64_t first_sample;
  std::vector<std::uint64_t> weights;  // by stream
};

/// The order of a run. Draw n of a stream is block permutation(n mod blocks) of pass n / blocks,
/// with a new permutation each pass: every block comes once per pass.
///
/// Each segment begins a schedule of its own, so that its quotas hold from its first sample on; a
/// stream's draws are numbered through, so that passes go on across segments.
class Order {
 public:
  /// blocks[l] >= 1 are the blocks of stream l. The first segment begins at sample 0, the others
  /// each after the one before and below 2^62. Throws std::invalid_argument for other numbers, or
  /// if a segment has not a weight for every stream.
  Order(std::uint64_t seed, std::span<const Segment> segments,
        std::span<const std::uint64_t> blocks);

  /// Fills the columns with samples first, first + 1, … Throws std::invalid_argument if the
  /// columns' lengths differ or the samples go beyond 2^62.
  void fill_samples(std::uint64_t first, const SampleColumns& out) const;

 private:
  struct Part {
    std::uint64_t first_sample;
    StreamSchedule schedule;
    std::vector<std::uint64_t> drawn_before;  // by stream, in the parts before
  };

  std::uint64_t block_key_;
  std::vector<std::uint64_t> blocks_;
  std::vector<Part> parts_;
};

}  // namespace xlm_ds
