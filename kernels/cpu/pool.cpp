#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace headstart {

namespace {

// Regions follow each other within microseconds while a step is computed, so threads spin for the
// next one, but not for long: between steps the cores are for others.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
void spin(Condition&& condition) {
  for (int i = 0; !condition(); ++i) {
    i < kSpins ? relax() : std::this_thread::yield();
  }
}

class Pool {
 public:
  void run(int threads, void (*work)(void*), void* context) {
    const std::lock_guard<std::mutex> one_region(regions_);
    for (; workers_ < threads - 1; ++workers_) std::thread(&Pool::serve, this, workers_).detach();
    work_ = work;
    context_ = context;
    team_ = threads;
    busy_.store(threads - 1, std::memory_order_relaxed);
    if (threads > 1) {
      const std::lock_guard<std::mutex> lock(sleep_);
      region_.store(((region_.load() >> kTeamBits) + 1) << kTeamBits | uint64_t(threads));
    }
    if (threads > 1) begins_.notify_all();
    // An exception must not leave while others use the caller's frame: it ends the process, as it
    // does in OpenMP.
    [&]() noexcept { work(context); }();
    spin([&] { return busy_.load(std::memory_order_acquire) == 0; });
  }

  void barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.fetch_add(1, std::memory_order_release);
    } else {
      spin([&] { return phase_.load(std::memory_order_acquire) != phase; });
    }
  }

 private:
  static constexpr int kTeamBits = 16;

  // A worker that is not of a region's team reads nothing of it but its number.
  void serve(int worker) {
    for (uint64_t seen = 0;;) {
      const uint64_t region = next_region(seen);
      seen = region;
      if (worker < int(region & ((1 << kTeamBits) - 1)) - 1) {
        work_(context_);
        busy_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  uint64_t next_region(uint64_t seen) {
    for (int i = 0; i < kSpins; ++i, relax()) {
      const uint64_t region = region_.load(std::memory_order_acquire);
      if (region != seen) return region;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    begins_.wait(lock, [&] { return region_.load(std::memory_order_acquire) != seen; });
    return region_.load(std::memory_order_acquire);
  }

  std::mutex regions_, sleep_;
  std::condition_variable begins_;
  int workers_ = 0;
  std::atomic<uint64_t> region_{0};  // its number, and below it the size of its team
  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
  int team_ = 1;
  std::atomic<int> busy_{0}, arrived_{0};
  std::atomic<uint32_t> phase_{0};
};

// Never destroyed: its threads wait in it when the process ends.
Pool& pool() {
  static Pool* const team = new Pool;
  return *team;
}

}  // namespace

void run_on_threads(int threads, void (*work)(void*), void* context) { pool().run(threads, work, context); }

void await_threads() { pool().barrier(); }

}  // namespace headstart
