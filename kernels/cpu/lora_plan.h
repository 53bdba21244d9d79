// Which rows of a batch get the low-rank terms of which adapter. Made once a step.
#pragma once

#include <cstdint>
#include <vector>

namespace headstart {

inline constexpr int kDownPanel = 16;  // outputs of a panel of packed weights: ranks are small
inline constexpr int kUpPanel = 32;

// outputs [first, first + outputs) += up (down x). Packed for dot_tile, in words of the reduction
// axis, zeros where a panel or a word is not full:
//
//   down   [rank / 16][in words][16]      up   [outputs / 32][rank words][32]
struct LoraPart {
  int first, outputs, rank;
  const void* down;
  const void* up;
};

// One adapter: the parts of each dense layer, by the caller's number of it.
struct LoraAdapter {
  std::vector<std::vector<LoraPart>> layers;
};

// Group g: rows[row_start[g]] .. rows[row_start[g + 1] - 1] get the terms of adapters[g].
struct LoraPlan {
  std::vector<const LoraAdapter*> adapters;
  std::vector<int32_t> row_start, rows;
};

}  // namespace headstart
