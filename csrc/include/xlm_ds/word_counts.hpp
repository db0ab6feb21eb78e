#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "xlm_ds/byte_table.hpp"

namespace xlm_ds {

/// Distinct words, numbered in the order of their first occurrence, and how often each occurs.
class WordCounts {
 public:
  using Number = ByteTable::Number;

  void add(std::string_view word, std::uint64_t times = 1) {
    const Number number = words_.insert(word);
    if (number == counts_.size()) counts_.push_back(0);
    counts_[number] += times;
  }
  void add(const WordCounts& other) {
    for (Number number = 0; number < other.size(); ++number) add(other.word(number), other.count(number));
  }

  [[nodiscard]] std::size_t size() const noexcept { return counts_.size(); }
  [[nodiscard]] std::string_view word(Number number) const noexcept { return words_[number]; }
  [[nodiscard]] std::uint64_t count(Number number) const noexcept { return counts_[number]; }

 private:
  ByteTable words_;
  std::vector<std::uint64_t> counts_;
};

}  // namespace xlm_ds
