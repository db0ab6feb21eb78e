#pragma once

#include <atomic>
#include <cstdint>

namespace xlm_ds {

/// How far a call is; another thread may read it, or ask it to end.
class Progress {
 public:
  [[nodiscard]] std::uint64_t done_bytes() const noexcept {
    return done_bytes_.load(std::memory_order_relaxed);
  }
  void cancel() noexcept { cancelled_.store(true, std::memory_order_relaxed); }
  [[nodiscard]] bool cancelled() const noexcept {
    return cancelled_.load(std::memory_order_relaxed);
  }
  void add(std::uint64_t bytes) noexcept {
    done_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  }

 private:
  std::atomic<std::uint64_t> done_bytes_{0};
  std::atomic<bool> cancelled_{false};
};

}  // namespace xlm_ds
