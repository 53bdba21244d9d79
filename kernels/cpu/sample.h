// One token for each row of logits: temperature, min_p, top_k, top_p, and a draw. And the largest of
// a row, with what makes probabilities of logits.
//
// A row is read once for its largest values, block by block, and what can no longer be drawn is not
// looked at again:
//
//     blocks of kBlock logits   [ 1.2 ][ 7.9 ][ 3.0 ][ 8.4 ][ 0.3 ] ...     their largest
//     top_k = 2                 the 2nd largest of those, 7.9, is a floor: two logits at least reach it
//     candidates                all that reach it, from the two blocks that have any
//
// The cuts are those of kernels/reference.py, which says what they mean: all that are as likely
// as the last one kept are kept, too. Sums are float64, in order of token id.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace headstart::HEADSTART_ISA {

inline constexpr int kBlock = 256;

struct Drawing {
  std::vector<float> maxima, sorted, weights;
  std::vector<int32_t> ids;
  std::vector<double> sums, buckets;
};

// The largest of each block into `maxima`, and of all; a NaN if there is one.
static float block_maxima(const float* x, int size, float* maxima) {
  Ints unordered = broadcast(0);
  float top = -std::numeric_limits<float>::infinity();
  bool nan = false;
  for (int begin = 0, b = 0; begin < size; begin += kBlock, ++b) {
    const int end = std::min(size, begin + kBlock);
    Floats best = broadcast(-std::numeric_limits<float>::infinity());
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Floats v = load(x + i);
      unordered |= v != v;
      best = maximum(best, v);
    }
    float most = horizontal_max(best);
    for (; i < end; ++i) {
      nan |= x[i] != x[i];
      most = std::max(most, x[i]);
    }
    maxima[b] = most;
    top = std::max(top, most);
  }
  for (int l = 0; l < kLanes; ++l) nan |= unordered[l] != 0;
  return nan ? std::numeric_limits<float>::quiet_NaN() : top;
}

// x becomes exp((x - top) / temperature); `size` is a multiple of kLanes. -infinity becomes 0.
static HEADSTART_INLINE void to_weights(float* to, const float* x, int size, float top, float scale) {
  for (int i = 0; i < size; i += kLanes) {
    const Floats power = (load(x + i) - broadcast(top)) * broadcast(scale);
    const Ints there = power > broadcast(-126.0f);
    store(to + i, bits<Floats>(bits<Ints>(exp2<true>(power)) & there));
  }
}

static HEADSTART_INLINE double sum_of_block(const float* weights) {
  Sum sum{};
  for (int i = 0; i < kBlock; i += kSumLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < Sum::kParts; ++p) sum.parts[p] += load(weights + i + p * kLanes);
  }
  float lanes[kSumLanes];
  std::memcpy(lanes, sum.parts, sizeof lanes);
  double total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

// The weight that the largest of d.sorted down to it need to reach `wanted`. Positive floats compare
// as their bits do: they are summed by their upper bits first, and only those are sorted among which
// the sum gets there.
static float nucleus(Drawing& d, double wanted) {
  constexpr int kShift = 19, kBuckets = (0x3f800000 >> kShift) + 1;  // weights up to 1
  d.buckets.assign(kBuckets, 0.0);
  for (float w : d.sorted) d.buckets[bits<uint32_t>(w) >> kShift] += w;
  double sum = 0;
  int at = kBuckets - 1;
  while (at > 0 && sum + d.buckets[at] < wanted) sum += d.buckets[at--];
  const auto inside = [&](float w) { return int(bits<uint32_t>(w) >> kShift) == at; };
  const auto end = std::partition(d.sorted.begin(), d.sorted.end(), inside);
  std::sort(d.sorted.begin(), end, std::greater<float>());
  float least = 0;
  for (auto w = d.sorted.begin(); w != end; ++w) {
    least = *w;
    sum += least;
    if (sum >= wanted) break;
  }
  return least;
}

// Keeps the candidates whose weight reaches `least`, in order; returns their sum.
static double keep(Drawing& d, size_t& count, float least) {
  double total = 0;
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    if (d.weights[i] < least) continue;
    d.ids[kept] = d.ids[i];
    d.weights[kept++] = d.weights[i];
    total += d.weights[i];
  }
  count = kept;
  return total;
}

// The first candidate at which the running sum exceeds `target`, or the last that has a weight.
static int32_t drawn(const Drawing& d, size_t count, double target) {
  double sum = 0;
  int32_t last = 0;
  for (size_t i = 0; i < count; ++i) {
    if (d.weights[i] <= 0) continue;
    last = d.ids[i];
    sum += d.weights[i];
    if (sum > target) return last;
  }
  return last;
}

// All that reach `floor` as candidates: ids and logits.
static size_t gather(const float* x, int size, float floor, Drawing& d) {
  size_t count = 0;
  for (int begin = 0, b = 0; begin < size; begin += kBlock, ++b) {
    if (!(d.maxima[b] >= floor)) continue;
    const int end = std::min(size, begin + kBlock);
    // Either may have been cut for another row, and there is a vector's room behind the last.
    const size_t needed = count + kBlock + kLanes;
    if (d.ids.size() < needed) d.ids.resize(2 * needed);
    if (d.weights.size() < needed) d.weights.resize(2 * needed);
    for (int i = begin; i < end; ++i) {  // no branch: most blocks have one or two
      d.ids[count] = i;
      d.weights[count] = x[i];
      count += x[i] >= floor;
    }
  }
  return count;
}

// Where neither top_k nor min_p bounds them: weights of all tokens, sums by block.
static int32_t draw_from_all(const float* x, int size, float top, float scale, double share, double uniform, Drawing& d) {
  const int blocks = (size + kBlock - 1) / kBlock;
  d.weights.resize(size_t(blocks) * kBlock);
  d.sums.resize(blocks);
  double total = 0;
  for (int b = 0; b < blocks; ++b) {
    float* w = d.weights.data() + size_t(b) * kBlock;
    const int count = std::min(kBlock, size - b * kBlock);
    if (count == kBlock) {
      to_weights(w, x + size_t(b) * kBlock, kBlock, top, scale);
    } else {
      alignas(kVectorBytes) float rest[kBlock];
      std::fill(rest, rest + kBlock, -std::numeric_limits<float>::infinity());
      std::copy(x + size_t(b) * kBlock, x + size, rest);
      to_weights(w, rest, kBlock, top, scale);
    }
    total += d.sums[b] = sum_of_block(w);
  }
  float least = 0;
  if (share < 1) {
    // Those below this add up to less than 1 - share, so the cut is among the others.
    const float large = float((1 - share) * total / size * 0.999);
    d.sorted.clear();
    for (int b = 0; b < blocks; ++b) {
      if (d.sums[b] < large) continue;
      for (int i = b * kBlock; i < std::min(size, (b + 1) * kBlock); ++i) {
        if (d.weights[i] >= large) d.sorted.push_back(d.weights[i]);
      }
    }
    least = nucleus(d, share * total);
    total = 0;
    for (int b = 0; b < blocks; ++b) {
      double own = 0;
      if (d.sums[b] >= least) {
        for (int i = b * kBlock; i < (b + 1) * kBlock; ++i) own += d.weights[i] >= least ? d.weights[i] : 0.0f;
      }
      total += d.sums[b] = own;
    }
  }
  double target = uniform * total, before = 0;
  int32_t last = 0;
  for (int b = 0; b < blocks; ++b) {
    if (d.sums[b] == 0) continue;
    const bool here = before + d.sums[b] > target;
    double sum = before;
    for (int i = b * kBlock; i < std::min(size, (b + 1) * kBlock); ++i) {
      if (d.weights[i] <= 0 || d.weights[i] < least) continue;
      last = i;
      sum += d.weights[i];
      if (here && sum > target) return i;
    }
    before += d.sums[b];
  }
  return last;
}

static int32_t sample_row(const SampleArgs& a, int r, Drawing& d) {
  const float* x = a.logits + size_t(a.row[r]) * a.size;
  const int blocks = (a.size + kBlock - 1) / kBlock;
  d.maxima.resize(blocks);
  const float top = block_maxima(x, a.size, d.maxima.data());
  if (!std::isfinite(top)) return -1;
  const float scale = 1.4426950408889634f / a.temperature[r];
  const float infinity = std::numeric_limits<float>::infinity();
  float floor = -infinity;
  const int k = a.top_k[r];
  if (k < a.size && k <= blocks) {
    d.sorted = d.maxima;
    std::nth_element(d.sorted.begin(), d.sorted.begin() + (k - 1), d.sorted.end(), std::greater<float>());
    floor = d.sorted[k - 1];
  }
  if (a.min_p[r] > 0) {  // and a little below, since weights are what is compared
    floor = std::max(floor, top + a.temperature[r] * (std::log(a.min_p[r]) - 1e-3f));
  }
  if (floor == -infinity && k >= a.size) return draw_from_all(x, a.size, top, scale, a.top_p[r], a.uniform[r], d);
  size_t count = gather(x, a.size, std::max(floor, std::numeric_limits<float>::lowest()), d);
  if (size_t(k) < count) {
    d.sorted.assign(d.weights.begin(), d.weights.begin() + count);
    std::nth_element(d.sorted.begin(), d.sorted.begin() + (k - 1), d.sorted.end(), std::greater<float>());
    keep(d, count, d.sorted[k - 1]);
  }
  const size_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(d.weights.begin() + count, d.weights.begin() + padded, -infinity);
  to_weights(d.weights.data(), d.weights.data(), int(padded), top, scale);
  double total = keep(d, count, a.min_p[r]);
  if (a.top_p[r] < 1) {
    d.sorted.assign(d.weights.begin(), d.weights.begin() + count);
    total = keep(d, count, nucleus(d, a.top_p[r] * total));
  }
  return drawn(d, count, a.uniform[r] * total);
}

// Calls f(row, scratch) for every row.
template <class F>
static void with_scratch(int rows, int threads, F&& f) {
  std::atomic<int> next{0};
  auto work = [&] {
    thread_local Drawing d;
    turns(next, rows, 1, [&](int r) { f(r, d); });
  };
  threads == 1 || rows == 1 ? work() : parallel(threads, work);
}

static void sample(const SampleArgs& a, int threads) {
  with_scratch(a.rows, threads, [&](int r, Drawing& d) { a.out[r] = sample_row(a, r, d); });
}

// The largest logits of a row, by size and then by id, and the logarithm of the sum of all exp.
static void top_row(const TopArgs& a, int r, Drawing& d) {
  const float* x = a.logits + size_t(a.row[r]) * a.size;
  const int blocks = (a.size + kBlock - 1) / kBlock;
  d.maxima.resize(blocks);
  const float top = block_maxima(x, a.size, d.maxima.data());
  double sum = 0;
  for (int begin = 0; begin < a.size; begin += kBlock) {
    alignas(kVectorBytes) float w[kBlock];
    const int count = std::min(kBlock, a.size - begin);
    std::copy(x + begin, x + begin + count, w);
    std::fill(w + count, w + kBlock, -std::numeric_limits<float>::infinity());
    to_weights(w, w, kBlock, top, 1.4426950408889634f);
    sum += sum_of_block(w);
  }
  a.total[r] = float(top + std::log(sum));
  const int n = a.count;
  if (n == 0) return;
  float floor = -std::numeric_limits<float>::infinity();
  if (n <= blocks) {
    d.sorted = d.maxima;
    std::nth_element(d.sorted.begin(), d.sorted.begin() + (n - 1), d.sorted.end(), std::greater<float>());
    floor = d.sorted[n - 1];
  }
  const size_t count = gather(x, a.size, floor, d);
  std::vector<int32_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = int32_t(i);
  std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](int32_t left, int32_t right) {
    return d.weights[left] != d.weights[right] ? d.weights[left] > d.weights[right] : left < right;
  });
  for (int i = 0; i < n; ++i) {
    a.ids[size_t(r) * n + i] = d.ids[order[i]];
    a.values[size_t(r) * n + i] = d.weights[order[i]];
  }
}

static void top(const TopArgs& a, int threads) {
  with_scratch(a.rows, threads, [&](int r, Drawing& d) { top_row(a, r, d); });
}

}  // namespace headstart::HEADSTART_ISA
