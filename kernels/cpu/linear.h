// int8 linear layer: y = (x - 128) W^T * x_scale * w_scale + bias, x uint8, W int8.
//
// W is packed so that dot_tile streams it: panels of kPanel outputs, each one contiguous run that
// is read front to back (words are 4 int8 of the input axis):
//
//   panel p = [in_features / 4][kPanel] words      outputs p*kPanel .. p*kPanel + kPanel - 1
//
// Rows go through a panel up to kScoreRows at a time, while it is in the first-level cache; with
// two to four such tiles each one asks for its part of the next panel, so that reading memory
// and arithmetic overlap. The zero point of x costs nothing here: its share, 128 * sum of the
// weights, is subtracted at the end.
#pragma once

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace headstart::HEADSTART_ISA {

inline constexpr int kPanel = 32;

template <int R>
static HEADSTART_INLINE void linear_tile(const LinearArgs& a, int row, int panel, int words, const char* ahead) {
  const int32_t* x = reinterpret_cast<const int32_t*>(a.x) + size_t(row) * words;
  const int32_t* weight = reinterpret_cast<const int32_t*>(a.weight) + size_t(panel) * words * kPanel;
  for (int c = 0; c < kPanel; c += 2 * kLanes) {
    Ints acc[R][2] = {};
    if (ahead) {
      dot_tile<I8, R, 2>(acc, x, words, weight + c, kPanel, words,
                         [&](int w) { __builtin_prefetch(ahead + size_t(w) * 64, 0, 2); });
    } else {
      dot_tile<I8, R, 2>(acc, x, words, weight + c, kPanel, words);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int column = panel * kPanel + c + j * kLanes;
      const int count = std::min(kLanes, a.out_features - column);
      if (count <= 0) continue;
      const Ints sums = load_as<Ints>(a.weight_sums + column);
      const Floats scale = load(a.weight_scales + column);
      Floats bias = broadcast(0.0f);
      if (a.bias) std::memcpy(&bias, a.bias + column, size_t(count) * 4);
      float* out = a.out + size_t(row) * a.out_features + column;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, out += a.out_features) {
        const Floats y = __builtin_convertvector(acc[r][j] - sums, Floats) * (scale * broadcast(a.x_scales[row + r])) + bias;
        if (count == kLanes) {
          store(out, y);
        } else {
          std::memcpy(out, &y, size_t(count) * 4);
        }
      }
    }
  }
}

static void linear(const LinearArgs& a, int threads) {
  if (a.rows == 0) return;
  const int words = (a.in_features + 3) / 4;
  const int panels = (a.out_features + kPanel - 1) / kPanel;
  // A task is a few panels times all rows, or, where rows are many, one panel times a block of
  // rows: enough tasks to balance, each long enough (about 20 us) to be worth fetching.
  constexpr int kRowBlock = kScoreRows * 16;
  const int row_blocks = std::max(1, (a.rows + kRowBlock - 1) / kRowBlock);
  const int group = std::max(1, std::min(panels / (threads * 4), 8 / row_blocks));
  const int panel_groups = (panels + group - 1) / group;
  const int tasks = panel_groups * row_blocks;
  std::atomic<int> next{0};
  const auto task = [&](int t) {
    const int g = t / row_blocks, b = t % row_blocks;
    const int row_begin = b * kRowBlock, row_end = std::min(a.rows, row_begin + kRowBlock);
    const int tiles = (row_end - row_begin + kScoreRows - 1) / kScoreRows;
    const int step = (row_end - row_begin + tiles - 1) / tiles;  // tiles of equal height
    for (int p = g * group; p < std::min(panels, (g + 1) * group); ++p) {
      for (int row = row_begin, tile = 0; row < row_end; row += step, ++tile) {
        // 64 bytes a word: two tiles ask for the whole next panel.
        const bool asks = tiles >= 2 && tiles <= 4 && tile < 2 && p + 1 < panels;
        const char* ahead = asks ? reinterpret_cast<const char*>(a.weight) + (size_t(p + 1) * 2 + tile) * words * 64 : nullptr;
        with_constant<kScoreRows>(std::min(step, row_end - row),
                                  [&](auto r) { linear_tile<decltype(r)::value>(a, row, p, words, ahead); });
      }
    }
  };
  parallel(threads, [&] { turns(next, tasks, 1, task); });
}

}  // namespace headstart::HEADSTART_ISA
