#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "xlm_ds/chunk_reader.hpp"
#include "xlm_ds/progress.hpp"

namespace xlm_ds {

/// Lets the parts 0, 1, 2, … of parallel work take turns: what is done in turn does not depend on
/// the threads, and of several failures it is the first part's that counts.
class Turns {
 public:
  struct EarlierFailure {};

  /// Waits until every part before `number` has had its turn, then runs `action`, alone. Throws
  /// EarlierFailure if one of those parts has failed.
  template <typename Action>
  void take(std::uint64_t number, Action action) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return next_ == number || failure_ != nullptr; });
    if (failure_ != nullptr) throw EarlierFailure{};
    action();
    ++next_;
    changed_.notify_all();
  }

  /// Part `number` has failed, in its turn or outside.
  void fail(std::uint64_t number, std::exception_ptr failure) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return next_ >= number || failure_ != nullptr; });
    if (failure_ == nullptr) failure_ = std::move(failure);
    changed_.notify_all();
  }

  void rethrow_failure() const {
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t next_ = 0;
  std::exception_ptr failure_;
};

/// Reads the whole text, with one thread for each of `workers` (at least one). For every chunk some
/// worker's read(chunk), in_turn() and after_turn() are called; only in_turn() is called in the
/// order of the chunks, one at a time. Throws what the first chunk to fail has thrown. Returns
/// early when `progress` is cancelled.
template <typename Worker>
void read_in_order(ChunkReader& reader, std::span<Worker> workers, Progress& progress) {
  Turns turns;
  const auto run = [&](Worker& worker) {
    Chunk chunk;
    try {
      while (!progress.cancelled() && reader.next(chunk)) {
        worker.read(chunk);
        turns.take(chunk.number, [&] { worker.in_turn(); });
        worker.after_turn();
        progress.add(chunk.text.size());
      }
    } catch (const Turns::EarlierFailure&) {
      return;  // another worker has reported it
    } catch (...) {
      turns.fail(chunk.number, std::current_exception());
    }
  };
  {
    std::vector<std::jthread> threads;
    for (Worker& worker : workers.subspan(1)) threads.emplace_back(run, std::ref(worker));
    run(workers.front());
  }
  turns.rethrow_failure();
}

}  // namespace xlm_ds
