#include "xlm_ds/order.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "xlm_ds/random.hpp"

namespace {

using xlm_ds::LanguageSchedule;
using xlm_ds::Order;
using xlm_ds::Permutation;

struct Columns {
  explicit Columns(std::size_t count) : languages(count), passes(count), blocks(count) {}
  std::vector<std::int64_t> languages, passes, blocks;
  [[nodiscard]] xlm_ds::SampleColumns out() { return {languages, passes, blocks}; }
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

TEST(permutation_is_a_bijection_of_every_small_size) {
  for (std::uint64_t size = 1; size <= 300; ++size) {
    const Permutation permutation(size * 7, size);
    std::set<std::uint64_t> seen;
    for (std::uint64_t i = 0; i < size; ++i) seen.insert(permutation(i));
    CHECK(seen.size() == size && *seen.rbegin() == size - 1);
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
  const LanguageSchedule schedule(5, weights);
  std::vector<std::uint64_t> counts(weights.size());
  double worst = 0;
  for (std::uint64_t sample = 0; sample < 20000; ++sample) {
    const std::uint64_t window = sample / LanguageSchedule::kWindow;
    const auto draw = schedule.draws_of(window)[sample % LanguageSchedule::kWindow];
    CHECK(draw.number == counts[draw.language]);
    ++counts[draw.language];
    for (std::size_t l = 0; l < weights.size(); ++l) {
      const double share = static_cast<double>(weights[l]) / total;
      const double quota = share * static_cast<double>(sample + 1);
      worst = std::max(worst, std::abs(static_cast<double>(counts[l]) - quota));
    }
  }
  CHECK(worst > 0.5 && worst < 3.5 + 4);  // 7 levels of half a sample, and a window
}

TEST(schedule_refuses_weights_it_cannot_serve) {
  CHECK_THROWS(LanguageSchedule(1, {}), std::invalid_argument);
  const std::vector<std::uint64_t> with_zero{1, 0};
  CHECK_THROWS(LanguageSchedule(1, with_zero), std::invalid_argument);
}

TEST(order_does_not_depend_on_where_it_is_read_from) {
  const std::vector<std::uint64_t> weights{3, 1, 2}, blocks{17, 1, 1000};
  const Order order(9, weights, blocks);
  Columns whole(200);
  order.fill_samples(40, whole.out());
  for (std::size_t i = 0; i < 200; ++i) {
    Columns one(1);
    order.fill_samples(40 + i, one.out());
    CHECK(one.languages[0] == whole.languages[i]);
    CHECK(one.passes[0] == whole.passes[i] && one.blocks[0] == whole.blocks[i]);
  }
}

TEST(order_refuses_languages_without_blocks) {
  const std::vector<std::uint64_t> weights{3, 1}, blocks{17, 0}, one{1};
  CHECK_THROWS(Order(9, weights, blocks), std::invalid_argument);
  CHECK_THROWS(Order(9, weights, one), std::invalid_argument);
}
