#include "xlm_ds/binarize.hpp"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <system_error>
#include <utility>
#include <unistd.h>
#include <vector>

#include "check.hpp"
#include "scratch.hpp"
#include "xlm_ds/chunk_reader.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/special_ids.hpp"

namespace {

using xlm_ds_test::read;
using xlm_ds_test::Scratch;
using xlm_ds_test::write;

const xlm_ds::Dictionary kDictionary({"<s>", "<pad>", "</s>", "<unk>", "<mask>", "the", "cat",
                                      "sat", "dog"});

struct Result {
  std::string data, index;
  xlm_ds::TextCounts counts;
};

Result binarized(const Scratch& scratch, const std::string& text, xlm_ds::IndexKind kind,
                 std::size_t threads = 1, std::size_t chunk_bytes = xlm_ds::kBinarizeChunkBytes) {
  write(scratch / "text", text);
  xlm_ds::Progress progress;
  const std::vector<xlm_ds::Piece> pieces{{.path = scratch / "text"}};
  auto counts = xlm_ds::encode_text(pieces, kDictionary, kind, {scratch / "bin", scratch / "lengths"},
                                    threads, progress, chunk_bytes);
  xlm_ds::write_text_index(scratch / "idx", kind, kDictionary.size(), scratch / "lengths");
  return {read(scratch / "bin"), read(scratch / "idx"), std::move(counts)};
}

std::string refusal(const Scratch& scratch, const std::string& text, std::size_t threads,
                    std::size_t chunk_bytes) {
  try {
    (void)binarized(scratch, text, xlm_ds::IndexKind::mmap, threads, chunk_bytes);
  } catch (const xlm_ds::InputError& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST(the_worked_example) {
  const Scratch scratch("binarize");
  const auto mmap = binarized(scratch, "the cat sat\nthe xyz", xlm_ds::IndexKind::mmap);
  CHECK(mmap.data == std::string("\5\0\6\0\7\0\2\0\5\0\3\0\2\0", 14) && mmap.index.size() == 50);
  CHECK(mmap.counts.lines == 2 && mmap.counts.unknown == 1 && mmap.counts.by_id[xlm_ds::kEos] == 2);
  const auto lazy = binarized(scratch, "the", xlm_ds::IndexKind::lazy);
  CHECK(lazy.data == std::string("\6\0\0\0\3\0\0\0", 8) && lazy.index.size() == 88);
}

TEST(threads_and_chunks_change_nothing) {
  const Scratch scratch("binarize");
  std::mt19937 random(3);
  const std::vector<std::string> pieces{"the",    "cat", " ",     "\n",         "\r\n", "\r",
                                        "\u3000", "xyz", "<unk>", "\U0001F600", "\t"};
  for (int round = 0; round < 20; ++round) {
    std::string text;
    for (std::size_t n = random() % 200; n != 0; --n) text += pieces[random() % pieces.size()];
    const auto expected = binarized(scratch, text, xlm_ds::IndexKind::mmap);
    for (const std::size_t threads : {1, 2, 7}) {
      for (const std::size_t chunk_bytes : {1, 2, 3, 5, 64}) {
        const auto found = binarized(scratch, text, xlm_ds::IndexKind::mmap, threads, chunk_bytes);
        CHECK(found.data == expected.data && found.index == expected.index);
        CHECK(found.counts.blank_lines == expected.counts.blank_lines);
        CHECK(found.counts.unknown == expected.counts.unknown);
        CHECK(found.counts.by_id == expected.counts.by_id);
      }
    }
  }
}

TEST(the_first_bad_byte_is_named_whatever_the_threads) {
  const Scratch scratch("binarize");
  std::string text;
  for (int line = 0; line < 50; ++line) text += "the cat\r\n";
  const std::string good = text;
  for (int line = 0; line < 50; ++line) text += "the \xFF cat \xC0\n";
  for (const std::size_t threads : {1, 2, 7}) {
    for (const std::size_t chunk_bytes : {3, 40, 100000}) {
      const auto message = refusal(scratch, text, threads, chunk_bytes);
      CHECK(message.find("line 51, byte " + std::to_string(good.size() + 4) + ": 0xff") !=
            std::string::npos);
    }
  }
}

TEST(files_that_cannot_be_opened_are_system_errors) {
  const Scratch scratch("binarize");
  write(scratch / "text", "the");
  xlm_ds::Progress progress;
  const auto attempt = [&](const char* text, const char* data) {
    const std::vector<xlm_ds::Piece> pieces{{.path = scratch / text}};
    (void)xlm_ds::encode_text(pieces, kDictionary, xlm_ds::IndexKind::mmap,
                              {scratch / data, scratch / "lengths"}, 1, progress);
  };
  CHECK_THROWS(attempt("none", "bin"), std::system_error);
  CHECK_THROWS(attempt("text", "none/bin"), std::system_error);
}

TEST(a_cancelled_call_returns_early) {
  const Scratch scratch("binarize");
  write(scratch / "text", std::string(100000, '\n'));
  for (const std::size_t threads : {1, 3}) {
    xlm_ds::Progress progress;
    progress.cancel();
    const std::vector<xlm_ds::Piece> pieces{{.path = scratch / "text"}};
    CHECK(xlm_ds::count_text_words(pieces, threads, progress, 10).empty());
    CHECK(progress.done_bytes() == 0);
  }
}

TEST(words_are_counted) {
  const Scratch scratch("binarize");
  write(scratch / "text", "the cat the\n\u00A0the");
  for (const std::size_t threads : {1, 2, 7}) {
    xlm_ds::Progress progress;
    const std::vector<xlm_ds::Piece> pieces{{.path = scratch / "text"}};
    const auto counts = xlm_ds::count_text_words(pieces, threads, progress, 4);
    const std::map<std::string, std::uint64_t> found(counts.begin(), counts.end());
    CHECK(counts.size() == 2 && found.at("the") == 3 && found.at("cat") == 1);
    CHECK(progress.done_bytes() >= 18);
  }
}

TEST(chunks_are_the_text_cut_after_blanks) {
  const Scratch scratch("binarize");
  const std::string text = "ab cd\r\nefghijklmnop q\rr";
  write(scratch / "text", text);
  const std::vector<xlm_ds::Piece> pieces{{.path = scratch / "text"}};
  const xlm_ds::Progress progress;
  for (std::size_t chunk_bytes = 1; chunk_bytes < 30; ++chunk_bytes) {
    xlm_ds::ChunkReader reader(pieces, chunk_bytes, progress);
    xlm_ds::Chunk chunk;
    std::string all;
    for (std::uint64_t number = 0; reader.next(chunk); ++number) {
      CHECK(chunk.number == number && chunk.offset == all.size());
      CHECK(chunk.text.ends_with(' ') || chunk.text.ends_with('\n'));
      all += chunk.text;
    }
    CHECK(all == text + "\n");
  }
}

TEST(pieces_follow_each_other_and_each_ends_its_line) {
  const Scratch scratch("binarize");
  write(scratch / "a", "one\ntwo three\nfour");
  write(scratch / "empty", "");
  write(scratch / "b", "five\r");
  write(scratch / "c", "\nsix ");
  const std::vector<xlm_ds::Piece> pieces{{.path = scratch / "a", .begin = 4, .end = 18},
                                          {.path = scratch / "empty"},
                                          {.path = scratch / "a", .begin = 4, .end = 4},
                                          {.path = scratch / "b"},
                                          {.path = scratch / "c"},
                                          {.path = scratch / "a", .begin = 0, .end = 14}};
  const std::vector<std::pair<std::size_t, std::string>> expected{
      {0, "two three\nfour\n"}, {3, "five\r"}, {4, "\nsix \n"}, {5, "one\ntwo three\n"}};
  const xlm_ds::Progress progress;
  for (std::size_t chunk_bytes = 1; chunk_bytes < 30; ++chunk_bytes) {
    xlm_ds::ChunkReader reader(pieces, chunk_bytes, progress);
    xlm_ds::Chunk chunk;
    std::vector<std::pair<std::size_t, std::string>> found;
    while (reader.next(chunk)) {
      const auto piece = static_cast<std::size_t>(chunk.piece - pieces.data());
      if (found.empty() || found.back().first != piece) found.emplace_back(piece, "");
      CHECK(chunk.offset == chunk.piece->begin + found.back().second.size());
      found.back().second += chunk.text;
    }
    CHECK(found == expected);
  }
}

TEST(a_file_that_is_shorter_than_its_piece_is_refused) {
  const Scratch scratch("binarize");
  write(scratch / "text", "the cat\n");
  const std::vector<xlm_ds::Piece> pieces{{.path = scratch / "text", .begin = 0, .end = 9}};
  const auto attempt = [&](std::size_t threads, std::size_t chunk_bytes) {
    xlm_ds::Progress progress;
    (void)xlm_ds::count_text_words(pieces, threads, progress, chunk_bytes);
  };
  CHECK_THROWS(attempt(1, 3), xlm_ds::InputError);
  CHECK_THROWS(attempt(2, 100), xlm_ds::InputError);
}
