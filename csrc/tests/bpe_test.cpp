#include "xlm_ds/bpe.hpp"

#include <filesystem>
#include <fstream>
#include <string>
#include <unistd.h>

#include "check.hpp"
#include "xlm_ds/byte_table.hpp"
#include "xlm_ds/error.hpp"

namespace {

/// A file in the temporary folder for as long as the object lives.
class Scratch {
 public:
  Scratch(const std::string& suffix, const std::string& content)
      : path_(std::filesystem::temp_directory_path() / (std::to_string(::getpid()) + suffix)) {
    std::ofstream(path_, std::ios::binary) << content;
  }
  ~Scratch() { std::filesystem::remove(path_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

xlm_ds::Bpe bpe_of(const std::string& codes) { return xlm_ds::Bpe(Scratch(".codes", codes).path()); }

xlm_ds::Bpe bpe_of(const std::string& codes, const std::string& vocabulary) {
  return xlm_ds::Bpe(Scratch(".codes", codes).path(), Scratch(".vocabulary", vocabulary).path());
}

// What fastBPE learns from low (5 times), lower (2), newest (6), widest (3), ties in one of the possible orders.
const std::string kCodes =
    "e s 9\nes t</w> 9\nl o 7\nw est</w> 6\ne west</w> 6\nn ewest</w> 6\nlo w</w> 5\nw i 3\nd est</w> 3\nwi dest</w> 3\n";

}  // namespace

TEST(byte_table_numbers_in_order_and_tells_lengths_apart) {
  xlm_ds::ByteTable table;
  CHECK(table.find("a") == xlm_ds::ByteTable::kNone);
  for (int i = 0; i < 1000; ++i) CHECK(table.insert(std::to_string(i)) == static_cast<unsigned>(i));
  for (int i = 0; i < 1000; ++i) CHECK(table.find(std::to_string(i)) == static_cast<unsigned>(i));
  CHECK(table.insert("7") == 7 && table[7] == "7");
  CHECK(table.insert(std::string(1, '\0')) == 1000 && table.insert(std::string(2, '\0')) == 1001 && table.insert("") == 1002);
}

TEST(bpe_merges_by_rank_and_copies_blanks) {
  CHECK(bpe_of(kCodes).apply("low  lower\n newest widest ") == "low  lo@@ w@@ e@@ r\n newest widest ");
}

TEST(bpe_undoes_merges_outside_the_vocabulary) {
  const auto bpe = bpe_of(kCodes, "est 1\nl@@ 1\no@@ 1\nw@@ 1\nw 1\ne@@ 1\nr 1\nnewest 1\n");
  CHECK(bpe.apply("low lower widest") == "l@@ o@@ w l@@ o@@ w@@ e@@ r w@@ i@@ d@@ est");
}

TEST(bpe_finishes_a_round_before_what_it_brings_about) {
  // `ab a` ranks above `a b`, which brings it about: both pairs of `a b` are merged first, in words short and long.
  const auto bpe = bpe_of("ab a 2\na b 1\n");
  CHECK(bpe.apply("ababx") == "ab@@ ab@@ x");
  std::string word, expected;
  for (int i = 0; i < 100; ++i) {
    word += "ab";
    expected += "ab@@ ";
  }
  CHECK(bpe.apply(word + "x") == expected + "x");
}

TEST(bpe_survives_a_word_end_in_the_text) {
  for (const std::string codes : {"a< /w> 1\n", "a </w> 1\n"}) {
    CHECK(bpe_of(codes, "x 1\n").apply("a a</w>") == "a a@@ <@@ /@@ w@@ >");
  }
}

TEST(bpe_refuses_what_is_no_codes_file) {
  for (const std::string codes : {"", "a b\n", "a b 1 2\n", " b 1\n", "a  1\n", "a b 1\na b 1\n", "a bc 1\nab c 1\n",
                                  "#version: 0.2\na b\n", "a b 1\n\n"}) {
    CHECK_THROWS(bpe_of(codes), xlm_ds::InputError);
  }
}
