#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "xlm_ds/byte_table.hpp"

namespace xlm_ds {

/// Symbols to ids, by bytes. Immutable: any number of threads may use one.
class Dictionary {
 public:
  /// `symbols[id]` is the symbol with that id. If a symbol is there twice, the later id is its id (fairseq's overwrite rows);
  /// the earlier row stays without one.
  explicit Dictionary(const std::vector<std::string>& symbols);

  [[nodiscard]] std::size_t size() const noexcept { return size_; }

  /// The id of `symbol`, or kUnknown. O(length).
  [[nodiscard]] std::uint32_t find(std::string_view symbol) const noexcept {
    const auto number = numbers_.find(symbol);
    return number == ByteTable::kNone ? kUnknown : ids_[number];
  }
  static constexpr std::uint32_t kUnknown = ByteTable::kNone;

 private:
  ByteTable numbers_;
  std::vector<std::uint32_t> ids_;  // by number
  std::size_t size_;
};

}  // namespace xlm_ds
