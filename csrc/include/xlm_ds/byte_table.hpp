#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

#include "xlm_ds/error.hpp"

namespace xlm_ds {

/// Distinct byte strings, numbered 0, 1, 2, … in order of insertion; equality is by bytes. Open addressing: one probe of
/// the slots, one look at the bytes. Lookups are O(length), insertion amortised O(length).
class ByteTable {
 public:
  using Number = std::uint32_t;
  static constexpr Number kNone = std::numeric_limits<Number>::max();

  [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }

  /// Bytes of all strings together, each counted once.
  [[nodiscard]] std::size_t stored_bytes() const noexcept { return stored_.size(); }

  /// Valid until the next insertion. `number` < size().
  [[nodiscard]] std::string_view operator[](Number number) const noexcept {
    const Entry& entry = entries_[number];
    return {stored_.data() + entry.begin, entry.length};
  }

  /// The number of `bytes`, or kNone.
  [[nodiscard]] Number find(std::string_view bytes) const noexcept {
    return slots_.empty() ? kNone : slots_[slot_of(bytes, hash_of(bytes))].number;
  }

  /// The number of `bytes`, which is added if it is new (then the number is the size() before the call).
  Number insert(std::string_view bytes) {
    if (2 * (entries_.size() + 1) > slots_.size()) grow();
    const auto hash = hash_of(bytes);
    Slot& slot = slots_[slot_of(bytes, hash)];
    if (slot.number == kNone) {
      slot = {hash, narrow_or_throw<Number>(entries_.size(), "distinct words")};
      entries_.push_back({stored_.size(), narrow_or_throw<std::uint32_t>(bytes.size(), "bytes of one word"), hash});
      stored_.insert(stored_.end(), bytes.begin(), bytes.end());
    }
    return slot.number;
  }

 private:
  struct Slot {
    std::uint32_t hash;
    Number number;
  };
  struct Entry {
    std::size_t begin;
    std::uint32_t length;
    std::uint32_t hash;
  };
  static constexpr std::size_t kFirstSlots = 64;

  [[nodiscard]] static std::uint32_t hash_of(std::string_view bytes) noexcept {
    constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
    std::uint64_t state = bytes.size();
    const auto mix = [&state](const char* from, std::size_t count) {
      std::uint64_t word = 0;
      std::memcpy(&word, from, count);
      state = (state ^ word) * kOdd;
      state ^= state >> 32;
    };
    for (; bytes.size() > sizeof(state); bytes.remove_prefix(sizeof(state))) mix(bytes.data(), sizeof(state));
    mix(bytes.data(), bytes.size());
    return static_cast<std::uint32_t>(state * kOdd >> 32);
  }

  /// The slot that holds `bytes`, or the empty one where it belongs.
  [[nodiscard]] std::size_t slot_of(std::string_view bytes, std::uint32_t hash) const noexcept {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = hash & mask;
    while (slots_[at].number != kNone && (slots_[at].hash != hash || (*this)[slots_[at].number] != bytes)) {
      at = (at + 1) & mask;
    }
    return at;
  }

  void grow() {
    std::vector<Slot> larger(slots_.empty() ? kFirstSlots : 2 * slots_.size(), Slot{0, kNone});
    const std::size_t mask = larger.size() - 1;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      std::size_t at = entries_[i].hash & mask;
      while (larger[at].number != kNone) at = (at + 1) & mask;
      larger[at] = {entries_[i].hash, static_cast<Number>(i)};
    }
    slots_.swap(larger);
  }

  std::vector<Slot> slots_;  // a power of two of them, at most half in use
  std::vector<Entry> entries_;
  std::vector<char> stored_;
};

}  // namespace xlm_ds
