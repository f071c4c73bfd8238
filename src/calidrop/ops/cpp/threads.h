// Tasks shared among the threads of the OpenMP runtime that the caller's process has, by the entry that GNU's runtime and
// LLVM's have in common and not by pragmas: the compiler here need not be the one that runtime belongs to.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

extern "C" void GOMP_parallel(void (*run)(void*), void* with, unsigned threads, unsigned flags);

// How many threads to ask while something else runs on the cores, too. The runtime ends a region when all its threads have
// been there, even those that come when the work is done: where another process has a thread's core, that is when the
// scheduler thinks of it again, milliseconds later, and a step has hundreds of regions. So one that waited for much longer
// than it worked makes those that follow do with fewer threads, for the longer the more often that happens. Each kind of
// region judges for itself: what looks like that may be one task that is longer than all others, which costs nobody else.
class Crowd {
 public:
  unsigned room(int threads) const { return std::min<unsigned>(threads, most.load(std::memory_order_relaxed)); }

  void saw(unsigned asked, int threads, std::chrono::nanoseconds work, std::chrono::nanoseconds wait) {
    using namespace std::chrono_literals;
    if (wait > 1ms && wait > 2 * work) {
      most.store(std::max(1u, asked / 2), std::memory_order_relaxed);
      patience.store(std::min(2 * patience.load(std::memory_order_relaxed), LONGEST), std::memory_order_relaxed);
      calm.store(0, std::memory_order_relaxed);
    } else if (calm.fetch_add(1, std::memory_order_relaxed) >= patience.load(std::memory_order_relaxed)) {
      calm.store(0, std::memory_order_relaxed);
      if (asked < static_cast<unsigned>(threads))
        most.store(2 * asked, std::memory_order_relaxed);
      else  // all of them, and none was late
        most.store(ALL, std::memory_order_relaxed), patience.store(SHORTEST, std::memory_order_relaxed);
    }
  }

 private:
  static constexpr unsigned ALL = 1u << 20;
  static constexpr int SHORTEST = 8, LONGEST = 1024;
  std::atomic<unsigned> most{ALL};
  std::atomic<int> calm{0}, patience{SHORTEST};  // regions since anything changed, and until more threads are tried
};

namespace {

// task(i, w) for every i below `tasks`, each once, in any order; w is what start() gives, one for each thread
template <class Start, class Task> void each(int64_t tasks, int threads, const Start& start, const Task& task) {
  using Clock = std::chrono::steady_clock;
  static Crowd crowd;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    auto w = start();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i, w);
  };
  const unsigned room = crowd.room(threads);
  if (room == 1 || tasks == 1) {
    work();
    if (tasks > 1 && threads > 1) crowd.saw(room, threads, {}, {});
    return;
  }
  const auto asks = std::this_thread::get_id();
  const auto begin = Clock::now();
  auto done = begin;  // with its own share, the thread that asks
  const auto timed = [&] {
    work();
    if (std::this_thread::get_id() == asks) done = Clock::now();
  };
  using Timed = decltype(timed);
  GOMP_parallel([](void* p) { (*static_cast<Timed*>(p))(); }, const_cast<void*>(static_cast<const void*>(&timed)), room, 0);
  crowd.saw(room, threads, done - begin, Clock::now() - done);
}

}  // namespace
