// int8 linear layer: y = (x - 128) W^T * x_scale * w_scale + bias, x uint8, W int8.
//
// W is packed so that dot_tile streams it: panels of kPanel outputs, each one contiguous run that
// is read front to back (words are 4 int8 of the input axis):
//
//   panel p = [in_features / 4][kPanel] words      outputs p*kPanel .. p*kPanel + kPanel - 1
//
// Rows go through a panel in tiles of two vectors of outputs, in one of two ways that give the same
// integers:
//
//   narrow   weights as they are, through I8. With two to four tiles of rows each one asks for its
//            part of the next panel, so that reading memory and arithmetic overlap.
//   wide     for many rows where no instruction does what I8 does: rows once, and weights once per
//            block of rows, become int16 for I16, which takes fewer instructions:
//
//              weights [words][2 vectors] of 4 int8  ->  [2 words][2 vectors] of 2 int16
//              kDeep words at a time, which the first-level cache holds beside a tile's rows
//
// The zero point of x costs nothing here: its share, 128 * sum of the weights, is subtracted at
// the end (or x is made signed before).
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace headstart::HEADSTART_ISA {

inline constexpr int kPanel = 32;
inline constexpr int kDeep = 128;
// Rows from which on the wide way is faster, where I8 is made of several instructions.
inline constexpr int kWideFrom = 2 * kScoreRows + 1;

// Sums of a tile to outputs, from column `column` on.
template <int R, int C>
static HEADSTART_INLINE void write_tile(const LinearArgs& a, int row, int column, const Ints (&acc)[R][C], bool has_zero_point) {
#pragma GCC unroll 8
  for (int j = 0; j < C; ++j, column += kLanes) {
    const int count = std::min(kLanes, a.out_features - column);
    if (count <= 0) continue;
    const Ints sums = has_zero_point ? load_as<Ints>(a.weight_sums + column) : Ints{};
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

template <int R>
static HEADSTART_INLINE void narrow_tile(const LinearArgs& a, int row, int panel, int words, const char* ahead) {
  // One or two rows wait for memory, which is quickest read from front to back: a whole panel wide.
  constexpr int C = R == 1 ? kPanel / kLanes : R == 2 ? std::min(kPanel / kLanes, 4) : 2;
  const int32_t* x = reinterpret_cast<const int32_t*>(a.x) + size_t(row) * words;
  const int32_t* weight = reinterpret_cast<const int32_t*>(a.weight) + size_t(panel) * words * kPanel;
  for (int c = 0; c < kPanel; c += C * kLanes) {
    Ints acc[R][C] = {};
    if (ahead) {
      dot_tile<I8, R, C>(acc, x, words, weight + c, kPanel, words,
                         [&](int w) { __builtin_prefetch(ahead + size_t(w) * 64, 0, 2); });
    } else {
      dot_tile<I8, R, C>(acc, x, words, weight + c, kPanel, words);
    }
    write_tile<R, C>(a, row, panel * kPanel + c, acc, !I8::kSigned);
  }
}

// A panel and the rows [row_begin, row_end), up to kScoreRows of them at a time.
static HEADSTART_INLINE void narrow_panel(const LinearArgs& a, int panel, int panels, int words, int row_begin, int row_end) {
  const int tiles = (row_end - row_begin + kScoreRows - 1) / kScoreRows;
  const int step = (row_end - row_begin + tiles - 1) / tiles;  // tiles of equal height
  for (int row = row_begin, tile = 0; row < row_end; row += step, ++tile) {
    // 64 bytes a word: two tiles ask for the whole next panel.
    const bool asks = tiles >= 2 && tiles <= 4 && tile < 2 && panel + 1 < panels;
    const char* ahead = asks ? reinterpret_cast<const char*>(a.weight) + (size_t(panel + 1) * 2 + tile) * words * 64 : nullptr;
    with_constant<kScoreRows>(std::min(step, row_end - row),
                              [&](auto r) { narrow_tile<decltype(r)::value>(a, row, panel, words, ahead); });
  }
}

// A row of uint8 as int16 without the zero point, in the order of I16::widen.
static HEADSTART_INLINE void widen_row(const uint8_t* x, int words, int16_t* to) {
  for (int w = 0; w < words; ++w, x += 4, to += 4) {
    to[0] = int16_t(x[0] - 128);
    to[1] = int16_t(x[2] - 128);
    to[2] = int16_t(x[1] - 128);
    to[3] = int16_t(x[3] - 128);
  }
}

// The same panel and rows, from `x` [rows][2 * words]; sums [row_end - row_begin][2 * kLanes] holds
// what is between two depths of kDeep words.
static HEADSTART_INLINE void wide_panel(const LinearArgs& a, const int32_t* x, int panel, int words, int row_begin, int row_end, int32_t* sums) {
  const int32_t* weight = reinterpret_cast<const int32_t*>(a.weight) + size_t(panel) * words * kPanel;
  alignas(kVectorBytes) int32_t wide[2 * kDeep * 2 * kLanes];
  const int tiles = (row_end - row_begin + kWideRows - 1) / kWideRows;
  const int step = (row_end - row_begin + tiles - 1) / tiles;
  for (int c = 0; c < kPanel; c += 2 * kLanes) {
    if (panel * kPanel + c >= a.out_features) break;
    for (int begin = 0; begin < words; begin += kDeep) {
      const int depth = std::min(kDeep, words - begin);
      for (int w = 0; w < depth; ++w) {
        int32_t* to = wide + w * 4 * kLanes;
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          Ints pairs[2];
          I16::widen(load_as<Ints>(weight + size_t(begin + w) * kPanel + c + j * kLanes), pairs);
          store_as(to + j * kLanes, pairs[0]);
          store_as(to + (2 + j) * kLanes, pairs[1]);
        }
      }
      for (int row = row_begin; row < row_end; row += step) {
        with_constant<kWideRows>(std::min(step, row_end - row), [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          int32_t* kept = sums + size_t(row - row_begin) * 2 * kLanes;
          Ints acc[R][2] = {};
          if (begin) std::memcpy(acc, kept, sizeof acc);
          dot_tile<I16, R, 2>(acc, x + (size_t(row) * words + begin) * 2, 2 * ptrdiff_t(words), wide, 2 * kLanes, 2 * depth);
          if (begin + depth < words) {
            std::memcpy(kept, acc, sizeof acc);
          } else {
            write_tile<R, 2>(a, row, panel * kPanel + c, acc, false);
          }
        });
      }
    }
  }
}

static void linear(const LinearArgs& a, Team& team) {
  const int words = (a.in_features + 3) / 4;
  const int panels = (a.out_features + kPanel - 1) / kPanel;
  const bool wide = !I8::kThere || (!I8::kOneInstruction && a.rows >= kWideFrom);
  // A task is a few panels times all rows, or, where rows are many, one panel times a block of
  // rows: enough tasks to balance, each long enough (about 20 us) to be worth fetching.
  const int row_block = (wide ? kWideRows : kScoreRows) * 16;
  const int row_blocks = (a.rows + row_block - 1) / row_block;
  const int group = std::max(1, std::min(panels / (team.threads * 8), 8 / std::max(row_blocks, 1)));
  const int panel_groups = (panels + group - 1) / group;
  const int tasks = panel_groups * row_blocks;
  std::atomic<int>& next_row = team.counter();
  thread_local std::vector<int32_t> sums;
  if (wide) {
    turns(next_row, a.rows, 8, [&](int r) {
      widen_row(a.x + size_t(r) * words * 4, words, reinterpret_cast<int16_t*>(a.widened + size_t(r) * words * 2));
    });
    sums.resize(size_t(row_block) * 2 * kLanes);
    barrier();
  }
  turns(team.counter(), tasks, 1, [&](int t) {
    const int g = t / row_blocks, b = t % row_blocks;
    const int row_begin = b * row_block, row_end = std::min(a.rows, row_begin + row_block);
    for (int p = g * group; p < std::min(panels, (g + 1) * group); ++p) {
      if (wide) {
        wide_panel(a, a.widened, p, words, row_begin, row_end, sums.data());
      } else if constexpr (I8::kThere) {
        narrow_panel(a, p, panels, words, row_begin, row_end);
      }
    }
  });
}

}  // namespace headstart::HEADSTART_ISA
