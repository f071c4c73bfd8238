// Tasks shared among the threads of the OpenMP runtime that the caller's process has, by the entry that GNU's runtime and
// LLVM's have in common and not by pragmas: the compiler here need not be the one that runtime belongs to.
#pragma once
#include <atomic>
#include <cstdint>

extern "C" void GOMP_parallel(void (*run)(void*), void* with, unsigned threads, unsigned flags);

namespace {

// task(i, w) for every i below `tasks`, each once, in any order; w is what start() gives, one for each thread
template <class Start, class Task> void each(int64_t tasks, int threads, const Start& start, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    auto w = start();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i, w);
  };
  using Work = decltype(work);
  GOMP_parallel([](void* p) { (*static_cast<Work*>(p))(); }, const_cast<void*>(static_cast<const void*>(&work)), threads, 0);
}

}  // namespace
