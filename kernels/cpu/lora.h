// LoRA terms of a batch whose rows belong to different adapters: y[row] += B (A x[row]).
//
//   rows of the batch        0 1 2 3 4 5 6 7 ...        adapter of each: a b a - b b a -
//   groups                   a: 0 2 6      b: 1 4 5     rows without an adapter are in none
//   one task                 up to kScoreRows rows of a group x one part (q, or k, ...):
//
//       x   [ gathered rows, as words ]   .  down  ->  t [ rows, rank ]   .  up  ->  += y
//
// Rows of a group share each load of the weights. Parts write different outputs and groups
// different rows, so tasks need no order, and a row's sums do not depend on who is beside it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace headstart::HEADSTART_ISA {

struct LoraTask {
  const LoraPart* part;
  const int32_t* rows;
  int count;
};

static HEADSTART_INLINE float row_value(const RowsIn& x, size_t row, int size, int i) {
  const size_t at = row * size + i;
  switch (x.type) {
    case Type::kF32: return static_cast<const float*>(x.data)[at];
    case Type::kBF16: return to_float(static_cast<const uint16_t*>(x.data)[at]);
    default: return (float(static_cast<const uint8_t*>(x.data)[at]) - 128.0f) * x.scales[row];
  }
}

// Row `row` of x as elements of the unit, whole vectors at a time where its type allows.
template <class Element>
static HEADSTART_INLINE void gather_row(const RowsIn& x, size_t row, int size, Element* to) {
  int i = 0;
  if (x.type == Type::kU8) {
    const uint8_t* from = static_cast<const uint8_t*>(x.data) + row * size;
    const Floats scale = broadcast(x.scales[row]);
    for (; i + kLanes <= size; i += kLanes) {
      const Ints v = __builtin_convertvector(load_as<Bytes>(from + i), Ints) - 128;
      store(to + i, __builtin_convertvector(v, Floats) * scale);
    }
  } else if (x.type == Type::kF32) {
    const float* from = static_cast<const float*>(x.data) + row * size;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + row * size;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  }
  for (; i < size; ++i) from_float(row_value(x, row, size, i), to + i);
}

template <class Y>
static HEADSTART_INLINE void add_to(Y* y, Floats v, int count) {
  if (count >= kLanes) {
    store(y, load(y) + v);
  } else {
    for (int i = 0; i < count; ++i) from_float(to_float(y[i]) + v[i], y + i);
  }
}

// out(r, column, sums) of every row and each vector of columns: a [R, words] times packed panels.
template <class Unit, int R, class Out>
static HEADSTART_INLINE void times_panels(const typename Unit::word* a, int words, const void* packed, int columns,
                                          Out&& out) {
  constexpr int C = kLoraPanel / kLanes;
  const auto* panel = static_cast<const typename Unit::word*>(packed);
  for (int column = 0; column < columns; column += kLoraPanel, panel += size_t(words) * kLoraPanel) {
    Floats acc[R][C] = {};
    dot_tile<Unit, R, C>(acc, a, words, panel, kLoraPanel, words);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) out(r, column + c * kLanes, acc[r][c]);
    }
  }
}

template <class Unit, int R, class Y>
static void lora_tile(const LoraArgs& a, const LoraTask& task, std::vector<char>& scratch) {
  using Element = typename Unit::element;
  using Word = typename Unit::word;
  const auto words = [](int elements) { return (elements + Unit::kPerWord - 1) / Unit::kPerWord; };
  const LoraPart& part = *task.part;
  const int in_words = words(a.in_features), rank_words = words(part.rank);
  const int ranks = (part.rank + kLoraPanel - 1) / kLoraPanel * kLoraPanel;
  scratch.assign((size_t(R) * (in_words + rank_words) + ranks) * sizeof(Word) + 64, 0);
  Word* x = reinterpret_cast<Word*>(scratch.data());
  Word* t = x + size_t(R) * in_words;
  for (int r = 0; r < R; ++r) gather_row(a.x, task.rows[r], a.in_features, reinterpret_cast<Element*>(x + size_t(r) * in_words));
  times_panels<Unit, R>(x, in_words, part.down, part.rank, [&](int r, int column, Floats v) {
    Element* to = reinterpret_cast<Element*>(t + size_t(r) * rank_words);
    for (int i = 0; i < kLanes && column + i < part.rank; ++i) from_float(v[i], to + column + i);
  });
  times_panels<Unit, R>(t, rank_words, part.up, part.outputs, [&](int r, int column, Floats v) {
    if (column >= part.outputs) return;
    Y* y = static_cast<Y*>(a.y) + size_t(task.rows[r]) * a.out_features + part.first + column;
    add_to(y, v, part.outputs - column);
  });
}

template <class Unit, class Y>
static void lora_tasks(const LoraArgs& a, const std::vector<LoraTask>& tasks, int threads) {
  std::atomic<size_t> next{0};
#pragma omp parallel num_threads(threads) if (tasks.size() > 1)
  {
    static thread_local std::vector<char> scratch;
    for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < tasks.size();
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      with_constant<kScoreRows>(tasks[i].count, [&](auto r) { lora_tile<Unit, decltype(r)::value, Y>(a, tasks[i], scratch); });
    }
  }
}

static void lora(const LoraArgs& a, int threads) {
  std::vector<LoraTask> tasks;
  for (size_t g = 0; g < a.plan->adapters.size(); ++g) {
    const int begin = a.plan->row_start[g], end = a.plan->row_start[g + 1];
    for (const LoraPart& part : a.plan->adapters[g]->layers.at(a.layer)) {
      const int tiles = (end - begin + kScoreRows - 1) / kScoreRows;
      for (int i = 0; i < tiles; ++i) {  // tiles of about equal height
        const int first = begin + int64_t(end - begin) * i / tiles, last = begin + int64_t(end - begin) * (i + 1) / tiles;
        tasks.push_back({&part, a.plan->rows.data() + first, last - first});
      }
    }
  }
  if (tasks.empty()) return;
  const bool f32 = a.weight_type == Type::kF32, y_f32 = a.y_type == Type::kF32;
  if (f32) {
    y_f32 ? lora_tasks<F32, float>(a, tasks, threads) : lora_tasks<F32, uint16_t>(a, tasks, threads);
  } else {
    y_f32 ? lora_tasks<BF16, float>(a, tasks, threads) : lora_tasks<BF16, uint16_t>(a, tasks, threads);
  }
}

}  // namespace headstart::HEADSTART_ISA
