// LoRA terms of a batch whose rows belong to different adapters: y[row] += B (A x[row]).
//
//   rows of the batch        0 1 2 3 4 5 6 7 ...        adapter of each: a b a - b b a -
//   groups                   a: 0 2 6      b: 1 4 5     rows without an adapter are in none
//   one task                 up to kScoreRows rows of a group x one part (q, or k, ...), or all:
//
//       x   [ gathered rows, as words ]   .  down  ->  t [ rows, rank ]   .  up  ->  += y
//
// Rows of a group share each load of the weights. Parts write different outputs and groups
// different rows, so tasks need no order, and a row's sums do not depend on who is beside it.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace headstart::HEADSTART_ISA {

struct LoraTask {
  const LoraPart* part;
  int parts;  // 1, or all of the layer, one after the other
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

// Row `row` of x as the unit's left side, whole vectors at a time where its type allows.
template <class Unit>
static HEADSTART_INLINE void gather_row(const RowsIn& x, size_t row, int size, typename Unit::left* to) {
  int i = 0;
  if (x.type == Type::kU8) {
    const uint8_t* from = static_cast<const uint8_t*>(x.data) + row * size;
    const Floats scale = broadcast(x.scales[row]);
    for (; i + kLanes <= size; i += kLanes) {
      const Ints v = __builtin_convertvector(load_as<Bytes>(from + i), Ints) - 128;
      Unit::store_left(to + i, __builtin_convertvector(v, Floats) * scale);
    }
  } else if (x.type == Type::kF32) {
    const float* from = static_cast<const float*>(x.data) + row * size;
    for (; i + kLanes <= size; i += kLanes) Unit::store_left(to + i, load(from + i));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + row * size;
    for (; i + kLanes <= size; i += kLanes) Unit::store_left(to + i, load(from + i));
  }
  for (; i < size; ++i) Unit::store_left(to + i, row_value(x, row, size, i));
}

template <class Y>
static HEADSTART_INLINE void add_to(Y* y, Floats v, int count) {
  if (count >= kLanes) {
    store(y, load(y) + v);
  } else {
    for (int i = 0; i < count; ++i) from_float(to_float(y[i]) + v[i], y + i);
  }
}

// sums [R][C] = a [R, words] times C vectors of a panel's columns.
template <class Unit, int R, int C>
static HEADSTART_CALLED void panel_sums(const typename Unit::left_word* a, ptrdiff_t stride, int words,
                                        const typename Unit::word* panel, ptrdiff_t panel_stride, Floats* sums) {
  Floats acc[R][C] = {};
  dot_tile<Unit, R, C>(acc, a, stride, panel, panel_stride, words);
  std::memcpy(sums, acc, sizeof acc);
}

// out(r, column, sums) of every row and each vector of columns: a [rows, words] times packed panels
// of W columns.
template <class Unit, int W, class Out>
static HEADSTART_INLINE void times_panels(int rows, const typename Unit::left_word* a, ptrdiff_t stride, int words,
                                          const void* packed, int columns, Out&& out) {
  constexpr int C = W / kLanes > 2 ? 2 : W / kLanes;
  const auto* panel = static_cast<const typename Unit::word*>(packed);
  Floats sums[kScoreRows * C];
  for (int column = 0; column < columns; column += W, panel += size_t(words) * W) {
    for (int part = 0; part < W; part += C * kLanes) {
      with_constant<kScoreRows>(rows, [&](auto r) {
        panel_sums<Unit, decltype(r)::value, C>(a, stride, words, panel + part, W, sums);
      });
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < C; ++c) out(r, column + part + c * kLanes, sums[r * C + c]);
      }
    }
  }
}

template <class Unit, class Y>
static void lora_tile(const LoraArgs& a, const LoraTask& task, std::vector<char>& scratch) {
  using Left = typename Unit::left;
  using Word = typename Unit::left_word;
  const auto words = [](int elements) { return (elements + Unit::kPerWord - 1) / Unit::kPerWord; };
  const int in_words = words(a.in_features);
  int most = 0;
  for (int p = 0; p < task.parts; ++p) most = std::max(most, task.part[p].rank);
  const int t_words = words((most + kDownPanel - 1) / kDownPanel * kDownPanel);
  scratch.resize(size_t(task.count) * (in_words + t_words) * sizeof(Word));
  Word* x = reinterpret_cast<Word*>(scratch.data());
  Word* t = x + size_t(task.count) * in_words;
  Y* y[kScoreRows];
  for (int r = 0; r < task.count; ++r) {
    x[size_t(r + 1) * in_words - 1] = {};  // the last word may not be full
    gather_row<Unit>(a.x, task.rows[r], a.in_features, reinterpret_cast<Left*>(x + size_t(r) * in_words));
    y[r] = static_cast<Y*>(a.y) + size_t(task.rows[r]) * a.out_features;
  }
  for (int p = 0; p < task.parts; ++p) {
    const LoraPart& part = task.part[p];
    times_panels<Unit, kDownPanel>(task.count, x, in_words, in_words, part.down, part.rank, [&](int r, int column, Floats v) {
      Unit::store_left(reinterpret_cast<Left*>(t + size_t(r) * t_words) + column, v);
    });
    times_panels<Unit, kUpPanel>(task.count, t, t_words, words(part.rank), part.up, part.outputs,
                                 [&](int r, int column, Floats v) {
                                   if (column < part.outputs) add_to(y[r] + part.first + column, v, part.outputs - column);
                                 });
  }
}

template <class Unit, class Y>
static void lora_tasks(const LoraArgs& a, const std::vector<LoraTask>& tasks, int threads) {
  std::atomic<int> next{0};
  parallel(tasks.size() > 1 ? threads : 1, [&] {
    static thread_local std::vector<char> scratch;
    turns(next, int(tasks.size()), 1, [&](int i) { lora_tile<Unit, Y>(a, tasks[i], scratch); });
  });
}

static void lora(const LoraArgs& a, int threads) {
  std::vector<LoraTask> tasks;
  const LoraPlan& plan = *a.plan;
  for (size_t g = 0; g < plan.adapters.size(); ++g) {
    const int begin = plan.row_start[g], rows = plan.row_start[g + 1] - begin;
    const std::vector<LoraPart>& parts = plan.adapters[g]->layers.at(a.layer);
    const int tiles = (rows + kScoreRows - 1) / kScoreRows;  // of about equal height
    // Few tasks are cut finer, for the threads; with many, a tile gathers its rows only once.
    const bool whole = int64_t(plan.rows.size()) > 4 * kScoreRows * threads;
    for (int i = 0; i < tiles; ++i) {
      const int first = int64_t(rows) * i / tiles, last = int64_t(rows) * (i + 1) / tiles;
      const int32_t* some = plan.rows.data() + begin + first;
      if (whole && !parts.empty()) {
        tasks.push_back({parts.data(), int(parts.size()), some, last - first});
      } else {
        for (const LoraPart& part : parts) tasks.push_back({&part, 1, some, last - first});
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
