#include "xlm_ds/fill_batch.hpp"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "scratch.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/file.hpp"
#include "xlm_ds/mask.hpp"
#include "xlm_ds/special_ids.hpp"
#include "xlm_ds/stream.hpp"
#include "xlm_ds/token_dataset.hpp"

namespace {

using xlm_ds::BreakMode;
using xlm_ds::InputError;
using xlm_ds::Stream;
using xlm_ds::TokenDataset;

class Pair {
 public:
  Pair(const std::vector<std::uint32_t>& lengths, const std::vector<std::uint16_t>& ids,
       const std::string& name = "batch")
      : scratch_(name) {
    xlm_ds::OutputFile(scratch_ / "lengths").write_at(0, std::as_bytes(std::span(lengths)));
    xlm_ds::write_index(scratch_ / "train.ar.idx", xlm_ds::IndexKind::mmap, xlm_ds::Dtype::uint16,
                        scratch_ / "lengths");
    xlm_ds::OutputFile(scratch_ / "train.ar.bin").write_at(0, std::as_bytes(std::span(ids)));
  }
  [[nodiscard]] std::filesystem::path prefix() const { return scratch_ / "train.ar"; }

 private:
  xlm_ds_test::Scratch scratch_;
};

using Ids = std::vector<std::int64_t>;

Ids block_of(const TokenDataset& dataset, std::uint64_t block) {
  Ids ids(dataset.block_size());
  ids.resize(dataset.fill_block(block, 100, ids));
  return ids;
}

}  // namespace

TEST(blocks_run_across_sequences_or_follow_them) {
  const Pair pair({4, 1, 3}, {10, 11, 12, 2, 2, 13, 14, 2});
  const TokenDataset stream(pair.prefix(), BreakMode::none, 3);
  CHECK(stream.blocks() == 3 && stream.count_cut() == 0);
  CHECK((block_of(stream, 1) == Ids{2, 2, 13}) && (block_of(stream, 2) == Ids{14, 2}));
  const TokenDataset lines(pair.prefix(), BreakMode::eos, 3);
  CHECK(lines.blocks() == 3 && lines.count_cut() == 1);
  CHECK((block_of(lines, 0) == Ids{10, 11, 12}) && (block_of(lines, 1) == Ids{2}));
}

TEST(complete_blocks_end_with_sequences_and_documents) {
  const Pair pair({2, 1, 3, 1, 7, 2}, {10, 2, 2, 11, 12, 2, 2, 13, 14, 15, 16, 17, 18, 2, 19, 2});
  const TokenDataset whole(pair.prefix(), BreakMode::complete, 5);
  CHECK(whole.blocks() == 4 && whole.count_cut() == 1 && whole.table_bytes() == 32);
  CHECK((block_of(whole, 0) == Ids{10, 2, 2}) && (block_of(whole, 1) == Ids{11, 12, 2, 2}));
  CHECK((block_of(whole, 2) == Ids{13, 14, 15, 16, 17}) && (block_of(whole, 3) == Ids{19, 2}));
  const TokenDataset documents(pair.prefix(), BreakMode::complete_doc, 5);
  CHECK(documents.blocks() == 4 && documents.count_cut() == 1);
  CHECK((block_of(documents, 0) == Ids{10, 2}) && (block_of(documents, 1) == Ids{11, 12, 2}));
  CHECK((block_of(documents, 2) == block_of(whole, 2)) && (block_of(documents, 3) == Ids{19, 2}));
  CHECK_THROWS((void)documents.block_length(4), std::out_of_range);
  const TokenDataset longest(pair.prefix(), BreakMode::complete, (1U << 20U) - 1);
  CHECK(longest.blocks() == 1 && longest.block_length(0) == 16);
  CHECK_THROWS(TokenDataset(pair.prefix(), BreakMode::complete, 1U << 20U), InputError);
}

TEST(dataset_refuses_what_is_not_there) {
  const Pair pair({2}, {10, 2});
  const TokenDataset dataset(pair.prefix(), BreakMode::none, 4);
  std::vector<std::int64_t> ids(4), few(3);
  CHECK_THROWS((void)dataset.block_length(1), std::out_of_range);
  CHECK_THROWS(dataset.fill_block(0, 10, ids), InputError);  // id 10, dictionary of 10
  CHECK_THROWS(dataset.fill_block(0, 11, few), std::invalid_argument);
  CHECK_THROWS(TokenDataset(pair.prefix(), BreakMode::none, 0), std::invalid_argument);
  CHECK_THROWS(TokenDataset(pair.prefix() / "no", BreakMode::none, 4), std::system_error);
}

TEST(masking_has_the_exact_number_and_keeps_the_rest) {
  for (const std::size_t length : {0, 1, 2, 64, 65, 255}) {
    std::vector<std::int64_t> tokens(length);
    std::iota(tokens.begin(), tokens.end(), 1000);
    const auto original = tokens;
    const std::size_t count = xlm_ds::masked_count(0.15, length);
    std::vector<std::int64_t> positions(count), targets(count);
    xlm_ds::Masker masker({.seed = 3, .ratio = 0.15, .vocab_size = 900}, 255);
    masker.mask(1, 2, 3, tokens, positions, targets);
    CHECK(std::is_sorted(positions.begin(), positions.end()));
    CHECK(std::set<std::int64_t>(positions.begin(), positions.end()).size() == count);
    for (std::size_t i = 0; i < count; ++i) {
      const auto position = static_cast<std::size_t>(positions[i]);
      CHECK(targets[i] == original[position]);
      const std::int64_t shown = std::exchange(tokens[position], targets[i]);
      CHECK(shown == targets[i] || (shown >= xlm_ds::kMask && shown < 900));
    }
    CHECK(tokens == original);
  }
}

TEST(words_are_masked_whole_and_the_last_is_cut) {
  // Words of 3, 1, 2 and 1 tokens, and an eos that ends the one before it.
  const std::vector<std::int64_t> original{70, 70, 10, 11, 70, 12, 70, xlm_ds::kEos};
  const std::vector<std::uint64_t> goes_on{0, std::uint64_t{1} << (70 - 64)};
  const std::vector<std::pair<std::int64_t, std::int64_t>> words{
      {0, 3}, {3, 4}, {4, 6}, {6, 7}, {7, 8}};
  xlm_ds::Masker masker({.seed = 3, .ratio = 0.5, .vocab_size = 100, .word_goes_on = goes_on}, 8);
  int cut = 0;
  for (std::uint64_t block = 0; block < 100; ++block) {
    auto tokens = original;
    std::vector<std::int64_t> positions(4), targets(4);
    masker.mask(0, 0, block, tokens, positions, targets);
    const std::set<std::int64_t> masked(positions.begin(), positions.end());
    CHECK(masked.size() == 4);
    int partial = 0;
    for (const auto& [first, end] : words) {
      const auto taken = std::distance(masked.lower_bound(first), masked.lower_bound(end));
      partial += taken > 0 && taken < end - first;
    }
    CHECK(partial <= 1);
    cut += partial;
  }
  CHECK(cut > 0 && cut < 100);
  CHECK_THROWS(xlm_ds::Masker({.vocab_size = 129, .word_goes_on = goes_on}, 8),
               std::invalid_argument);
}

TEST(masking_refuses_shares_and_dictionaries_it_cannot_use) {
  CHECK(xlm_ds::masked_count(0.15, 255) == 39);
  CHECK(xlm_ds::masked_count(1, 7) == 7 && xlm_ds::masked_count(0, 7) == 0);
  CHECK_THROWS((void)xlm_ds::masked_count(1.1, 7), InputError);
  CHECK_THROWS((void)xlm_ds::masked_count(-0.1, 7), InputError);
  CHECK_THROWS(xlm_ds::Masker({.vocab_size = 5}, 7), InputError);
}

struct Batch {
  Batch(std::size_t rows, std::size_t length, std::size_t masked)
      : ids(rows * length), languages(rows), seconds(rows), starts(rows),
        positions(rows * masked), targets(rows * masked) {}
  [[nodiscard]] xlm_ds::BatchArrays arrays() {
    return {ids, languages, seconds, starts, positions, targets};
  }
  Ids ids, languages, seconds, starts, positions, targets;
};

TEST(batch_pads_short_rows) {
  const Pair pair({5}, {10, 11, 12, 13, 2});
  const TokenDataset dataset(pair.prefix(), BreakMode::none, 4);
  const Stream stream(dataset, 7);
  const std::vector<const Stream*> streams{nullptr, &stream};
  const Ids numbers{1, 1}, passes{0, 0}, blocks{0, 1}, nobody{0, 0};
  Batch batch(2, 5, 2);
  const xlm_ds::Masking masking{.seed = 1, .ratio = 0.5, .vocab_size = 20};
  const auto filled = xlm_ds::fill_batch({streams, numbers, passes, blocks}, masking, batch.arrays());
  CHECK(filled.has_padding && !filled.has_pairs);
  CHECK((batch.languages == Ids{7, 7}) && (batch.seconds == Ids{-1, -1}) && (batch.starts == Ids{5, 5}));
  const Ids &ids = batch.ids, &positions = batch.positions, &targets = batch.targets;
  CHECK(ids[0] == xlm_ds::kEos && ids[5] == xlm_ds::kEos);
  CHECK(ids[7] == xlm_ds::kPad && ids[9] == xlm_ds::kPad);
  CHECK(positions[2] == 6 && targets[2] == 2 && positions[3] == 5 && targets[3] == xlm_ds::kPad);
  CHECK(xlm_ds::count_targets({streams, numbers, passes, blocks}, 0.5) == 3);
  CHECK_THROWS(xlm_ds::fill_batch({streams, nobody, passes, blocks}, masking, batch.arrays()),
               std::out_of_range);
  auto too_small = batch.arrays();
  too_small.targets = too_small.targets.first(3);
  CHECK_THROWS(xlm_ds::fill_batch({streams, numbers, passes, blocks}, masking, too_small),
               std::invalid_argument);
  auto without_starts = batch.arrays();
  without_starts.second_starts = {};
  CHECK_THROWS(xlm_ds::fill_batch({streams, numbers, passes, blocks}, masking, without_starts),
               std::invalid_argument);
}

namespace {

/// The rows of line pairs as they are without masks, in rows of `length` tokens.
Batch rows_of(const Stream& pairs, const Ids& lines, std::size_t length) {
  const std::vector<const Stream*> streams{&pairs};
  const Ids zeros(lines.size(), 0);
  Batch batch(lines.size(), length, 0);
  const xlm_ds::Masking none{.ratio = 0, .vocab_size = 100};
  const auto filled = xlm_ds::fill_batch({streams, zeros, zeros, lines}, none, batch.arrays());
  CHECK(filled.has_pairs);
  return batch;
}

}  // namespace

TEST(a_pairs_row_is_both_lines_and_is_cut_fairly) {
  const Pair one({3, 8, 8, 2, 1}, {10, 11, 2, 20, 21, 22, 23, 24, 25, 26, 2, 30, 31, 32, 33, 34, 35, 36, 2, 40, 2, 2});
  const Pair two({2, 8, 2, 8, 2}, {50, 2, 60, 61, 62, 63, 64, 65, 66, 2, 70, 2, 80, 81, 82, 83, 84, 85, 86, 2, 90, 2},
                 "batch_two");
  const TokenDataset first(one.prefix(), BreakMode::eos, 8), second(two.prefix(), BreakMode::eos, 8);
  const Stream pairs(first, 0, second, 3);
  CHECK(pairs.is_pair() && pairs.blocks() == 5 && pairs.count_cut() == 3);
  const Batch batch = rows_of(pairs, {0, 1, 2, 3, 4}, 9);
  const Ids expected{2, 10, 11, 2, 2, 50, 2,  1,  1,   // fits
                     2, 20, 21, 22, 2, 2, 60, 61, 2,   // both too long: half each, the odd one to the first
                     2, 30, 31, 32, 33, 2, 2, 70, 2,   // the second needs less than its half
                     2, 40, 2, 2, 80, 81, 82, 83, 2,   // the first does
                     2, 2, 2, 90, 2, 1, 1, 1, 1};      // an empty line
  CHECK(batch.ids == expected);
  CHECK((batch.starts == Ids{4, 5, 6, 3, 2}) && (batch.seconds == Ids(5, 3)));
  CHECK((batch.languages == Ids(5, 0)));
}

TEST(sides_that_do_not_fit_are_refused) {
  const Pair one({2, 2}, {10, 2, 11, 2}), two({2}, {12, 2}, "batch_two");
  const TokenDataset first(one.prefix(), BreakMode::eos, 8), second(two.prefix(), BreakMode::eos, 8);
  const TokenDataset other(one.prefix(), BreakMode::eos, 9), tiny(one.prefix(), BreakMode::eos, 4);
  CHECK_THROWS(Stream(first, 0, second, 1), std::invalid_argument);
  CHECK_THROWS(Stream(first, 0, other, 1), std::invalid_argument);
  CHECK_THROWS(Stream(tiny, 0, tiny, 1), std::invalid_argument);
  CHECK_THROWS((void)Stream(first, 0, first, 1).row(2), std::out_of_range);
}

TEST(no_two_streams_share_a_key) {
  const Pair pair({2}, {10, 2});
  const TokenDataset lines(pair.prefix(), BreakMode::eos, 8);
  std::set<std::uint64_t> keys;
  for (std::int64_t l = 0; l < 20; ++l) {
    CHECK(Stream(lines, l).key() == static_cast<std::uint64_t>(l));  // as before there were pairs
    keys.insert(Stream(lines, l).key());
    for (std::int64_t m = 0; m < 20; ++m) keys.insert(Stream(lines, l, lines, m).key());
  }
  CHECK(keys.size() == 20 + 20 * 20);
}
