#include "xlm_ds/order.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <set>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.hpp"
#include "xlm_ds/random.hpp"

namespace {

using xlm_ds::StreamSchedule;
using xlm_ds::Order;
using xlm_ds::Permutation;
using xlm_ds::Segment;

struct Columns {
  explicit Columns(std::size_t count) : streams(count), passes(count), blocks(count) {}
  std::vector<std::int64_t> streams, passes, blocks;
  [[nodiscard]] xlm_ds::SampleColumns out() { return {streams, passes, blocks}; }
};

}  // namespace

TEST(random_numbers_are_splitmix64) {
  // The first outputs of Sebastiano Vigna's splitmix64.c for the seed 1234567, as Rosetta Code
  // lists them.
  const std::vector<std::uint64_t> known{6457827717110365317U, 3203168211198807973U,
                                         9817491932198370423U};
  for (std::size_t i = 0; i < known.size(); ++i) CHECK(xlm_ds::random_at(1234567, i) == known[i]);
}

TEST(digits_are_those_of_a_fraction) {
  xlm_ds::Digits half(std::uint64_t{1} << 63);
  CHECK(half.take(10) == 5 && half.take(10) == 0);
  xlm_ds::Digits nearly_one(~std::uint64_t{0});
  CHECK(nearly_one.take(7) == 6 && nearly_one.take(1000) == 999);
}

TEST(permutation_is_a_bijection_of_every_size_to_5000) {
  std::vector<std::uint64_t> seen_at(5000);  // which permutation went there last
  std::uint64_t number = 0;
  for (std::uint64_t size = 1; size <= 5000; ++size) {
    for (const std::uint64_t key : {size, ~size * 7}) {
      const Permutation permutation(key, size);
      ++number;
      bool bijective = true;
      for (std::uint64_t i = 0; i < size; ++i) {
        const std::uint64_t place = permutation(i);
        bijective = bijective && place < size && std::exchange(seen_at[place], number) != number;
      }
      CHECK(bijective);
    }
  }
}

TEST(permutation_refuses_what_it_cannot_do) {
  CHECK_THROWS(Permutation(1, 0), std::invalid_argument);
  CHECK_THROWS((void)Permutation(1, 5)(5), std::out_of_range);
}

TEST(schedule_keeps_every_quota_at_every_prefix) {
  std::vector<std::uint64_t> weights;
  for (std::uint64_t l = 1; l <= 100; ++l) weights.push_back(l * l * l);  // 1:10^6
  double total = 0;
  for (const auto weight : weights) total += static_cast<double>(weight);
  const StreamSchedule schedule(5, weights);
  std::vector<std::uint64_t> counts(weights.size());
  double worst = 0;
  for (std::uint64_t sample = 0; sample < 20000; ++sample) {
    const std::uint64_t window = sample / StreamSchedule::kWindow;
    const auto draw = schedule.draws_of(window)[sample % StreamSchedule::kWindow];
    CHECK(draw.number == counts[draw.stream]);
    ++counts[draw.stream];
    for (std::size_t l = 0; l < weights.size(); ++l) {
      const double share = static_cast<double>(weights[l]) / total;
      const double quota = share * static_cast<double>(sample + 1);
      worst = std::max(worst, std::abs(static_cast<double>(counts[l]) - quota));
    }
  }
  CHECK(worst > 0.5 && worst < 3.5 + 4);  // 7 levels of half a sample, and a window
}

TEST(schedule_refuses_weights_it_cannot_serve) {
  CHECK_THROWS(StreamSchedule(1, {}), std::invalid_argument);
  const std::vector<std::uint64_t> with_zero{1, 0};
  CHECK_THROWS(StreamSchedule(1, with_zero), std::invalid_argument);
}

TEST(order_does_not_depend_on_where_it_is_read_from) {
  const std::vector<std::uint64_t> blocks{17, 1, 1000};
  const std::vector<Segment> segments{{0, {3, 1, 2}}, {50, {1, 1, 5}}, {51, {9, 1, 1}}, {130, {1, 1, 1}}};
  const Order order(9, segments, blocks);
  Columns whole(200);
  order.fill_samples(40, whole.out());
  for (std::size_t i = 0; i < 200; ++i) {
    Columns one(1);
    order.fill_samples(40 + i, one.out());
    CHECK(one.streams[0] == whole.streams[i]);
    CHECK(one.passes[0] == whole.passes[i] && one.blocks[0] == whole.blocks[i]);
  }
}

TEST(order_refuses_streams_without_blocks) {
  const std::vector<std::uint64_t> blocks{17, 0}, one{1};
  const std::vector<Segment> segments{{0, {3, 1}}};
  CHECK_THROWS(Order(9, segments, blocks), std::invalid_argument);
  CHECK_THROWS(Order(9, segments, one), std::invalid_argument);
}

TEST(order_refuses_segments_that_do_not_follow) {
  const std::vector<std::uint64_t> blocks{17, 5};
  const std::vector<std::vector<Segment>> wrong{
      {},
      {{1, {3, 1}}},
      {{0, {3, 1}}, {0, {3, 1}}},
      {{0, {3, 1}}, {20, {3, 1}}, {19, {3, 1}}},
      {{0, {3, 1}}, {std::uint64_t{1} << 62, {3, 1}}},
      {{0, {3, 1}}, {20, {3}}},
  };
  for (const auto& segments : wrong) CHECK_THROWS(Order(9, segments, blocks), std::invalid_argument);
}

TEST(counts_of_a_schedule_are_those_of_counting) {
  const std::vector<std::uint64_t> weights{9, 1, 4, 4, 30};
  const StreamSchedule schedule(5, weights, 7);
  std::vector<std::uint64_t> counts(weights.size());
  for (std::uint64_t sample = 0; sample < 500; ++sample) {
    CHECK(schedule.counts_of_first(sample) == counts);
    ++counts[schedule.draws_of(sample / 16)[sample % 16].stream];
  }
}

TEST(segments_keep_their_quotas_and_the_passes_go_on) {
  const std::vector<std::uint64_t> blocks{5, 13, 40};
  const std::vector<Segment> segments{{0, {3, 1, 2}}, {501, {1, 1, 5}}, {1000, {9, 1, 1}}};
  Columns whole(3000);
  Order(9, segments, blocks).fill_samples(0, whole.out());
  std::vector<std::vector<std::int64_t>> walks(blocks.size());
  for (std::size_t i = 0; i < whole.streams.size(); ++i) {
    const auto stream = static_cast<std::size_t>(whole.streams[i]);
    CHECK(static_cast<std::uint64_t>(whole.passes[i]) == walks[stream].size() / blocks[stream]);
    walks[stream].push_back(whole.blocks[i]);
  }
  for (std::size_t l = 0; l < blocks.size(); ++l) {
    const auto size = static_cast<std::ptrdiff_t>(blocks[l]);
    for (auto pass = walks[l].begin(); walks[l].end() - pass >= size; pass += size) {
      CHECK(std::set<std::int64_t>(pass, pass + size).size() == blocks[l]);
    }
  }
  Columns one(501);
  Order(9, std::span(segments).first(1), blocks).fill_samples(0, one.out());
  CHECK(std::equal(one.blocks.begin(), one.blocks.end(), whole.blocks.begin()));
  double worst = 0;
  for (std::size_t s = 0; s < segments.size(); ++s) {
    const std::size_t end = s + 1 < segments.size() ? segments[s + 1].first_sample : 3000;
    const auto& weights = segments[s].weights;
    std::vector<double> counts(weights.size());
    const auto total =
        static_cast<double>(std::accumulate(weights.begin(), weights.end(), std::uint64_t{0}));
    for (std::size_t i = segments[s].first_sample; i < end; ++i) {
      ++counts[static_cast<std::size_t>(whole.streams[i])];
      for (std::size_t l = 0; l < weights.size(); ++l) {
        const double samples = static_cast<double>(i + 1 - segments[s].first_sample);
        const double quota = samples * static_cast<double>(weights[l]) / total;
        worst = std::max(worst, std::abs(counts[l] - quota));
      }
    }
  }
  CHECK(worst > 0.5 && worst < 1 + 4);  // 2 levels of half a sample, and a window
}
