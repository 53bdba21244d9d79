// The operations each instruction set supplies, and the structs they take.
//
// Sizes are in elements unless a name says bytes. Pointers are owned by the caller. Rows are
// contiguous. Every function may be called with 0 rows. Those that take a Team are called inside a
// parallel region (operations.h), by all of its threads, and may return before the others' work is
// done; the others make a region of their own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "lora_plan.h"
#include "plan.h"

namespace headstart {

// One thread's view of its parallel region. Operations hand out their work by counters: each one takes
// the next ones, on every thread the same.
struct Team {
  int threads;
  std::atomic<int>* counters;  // at 0
  std::atomic<int>& counter() { return *counters++; }
};
inline constexpr int kCountersPerOperation = 2;  // at most

enum class Type : int { kF32 = 0, kBF16 = 1, kU8 = 2 };

// Rows handed to a linear layer: float32, bf16, or uint8 with zero point 128 and one scale a row.
struct RowsOut {
  Type type;
  void* data;
  float* scales;  // only for kU8
};

struct RowsIn {
  Type type;
  const void* data;
  const float* scales;  // only for kU8
};

struct NormArgs {
  int rows, size;
  float* residual;      // [rows, size], updated: residual += delta
  const void* delta;    // [rows, size] of delta_type, or null
  Type delta_type;
  const float* weight;  // [size]
  float eps;
  RowsOut out;
};

struct SiluArgs {
  int rows, size;
  const void* gate_up;  // [rows, 2 * size]: gate, then up
  Type in_type;
  RowsOut out;
};

struct RopeArgs {
  int rows, heads, kv_heads, head_dim, page_size;
  const void* qkv;  // [rows, (heads + 2 * kv_heads) * head_dim]
  Type in_type;
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  float eps;
  const float* cos;         // [positions, head_dim / 2]
  const float* sin;
  const int32_t* positions;  // [rows]
  const int32_t* slots;      // [rows]: page * page_size + offset
  float q_scale;             // softmax scale * log2(e): scores come out in powers of two
  Type kv_type;              // kF32 or kBF16: type of q and of the pool
  void* q;                   // [rows, heads, head_dim]
  void* pool;                // this layer's pages, see attention.h
};

inline constexpr int kSumLanes = 16;  // of the widest vector

struct AttendArgs {
  const AttentionPlan* plan;
  Type kv_type;
  const void* q;     // [rows, heads, head_dim], as RopeArgs leaves it
  const void* pool;  // this layer's pages
  float* partial;     // [plan.num_partials, heads, head_dim]
  float* partial_lse; // [plan.num_partials, heads], powers of two
  float* partial_sum; // [plan.num_partials, heads, kSumLanes], of slots that one range leaves to another
  RowsOut out;        // [rows, heads * head_dim]
  float* lse;         // [rows, heads], natural log, or null
  uint32_t run;       // of the plan: unlike any before
};

struct LinearArgs {
  int rows, in_features, out_features;
  const uint8_t* x;       // [rows, padded in_features]
  const float* x_scales;  // [rows]
  const int8_t* weight;   // packed, see linear.h
  const float* weight_scales;   // [padded out_features]
  const int32_t* weight_sums;   // [padded out_features]: 128 * sum of the weights of that output
  const float* bias;      // [out_features] or null
  float* out;             // [rows, out_features]
  int32_t* widened;       // [rows, padded in_features / 2]: scratch
};

struct LoraArgs {
  const LoraPlan* plan;
  int layer;         // which dense layer, by the adapters' numbers
  Type weight_type;  // kF32 or kBF16: what the adapters are packed as
  int in_features, out_features;
  RowsIn x;          // [rows, in_features]
  Type y_type;       // kF32 or kBF16
  void* y;           // [rows, out_features], added to
};

// How rows of logits are drawn from (sample.h).
struct SampleArgs {
  int rows, size;
  const float* logits;       // [.., size]
  const int32_t* row;        // [rows]: which of logits
  const float* temperature;  // [rows], above 0
  const float* min_p;        // [rows]; 0: none
  const int32_t* top_k;      // [rows], at least 1; size or more: none
  const double* top_p;       // [rows]; 1: none
  const double* uniform;     // [rows], in [0, 1)
  int32_t* out;              // [rows]: the token, or -1 where the logits are no distribution
};

// The largest of rows of logits (sample.h); no row with a NaN or an infinite maximum.
struct TopArgs {
  int rows, size, count;
  const float* logits;  // [.., size]
  const int32_t* row;   // [rows]: which of logits
  int32_t* ids;         // [rows, count], at most size
  float* values;        // [rows, count]
  float* total;         // [rows]: log sum exp
};

struct Kernels {
  const char* name;
  void (*norm)(const NormArgs&, Team&);
  void (*silu)(const SiluArgs&, Team&);
  void (*rope)(const RopeArgs&, Team&);
  void (*attend)(const AttendArgs&, Team&);
  void (*linear)(const LinearArgs&, Team&);
  void (*lora)(const LoraArgs&, int threads);
  void (*argmax)(const float* logits, int rows, int size, int32_t* out, int threads);
  void (*sample)(const SampleArgs&, int threads);
  void (*top)(const TopArgs&, int threads);
};


}  // namespace headstart
