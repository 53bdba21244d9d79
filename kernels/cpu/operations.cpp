#include "operations.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>

#define HEADSTART_ISA operations
#include "parallel.h"

namespace headstart {

namespace {

using operations::barrier;
using operations::parallel;

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kParallelElements = 1 << 14;

// work(team) on up to `threads` threads.
template <class Work>
void with_team(int threads, Work&& work) {
  std::atomic<int> counters[kCountersPerOperation] = {};
  parallel(threads, [&] { work(Team{threads, counters}); });
}

int threads_for(int rows, int64_t elements, int threads) {
  return rows == 1 || elements < kParallelElements ? 1 : threads;
}

// Scratch for `count` numbers, whose memory is used only where an operation does.
int32_t* widened(size_t count) {
  thread_local std::unique_ptr<int32_t[]> kept;
  thread_local size_t size = 0;
  if (size < count) {
    kept.reset(new int32_t[count]);
    size = count;
  }
  return kept.get();
}

size_t words_of(int in_features) { return size_t(in_features + 3) / 4 * 2; }

}  // namespace

void norm(const Kernels& kernels, const NormArgs& args, int threads) {
  with_team(threads_for(args.rows, int64_t(args.rows) * args.size, threads), [&](Team team) { kernels.norm(args, team); });
}

void silu(const Kernels& kernels, const SiluArgs& args, int threads) {
  with_team(threads_for(args.rows, int64_t(args.rows) * args.size * 4, threads), [&](Team team) { kernels.silu(args, team); });
}

void rope(const Kernels& kernels, const RopeArgs& args, int threads) {
  const int64_t elements = int64_t(args.rows) * (args.heads + 2 * args.kv_heads) * args.head_dim * 2;
  with_team(threads_for(args.rows, elements, threads), [&](Team team) { kernels.rope(args, team); });
}

void attend(const Kernels& kernels, AttendArgs args, int threads) {
  args.run = ++args.plan->runs;
  with_team(threads, [&](Team team) { kernels.attend(args, team); });
}

void linear(const Kernels& kernels, LinearArgs args, int threads) {
  args.widened = widened(args.rows * words_of(args.in_features));
  with_team(threads, [&](Team team) { kernels.linear(args, team); });
}

double run_layers(const Kernels& kernels, const LayersArgs& a, int threads) {
  constexpr int kOperations = 9;  // of a layer
  const Layers& model = *a.model;
  const std::unique_ptr<std::atomic<int>[]> counters(new std::atomic<int>[size_t(a.count) * kOperations * kCountersPerOperation]());
  size_t words = 0;
  for (const Layer& layer : model.layers) {
    for (const Matrix* m : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) words = std::max(words, words_of(m->in_features));
  }
  int32_t* wide = widened(a.rows * words);
  const uint32_t first_run = a.plan->runs + 1;
  a.plan->runs += uint32_t(a.count);
  const auto caller = std::this_thread::get_id();
  double seconds = 0;

  parallel(threads, [&] {
    using Clock = std::chrono::steady_clock;
    Clock::duration attention{};
    for (int i = 0; i < a.count; ++i) {
      const Layer& layer = model.layers[i];
      std::atomic<int>* next = &counters[size_t(i) * kOperations * kCountersPerOperation];
      // Each operation has counters of its own, and the next one begins when all are done with it.
      const auto all = [&](auto operation, const auto& args) {
        Team team{threads, next};
        operation(args, team);
        next += kCountersPerOperation;
        barrier();
      };
      const auto product = [&](const RowsOut& x, const Matrix& m, float* out) {
        all(kernels.linear, LinearArgs{a.rows, m.in_features, m.out_features, static_cast<const uint8_t*>(x.data), x.scales,
                                       m.weight, m.scales, m.sums, m.bias, out, wide});
      };
      const int hidden = layer.qkv.in_features;
      char* pool = a.pool + a.layer_bytes * i;
      all(kernels.norm, NormArgs{a.rows, hidden, a.residual, i ? a.delta : nullptr, Type::kF32, layer.input_norm, model.eps, a.normed});
      product(a.normed, layer.qkv, a.qkv);
      all(kernels.rope, RopeArgs{a.rows, model.heads, model.kv_heads, model.head_dim, model.page_size, a.qkv, Type::kF32,
                                 layer.q_norm, layer.k_norm, model.eps, model.cos, model.sin, a.positions, a.slots,
                                 model.q_scale, model.kv_type, a.q, pool});
      const auto begin = Clock::now();
      all(kernels.attend, AttendArgs{a.plan, model.kv_type, a.q, pool, a.partial, a.partial_lse, a.partial_sum, a.attended,
                                     nullptr, first_run + uint32_t(i)});
      attention += Clock::now() - begin;
      product(a.attended, layer.o, a.delta);
      all(kernels.norm, NormArgs{a.rows, hidden, a.residual, a.delta, Type::kF32, layer.post_norm, model.eps, a.normed});
      product(a.normed, layer.gate_up, a.gate_up);
      all(kernels.silu, SiluArgs{a.rows, layer.down.in_features, a.gate_up, Type::kF32, a.activated});
      product(a.activated, layer.down, a.delta);
    }
    if (std::this_thread::get_id() == caller) seconds = std::chrono::duration<double>(attention).count();
  });
  return seconds;
}

}  // namespace headstart
