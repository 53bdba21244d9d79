// Operations that go row by row: norm, SiLU, RoPE with the KV write, quantisation, argmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace headstart::HEADSTART_ISA {

inline constexpr int kRowsATurn = 8;

// Calls f(row) for every row. Rows are handed out as threads come for them: a thread that lost its
// core for a time slice then delays one handful of rows, not half.
template <class F>
static HEADSTART_INLINE void for_rows(int rows, Team& team, F&& f) {
  turns(team.counter(), rows, std::clamp(rows / team.threads, 1, kRowsATurn), f);
}

// uint8 with zero point 128: v = scale * (u - 128), scale = max|v| / 127.
static HEADSTART_INLINE void quantise_row(const float* from, int size, uint8_t* to, float* scale) {
  // Magnitudes compare as their bits do, and so a NaN is the largest: it makes the scale a NaN.
  Ints top = broadcast(0);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Ints m = bits<Ints>(magnitude(load(from + i)));
    top = m > top ? m : top;
  }
  int32_t most_bits = horizontal_max(top);
  for (; i < size; ++i) most_bits = std::max(most_bits, bits<int32_t>(from[i]) & 0x7fffffff);
  const float most = bits<float>(most_bits);
  *scale = most / 127.0f;
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  // Adding 1.5 * 2^23 + 128 rounds to nearest even and leaves the integer in the low byte.
  const Floats magic = broadcast(12582912.0f + 128.0f);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    Ints v = bits<Ints>(fused(load(from + i), broadcast(inverse), magic)) & 255;
    store_as(to + i, __builtin_convertvector(v, Bytes));
  }
  for (; i < size; ++i) to[i] = uint8_t(bits<uint32_t>(fused(from[i], inverse, 12582912.0f + 128.0f)));
}

static HEADSTART_INLINE void write_row(const RowsOut& out, int row, int size, const float* from) {
  const size_t at = size_t(row) * size;
  if (out.type == Type::kF32) {
    std::memcpy(static_cast<float*>(out.data) + at, from, size_t(size) * 4);
  } else if (out.type == Type::kBF16) {
    uint16_t* to = static_cast<uint16_t*>(out.data) + at;
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
    for (; i < size; ++i) from_float(from[i], to + i);
  } else {
    quantise_row(from, size, static_cast<uint8_t*>(out.data) + at, out.scales + row);
  }
}

// Scratch for one float row and a vector more; one per thread, so that no call allocates.
static HEADSTART_INLINE float* row_scratch(int size) {
  thread_local std::vector<float> scratch;
  if (int(scratch.size()) < size + kLanes) scratch.resize(size + kLanes);
  return scratch.data();
}

// The last elements of a row, fewer than a vector holds, with zeros behind them.
template <class In>
static HEADSTART_INLINE Floats load_rest(const In* from, int count) {
  In rest[kLanes] = {};
  std::memcpy(rest, from, size_t(count) * sizeof(In));
  return load(rest);
}

template <class In>
static HEADSTART_INLINE float sum_of_squares(const In* x, int size) {
  Sum sum{};
  const auto add = [](Floats& part, Floats v) { part = fused(v, v, part); };
  int i = 0;
  for (; i + kSumLanes <= size; i += kSumLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < Sum::kParts; ++p) add(sum.parts[p], load(x + i + p * kLanes));
  }
  for (int p = 0; i < size; ++p, i += kLanes) add(sum.parts[p], load_rest(x + i, std::min(kLanes, size - i)));
  return sum.total();
}

template <class In>
static void norm_row(const NormArgs& a, int r) {
  float* x = a.residual + size_t(r) * a.size;
  const In* delta = a.delta ? static_cast<const In*>(a.delta) + size_t(r) * a.size : nullptr;
  int i = 0;
  if (delta) {
    for (; i + kLanes <= a.size; i += kLanes) store(x + i, load(x + i) + load(delta + i));
    for (; i < a.size; ++i) x[i] += to_float(delta[i]);
  }
  const float factor = 1.0f / std::sqrt(sum_of_squares(x, a.size) / float(a.size) + a.eps);
  float* y = row_scratch(a.size);
  for (i = 0; i + kLanes <= a.size; i += kLanes) store(y + i, load(x + i) * broadcast(factor) * load(a.weight + i));
  for (; i < a.size; ++i) y[i] = x[i] * factor * a.weight[i];
  write_row(a.out, r, a.size, y);
}

static void norm(const NormArgs& a, Team& team) {
  for_rows(a.rows, team, [&](int r) {
    if (a.delta_type == Type::kBF16) {
      norm_row<uint16_t>(a, r);
    } else {
      norm_row<float>(a, r);
    }
  });
}

template <class In>
static void silu_row(const SiluArgs& a, int r) {
  const In* gate = static_cast<const In*>(a.gate_up) + size_t(r) * 2 * a.size;
  const In* up = gate + a.size;
  float* y = row_scratch(a.size);
  const Floats minus_log2e = broadcast(-1.4426950408889634f), one = broadcast(1.0f), most = broadcast(126.0f);
  const auto activate = [&](Floats g) { return g / (one + exp2<true>(minimum(g * minus_log2e, most))); };
  int i = 0;
  for (; i + kLanes <= a.size; i += kLanes) store(y + i, activate(load(gate + i)) * load(up + i));
  if (const int rest = a.size - i) store(y + i, activate(load_rest(gate + i, rest)) * load_rest(up + i, rest));
  write_row(a.out, r, a.size, y);
}

static void silu(const SiluArgs& a, Team& team) {
  for_rows(a.rows, team, [&](int r) {
    if (a.in_type == Type::kBF16) {
      silu_row<uint16_t>(a, r);
    } else {
      silu_row<float>(a, r);
    }
  });
}

// RMSNorm over one head (Qwen3), then the rotation of halves: (x1, x2) -> (x1 c - x2 s, x2 c + x1 s).
template <class In>
static HEADSTART_INLINE void rotate_head(const In* x, int head_dim, const float* norm_weight, float eps,
                                         const float* cos, const float* sin, float scale, float* y) {
  float factor = 1.0f;
  if (norm_weight) {
    factor = 1.0f / std::sqrt(sum_of_squares(x, head_dim) / float(head_dim) + eps);
  }
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    float a = to_float(x[i]) * factor, b = to_float(x[i + half]) * factor;
    if (norm_weight) {
      a *= norm_weight[i];
      b *= norm_weight[i + half];
    }
    y[i] = fused(a, cos[i], -(b * sin[i])) * scale;
    y[i + half] = fused(b, cos[i], a * sin[i]) * scale;
  }
}

// The pool must hold finite numbers only: a masked key still meets its value as 0 * v, and one
// sequence's overflow must not outlive it as NaN in a page that is handed to the next.
static HEADSTART_INLINE float finite(float v) {
  const float most = 3.0e38f;
  v = v > -most ? v : -most;
  return v < most ? v : most;
}

template <class In, class Element>
static void rope_row(const RopeArgs& a, int r) {
  constexpr int kPerWord = sizeof(Element) == 2 ? 2 : 1;
  const int d = a.head_dim;
  const In* q = static_cast<const In*>(a.qkv) + size_t(r) * (a.heads + 2 * a.kv_heads) * d;
  const In* k = q + size_t(a.heads) * d;
  const In* v = k + size_t(a.kv_heads) * d;
  const float* cos = a.cos + size_t(a.positions[r]) * (d / 2);
  const float* sin = a.sin + size_t(a.positions[r]) * (d / 2);
  float y[512];  // head_dim is at most 256 (checked by the caller)

  Element* q_out = static_cast<Element*>(a.q) + size_t(r) * a.heads * d;
  for (int h = 0; h < a.heads; ++h) {
    rotate_head(q + h * d, d, a.q_norm, a.eps, cos, sin, a.q_scale, y);
    for (int i = 0; i + kLanes <= d; i += kLanes) store(q_out + h * d + i, load(y + i));
  }
  const size_t tile = size_t(d) * a.page_size;
  const int page = a.slots[r] / a.page_size, offset = a.slots[r] % a.page_size;
  Element* to = static_cast<Element*>(a.pool) + 2 * tile * a.kv_heads * page;
  for (int h = 0; h < a.kv_heads; ++h, to += 2 * tile) {
    rotate_head(k + h * d, d, a.k_norm, a.eps, cos, sin, 1.0f, y);
    for (int i = 0; i < d; ++i) {
      const size_t word = size_t(i / kPerWord) * a.page_size + offset;
      from_float(finite(y[i]), to + word * kPerWord + i % kPerWord);
    }
    Element* values = to + tile + size_t(offset / kPerWord) * d * kPerWord + offset % kPerWord;
    for (int i = 0; i < d; ++i) from_float(finite(to_float(v[h * d + i])), values + i * kPerWord);
  }
}

static void rope(const RopeArgs& a, Team& team) {
  for_rows(a.rows, team, [&](int r) {
    if (a.in_type == Type::kBF16) {
      a.kv_type == Type::kBF16 ? rope_row<uint16_t, uint16_t>(a, r) : rope_row<uint16_t, float>(a, r);
    } else {
      a.kv_type == Type::kBF16 ? rope_row<float, uint16_t>(a, r) : rope_row<float, float>(a, r);
    }
  });
}

// The first index of the largest value, or of a NaN if there is one.
static int32_t argmax_row(const float* x, int size) {
  Floats best = broadcast(-std::numeric_limits<float>::infinity());
  Ints unordered = broadcast(0);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats v = load(x + i);
    unordered |= v != v;
    best = maximum(best, v);
  }
  float top = horizontal_max(best);
  bool nan = false;
  for (int l = 0; l < kLanes; ++l) nan |= unordered[l] != 0;
  for (; i < size; ++i) {
    nan |= x[i] != x[i];
    top = std::max(top, x[i]);
  }
  const auto found = [&](int k) { return nan ? x[k] != x[k] : x[k] == top; };
  const Floats wanted = broadcast(top);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    const Floats v = load(x + i);
    const Ints equal = nan ? v != v : v == wanted;
    bool any = false;
    for (int l = 0; l < kLanes; ++l) any |= equal[l] != 0;
    if (any) break;
  }
  for (; i < size; ++i) {
    if (found(i)) return i;
  }
  return 0;
}

static void argmax(const float* logits, int rows, int size, int32_t* out, int threads) {
  std::atomic<int> next{0};
  parallel(rows == 1 ? 1 : threads, [&] {
    turns(next, rows, 1, [&](int r) { out[r] = argmax_row(logits + size_t(r) * size, size); });
  });
}

}  // namespace headstart::HEADSTART_ISA
