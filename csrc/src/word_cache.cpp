#include "xlm_ds/word_cache.hpp"

#include <algorithm>

#include "xlm_ds/first_bytes.hpp"

namespace xlm_ds {

WordCache::Key WordCache::key_of(std::string_view word, const char* readable_end) noexcept {
  // Odd multipliers, from 2^64 / golden ratio and its multiples; the products do not wait for each other.
  constexpr std::array<std::uint64_t, kKeyWords> kOdd = {0x9E3779B97F4A7C15, 0x3C6EF372FE94F82B, 0xDAA66D2C7DDF743F,
                                                         0x78DDE6E5FD29F055};
  Key key;
  const std::size_t in_key = std::min(word.size(), kKeyBytes);
  if (static_cast<std::size_t>(readable_end - word.data()) >= kKeyBytes) {
    const auto& mask = kFirstBytes<kKeyWords>[in_key];
    for (std::size_t i = 0; i < kKeyWords; ++i) key.first[i] = load_eight(word.data() + 8 * i) & mask[i];
  } else {
    key.first = {};
    std::memcpy(key.first.data(), word.data(), in_key);
  }
  key.length = static_cast<std::uint32_t>(word.size());
  std::uint64_t state = key.length;
  for (std::size_t i = 0; i < kKeyWords; ++i) state += key.first[i] * kOdd[i];
  const auto mix = [&] { state = (state ^ state >> 32) * kOdd[0]; };
  mix();
  for (auto rest = rest_of(word); !rest.empty(); rest.remove_prefix(std::min<std::size_t>(rest.size(), 8))) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, rest.data(), std::min<std::size_t>(rest.size(), 8));
    state ^= bytes;
    mix();
  }
  key.hash = static_cast<std::uint32_t>(state >> 32);
  return key;
}

void WordCache::add(std::string_view word, const Key& key, std::string_view value) {
  Entry entry{key.first, key.length, static_cast<std::uint32_t>(value.size()), {}};
  if (is_inline(entry)) {
    std::copy(value.begin(), value.end(), entry.value.begin());
  } else {
    const std::uint64_t begin = more_.size() - std::min(more_.size(), kInlineBytes);
    more_.resize(begin);
    const auto rest = rest_of(word);
    more_.insert(more_.end(), rest.begin(), rest.end());
    more_.insert(more_.end(), value.begin(), value.end());
    more_.resize(more_.size() + kInlineBytes);  // readable after the last value
    std::memcpy(entry.value.data(), &begin, sizeof(begin));
  }
  entries_.push_back(entry);
}

void WordCache::grow() {
  std::vector<Slot> larger(2 * slots_.size());
  const std::size_t mask = larger.size() - 1;
  for (const Slot& slot : slots_) {
    if (slot.number == kVacant) continue;
    std::size_t at = slot.hash & mask;
    while (larger[at].number != kVacant) at = (at + 1) & mask;
    larger[at] = slot;
  }
  slots_.swap(larger);
}

}  // namespace xlm_ds
