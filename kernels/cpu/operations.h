// Operations as they are called from outside: each one makes a parallel region and has its threads
// call what the instruction set supplies (kernels.h). Or whole layers in one region:
//
//     thread 0   norm | q k v . . . | rope | attend . . | o . . | norm | gate, up . . | silu | down . .
//     thread 1        | q k v . . . |      | attend . . | o . . |      | gate, up . . |      | down . .
//                     ^ a barrier where one reads what another wrote
//
// Beginning a region costs some microseconds, as much as reading a small matrix does; and whoever
// calls from Python lets go of the interpreter once instead of nine times a layer.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace headstart {

void norm(const Kernels& kernels, const NormArgs& args, int threads);
void silu(const Kernels& kernels, const SiluArgs& args, int threads);
void rope(const Kernels& kernels, const RopeArgs& args, int threads);
void attend(const Kernels& kernels, AttendArgs args, int threads);
void linear(const Kernels& kernels, LinearArgs args, int threads);

// A packed int8 matrix, as LinearArgs names its parts.
struct Matrix {
  int in_features, out_features;
  const int8_t* weight;
  const float* scales;
  const int32_t* sums;
  const float* bias;
};

struct Layer {
  const float* input_norm;
  Matrix qkv;
  const float* q_norm;  // or null
  const float* k_norm;
  Matrix o;
  const float* post_norm;
  Matrix gate_up, down;
};

// What all layers of a model have in common.
struct Layers {
  int heads, kv_heads, head_dim, page_size;
  float eps, q_scale;
  Type kv_type;
  const float* cos;
  const float* sin;
  std::vector<Layer> layers;
};

struct LayersArgs {
  const Layers* model;
  int count;        // of its layers, the first ones
  int rows;
  float* residual;  // [rows, hidden], updated
  const int32_t* positions;
  const int32_t* slots;
  char* pool;       // the first layer's pages
  int64_t layer_bytes;
  const AttentionPlan* plan;
  // Scratch, as the operations' arguments name it.
  RowsOut normed, attended, activated;
  void* q;
  float* qkv;
  float* gate_up;
  float* partial;
  float* partial_lse;
  float* partial_sum;
  float* delta;     // [rows, hidden]: what is still to be added to the residual
};

// Returns the seconds spent in attention.
double run_layers(const Kernels& kernels, const LayersArgs& args, int threads);

}  // namespace headstart
