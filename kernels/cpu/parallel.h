// Threads: the parallel regions of every kernel. OpenMP where the compiler has it, so that torch's
// threads and ours are one team; else the threads of pool.cpp.
//
// A region hands out its work by counters of its own (turns), never by how many threads there are:
// which of the two runs it changes no bit of a result.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

#if !defined(_OPENMP)
#include "pool.h"
#endif

namespace headstart::HEADSTART_ISA {

// Calls work() on up to `threads` threads, this one among them; returns when all have ended.
template <class Work>
static inline void parallel(int threads, Work&& work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work();
#else
  run_on_threads(threads, [](void* context) { (*static_cast<std::remove_reference_t<Work>*>(context))(); }, &work);
#endif
}

// Inside a region: waits until all its threads are here.
static inline void barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#else
  await_threads();
#endif
}

// Inside a region: f(i) for i in [0, end), `step` of them at a time for whoever comes next.
template <class F>
static inline void turns(std::atomic<int>& next, int end, int step, F&& f) {
  for (int i = next.fetch_add(step, std::memory_order_relaxed); i < end;
       i = next.fetch_add(step, std::memory_order_relaxed)) {
    for (int k = i; k < std::min(end, i + step); ++k) f(k);
  }
}

}  // namespace headstart::HEADSTART_ISA
