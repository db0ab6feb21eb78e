// What several threads do at once. Its laws are few: it is there for `make tsan`, under which a race ends the program.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#include "check.hpp"
#include "scratch.hpp"
#include "xlm_ds/binarize.hpp"
#include "xlm_ds/bpe.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/file.hpp"
#include "xlm_ds/token_dataset.hpp"

namespace {

using xlm_ds_test::read;
using xlm_ds_test::Scratch;
using xlm_ds_test::write;

std::string text_of(std::size_t lines) {
  std::string text;
  for (std::size_t i = 0; i < lines; ++i) text += "the cat " + std::to_string(i % 97) + " sat\n";
  return text;
}

const xlm_ds::Dictionary kDictionary({"<s>", "<pad>", "</s>", "<unk>", "<mask>", "the", "cat", "sat"});
constexpr std::size_t kChunkBytes = 512;

}  // namespace

TEST(two_files_are_binarized_at_once_while_their_progress_is_read) {
  const Scratch scratch("threads");
  write(scratch / "text", text_of(20000));
  const std::vector<xlm_ds::Piece> text{{.path = scratch / "text"}};
  std::vector<xlm_ds::Progress> progress(2);
  const auto binarize = [&](std::size_t i) {
    const auto name = std::to_string(i);
    const xlm_ds::EncodedPaths paths{scratch / (name + ".bin"), scratch / (name + ".lengths")};
    (void)xlm_ds::encode_text(text, kDictionary, xlm_ds::IndexKind::mmap, paths, 3, progress[i], kChunkBytes);
  };
  const auto text_bytes = std::filesystem::file_size(scratch / "text");
  {
    const std::jthread first(binarize, 0), second(binarize, 1);
    while (progress[0].done_bytes() < text_bytes || progress[1].done_bytes() < text_bytes) std::this_thread::yield();
  }
  CHECK(read(scratch / "0.bin").size() == std::size_t{2} * 20000 * 5);
  CHECK(read(scratch / "0.bin") == read(scratch / "1.bin") && read(scratch / "0.lengths") == read(scratch / "1.lengths"));
}

TEST(work_is_cancelled_from_another_thread) {
  const Scratch scratch("threads");
  write(scratch / "text", text_of(50000));
  const std::vector<xlm_ds::Piece> text{{.path = scratch / "text"}};
  xlm_ds::Progress binarized, counted;
  {
    const std::jthread binarizing([&] {
      const xlm_ds::EncodedPaths paths{scratch / "bin", scratch / "lengths"};
      (void)xlm_ds::encode_text(text, kDictionary, xlm_ds::IndexKind::lazy, paths, 3, binarized, kChunkBytes);
    });
    const std::jthread counting([&] { (void)xlm_ds::count_text_words(text, 3, counted, kChunkBytes); });
    while (binarized.done_bytes() == 0 || counted.done_bytes() == 0) std::this_thread::yield();
    binarized.cancel();
    counted.cancel();
  }
  CHECK(binarized.done_bytes() > 0 && counted.done_bytes() > 0);  // a slow machine may have finished before
}

TEST(a_bad_byte_stops_all_threads) {
  const Scratch scratch("threads");
  write(scratch / "text", text_of(2000) + "\xFF\n" + text_of(2000) + "\xFE\n");
  const std::vector<xlm_ds::Piece> text{{.path = scratch / "text"}};
  for (int round = 0; round < 20; ++round) {
    xlm_ds::Progress progress;
    const xlm_ds::EncodedPaths paths{scratch / "bin", scratch / "lengths"};
    CHECK_THROWS(xlm_ds::encode_text(text, kDictionary, xlm_ds::IndexKind::mmap, paths, 4, progress, 64),
                 xlm_ds::InputError);
    CHECK_THROWS((void)xlm_ds::count_text_words(text, 4, progress, 64), xlm_ds::InputError);
  }
}

TEST(codes_are_applied_by_several_threads) {
  const Scratch scratch("threads");
  write(scratch / "codes", "t h 3\nth e</w> 2\nc a 2\nca t</w> 1\n");
  write(scratch / "text", text_of(700000));  // more than one chunk for each of the threads
  const xlm_ds::Bpe bpe(scratch / "codes");
  bpe.apply_file(scratch / "text", scratch / "one", 1);
  bpe.apply_file(scratch / "text", scratch / "three", 3);
  CHECK(read(scratch / "three").starts_with("the cat 0 s@@ a@@ t\n"));
  CHECK(read(scratch / "one") == read(scratch / "three"));
}

TEST(a_dataset_is_read_by_several_threads) {
  const Scratch scratch("threads");
  const std::vector<std::uint32_t> lengths(1000, 3);
  xlm_ds::OutputFile(scratch / "lengths").write_at(0, std::as_bytes(std::span(lengths)));
  xlm_ds::write_index(scratch / "train.ar.idx", xlm_ds::IndexKind::mmap, xlm_ds::Dtype::uint16, scratch / "lengths");
  write(scratch / "train.ar.bin", std::string(6000, '\1'));  // ids of 257
  const xlm_ds::TokenDataset dataset(scratch / "train.ar", xlm_ds::BreakMode::none, 7);
  std::vector<std::uint64_t> sums(3);
  {
    std::vector<std::jthread> threads;
    for (auto& sum : sums) {
      threads.emplace_back([&dataset, &sum] {
        std::vector<std::int64_t> ids(7);
        for (std::uint64_t block = 0; block < dataset.blocks(); ++block) {
          for (std::size_t n = dataset.fill_block(block, 300, ids); n != 0; --n) sum += static_cast<std::uint64_t>(ids[n - 1]);
        }
      });
    }
  }
  for (const auto sum : sums) CHECK(sum == 3000 * 257);
}
