// Attention over KV ranges: items of the plan in parallel, then a merge per row.
//
// A page holds `page_size` tokens of one layer; per KV head a key tile and a value tile, in the
// order in which dot_tile reads its right-hand side (words are 1 float or 2 bf16):
//
//   page  = [ head 0: K | V ][ head 1: K | V ] ...
//   K     = [head_dim / per_word][page_size] words     dims across words, keys across lanes
//   V     = [page_size / per_word][head_dim] words     keys across words, dims across lanes
//
// An item walks its keys in blocks of kBlockPages and its vectors in tiles of kScoreRows:
//
//               block of keys
//   vectors  [ S = q K^T  -> registers -> scratch ]   then online softmax: P = 2^(S - m)
//            [ O = O * alpha + P V                ]   O stays in registers through the block
//
// A tile of vectors reads a block's keys and values while they are in L1 or L2, so a full range is
// read from memory once a KV head however many rows it has. The state (m, sum, O) of a vector may
// come from another item and go on to a third (plan.h says when); the sum stays a vector of lanes
// until its split ends, so that stopping and going on changes no bit.
//
// Scores are in powers of two: q was multiplied by scale * log2(e) when it was stored.
// Online softmax: Milakov & Gimelshein 2018; tiling as in FlashAttention-2 (arXiv 2307.08691).
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace headstart::HEADSTART_ISA {

// A page's keys and values are 2 * head_dim * page_size elements, its scores take head_dim words
// for every two vectors of keys: so many cache lines a word.
inline constexpr int kLinesPerWord = 2 * 2 * kLanes * 4 / 64;

template <class Unit>
struct TileState {  // one item's vectors; lives in the thread's scratch
  float* maximum;
  float* sum;                      // [vectors, kSumLanes]
  float* out;                      // [vectors, head_dim]
  typename Unit::left* q;          // [vectors, head_dim]
  float* scores;                   // [kScoreRows, block keys]
  typename Unit::left* probabilities;
};

template <class Unit>
static TileState<Unit> carve_scratch(std::vector<char>& scratch, int vectors, int head_dim, int block_keys) {
  size_t offset = 0;
  auto take = [&](size_t bytes) {
    size_t at = offset;
    offset += (bytes + 63) / 64 * 64;
    return at;
  };
  using left = typename Unit::left;
  const size_t padded = (vectors + kScoreRows + kLanes - 1) / kLanes * kLanes + kLanes;
  const size_t m = take(padded * 4), s = take(padded * kSumLanes * 4), o = take(size_t(vectors) * head_dim * 4),
               q = take(size_t(vectors) * head_dim * sizeof(left)),
               sc = take(size_t(kScoreRows) * block_keys * 4),
               p = take(size_t(kScoreRows) * block_keys * sizeof(left));
  if (scratch.size() < offset + 64) scratch.resize(offset + 64);
  char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
  return {reinterpret_cast<float*>(base + m),  reinterpret_cast<float*>(base + s),
          reinterpret_cast<float*>(base + o),  reinterpret_cast<left*>(base + q),
          reinterpret_cast<float*>(base + sc), reinterpret_cast<left*>(base + p)};
}

// Few vectors leave registers for more of the page: each sum waits for its last product, so there
// have to be many beside it.
template <int R>
inline constexpr int kScoreColumns = R <= kFewRows ? 4 : 2;

// S[r] = q[r] . K of one page, R vectors. Beside it the keys and values of the page `ahead` are asked
// for, a few lines a word: all at once they would fill the queue of misses and hold up the
// arithmetic. Where no page is ahead it is this one, which costs less than asking each time.
template <class Unit, int R>
static HEADSTART_CALLED void score_page(const typename Unit::left* q, const typename Unit::element* keys,
                                        int head_dim, int page_size, float* scores, int stride,
                                        const typename Unit::element* ahead) {
  using word = typename Unit::word;
  constexpr int C = kScoreColumns<R>;
  const int words = head_dim / Unit::kPerWord;
  const char* line = reinterpret_cast<const char*>(ahead);
  for (int k = 0; k < page_size; k += C * kLanes) {
    Floats acc[R][C] = {};
    dot_tile<Unit, R, C>(acc, reinterpret_cast<const typename Unit::left_word*>(q), words,
                         reinterpret_cast<const word*>(keys) + k, page_size, words, [&](int) {
#pragma GCC unroll 8
                           for (int i = 0; i < kLinesPerWord * C / 2; ++i, line += 64) __builtin_prefetch(line, 0, 2);
                         });
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store(scores + r * stride + k + c * kLanes, acc[r][c]);
    }
  }
}

// O[r] = O[r] * alpha[r] + P[r] V over the block's pages, for C vectors of head_dim.
template <class Unit, int R, int C>
static HEADSTART_CALLED void add_values(float* out, int head_dim, const float* alpha,
                                        const typename Unit::left* probabilities, int stride,
                                        const typename Unit::element* const* values, int num_pages,
                                        int page_size, int keys) {
  using word = typename Unit::word;
  Floats acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * head_dim + c * kLanes) * broadcast(alpha[r]);
  for (int p = 0; p < num_pages; ++p) {
    const int count = std::min(page_size, keys - p * page_size);
    dot_tile<Unit, R, C>(acc, reinterpret_cast<const typename Unit::left_word*>(probabilities + p * page_size),
                         stride / Unit::kPerWord, reinterpret_cast<const word*>(values[p]), head_dim,
                         (count + Unit::kPerWord - 1) / Unit::kPerWord);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + r * head_dim + c * kLanes, acc[r][c]);
}

template <class Unit>
class Attend {
  using element = typename Unit::element;
  using left = typename Unit::left;

 public:
  Attend(const AttendArgs& args, std::vector<char>& scratch)
      : args_(args), plan_(*args.plan), group_(plan_.heads / plan_.kv_heads), head_dim_(plan_.head_dim),
        page_size_(plan_.page_size), block_keys_(kBlockPages * page_size_), scratch_(scratch) {}

  // following: the item this thread computes next, if that is known.
  void run(const AttentionItem& item, const AttentionItem* following) {
    const int vectors = (item.entry_end - item.entry_begin) * group_;
    state_ = carve_scratch<Unit>(scratch_, vectors, head_dim_, block_keys_);
    gather_queries(item);
    begin(item, vectors);

    const size_t tile = size_t(head_dim_) * page_size_;
    int base = item.key_offset;
    for (int p = item.page_begin; p < item.page_end; p += kBlockPages, base += block_keys_) {
      const element *keys[kBlockPages], *values[kBlockPages];
      const int pages = find_pages(item, p, keys);
      for (int i = 0; i < pages; ++i) values[i] = keys[i] + tile;
      // The next block is asked for while the first vectors meet this one.
      const element* ahead[kBlockPages] = {};
      if (p + pages < item.page_end) {
        find_pages(item, p + pages, ahead);
      } else if (following) {
        find_pages(*following, following->page_begin, ahead);
      }
      for (int v = 0; v < vectors; v += kScoreRows) {
        with_constant<kScoreRows>(std::min(kScoreRows, vectors - v), [&](auto r) {
          block<decltype(r)::value>(item, v, base, pages, keys, values, ahead);
        });
      }
    }
    finish(item, vectors);
  }

  bool few_vectors(const AttentionItem& item) const {
    return (item.entry_end - item.entry_begin) * group_ <= kScoreRows;
  }

 private:
  // Where entry e leaves what vector v of its group has: an index of [partial slot, head].
  size_t slot_of(const AttentionItem& item, int entry, int v) const {
    return size_t(plan_.entry_slot[entry] + item.split) * plan_.heads + size_t(item.kv_head) * group_ + v % group_;
  }

  void begin(const AttentionItem& item, int vectors) {
    std::fill_n(state_.maximum, vectors, -std::numeric_limits<float>::infinity());
    std::fill_n(state_.sum, size_t(vectors) * kSumLanes, 0.0f);
    std::fill_n(state_.out, size_t(vectors) * head_dim_, 0.0f);
    if (item.wait_begin == item.wait_end) return;
    for (int v = 0; v < vectors; ++v) {
      const int entry = item.entry_begin + v / group_;
      if (!plan_.resumes[entry]) continue;
      const size_t slot = slot_of(item, entry, v);
      state_.maximum[v] = args_.partial_lse[slot];
      std::memcpy(state_.sum + size_t(v) * kSumLanes, args_.partial_sum + slot * kSumLanes, sizeof(Sum));
      std::memcpy(state_.out + size_t(v) * head_dim_, args_.partial + slot * head_dim_, sizeof(float) * head_dim_);
    }
  }

  void gather_queries(const AttentionItem& item) {
    const element* q = static_cast<const element*>(args_.q);
    left* to = state_.q;
    for (int e = item.entry_begin; e < item.entry_end; ++e) {
      const size_t head = size_t(plan_.rows[e]) * plan_.heads + size_t(item.kv_head) * group_;
      const element* from = q + head * head_dim_;
      if constexpr (sizeof(left) == sizeof(element)) {
        std::memcpy(to, from, sizeof(element) * group_ * head_dim_);
      } else {
        for (int i = 0; i < group_ * head_dim_; i += kLanes) store(to + i, load(from + i));
      }
      to += group_ * head_dim_;
    }
  }

  // Where the keys of up to kBlockPages pages lie, from page `begin` of an item on.
  int find_pages(const AttentionItem& item, int begin, const element** keys) const {
    const size_t tile = size_t(head_dim_) * page_size_, page = 2 * tile * plan_.kv_heads;
    const element* pool = static_cast<const element*>(args_.pool) + 2 * tile * item.kv_head;
    const int count = std::min(kBlockPages, item.page_end - begin);
    for (int i = 0; i < count; ++i) keys[i] = pool + page * plan_.pages[begin + i];
    return count;
  }

  template <int R>
  void block(const AttentionItem& item, int v, int base, int pages, const element* const* keys,
             const element* const* values, const element* const* ahead) {
    int visible[R], most = 0, least = std::numeric_limits<int>::max();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      visible[r] = plan_.visible[item.entry_begin + (v + r) / group_] - base;
      most = std::max(most, visible[r]);
      least = std::min(least, visible[r]);
    }
    if (most <= 0) return;
    const int count = std::min(most, pages * page_size_);
    const int used = (count + page_size_ - 1) / page_size_;
    for (int p = 0; p < used; ++p) {
      score_page<Unit, R>(state_.q + size_t(v) * head_dim_, keys[p], head_dim_, page_size_,
                          state_.scores + p * page_size_, block_keys_, v == 0 && ahead[p] ? ahead[p] : keys[p]);
    }
    alignas(kVectorBytes) float alpha[kLanes];
    if (least >= used * page_size_) {
      softmax<R, false>(v, used * page_size_, visible, alpha);
    } else {
      softmax<R, true>(v, used * page_size_, visible, alpha);
    }
    for (int r = 0; r < R; r += kValueRows) {
      with_constant<std::min(kValueRows, R)>(std::min(kValueRows, R - r), [&](auto n) {
        values_of<decltype(n)::value>(v + r, alpha + r, state_.probabilities + r * block_keys_, values, used, count);
      });
    }
  }

  // Updates maximum and sum, leaves P = 2^(S - m) as elements and the factor for O in alpha. Rows go
  // side by side through what is scalar to each: their maxima, and the factors.
  template <int R, bool kMasked>
  HEADSTART_CALLED void softmax(int v, int keys, const int* visible, float* alpha) {
    static_assert(R <= kLanes);
    const Floats none = broadcast(-std::numeric_limits<float>::infinity());
    alignas(kVectorBytes) float tops[kLanes], shifts[kLanes];
    store(tops, none);
    for (int r = 0; r < R; ++r) {
      float* s = state_.scores + r * block_keys_;
      Floats top[2] = {none, none};
      for (int k = 0; k < keys; k += 2 * kLanes) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          Floats x = load(s + k + i * kLanes);
          if constexpr (kMasked) {
            x = lane_index() < broadcast(visible[r] - k - i * kLanes) ? x : none;
            store(s + k + i * kLanes, x);
          }
          top[i] = maximum(top[i], x);
        }
      }
      tops[r] = horizontal_max(maximum(top[0], top[1]));
    }
    // Lanes from R on belong to the next tile, or to nobody: they keep what they have.
    const Floats before = load(state_.maximum + v), now = maximum(before, load(tops));
    const Floats shift = now == none ? broadcast(0.0f) : now;
    store(state_.maximum + v, now);
    store(shifts, shift);
    store(alpha, exp2<true>(before - shift));
    for (int r = 0; r < R; ++r) {
      const float* s = state_.scores + r * block_keys_;
      left* p = state_.probabilities + r * block_keys_;
      const Floats from = broadcast(shifts[r]);
      Sum sum{};
      for (int k = 0; k < keys; k += kTurn * kLanes) {
        Floats x[kTurn];
#pragma GCC unroll 4
        for (int i = 0; i < kTurn; ++i) {
          x[i] = exp2<Unit::kExactExp>(load(s + k + i * kLanes) - from);
          if constexpr (kMasked) {
            x[i] = lane_index() < broadcast(visible[r] - k - i * kLanes) ? x[i] : broadcast(0.0f);
          }
        }
        Unit::keep(p + k, x, sum);
      }
      float* lanes = state_.sum + size_t(v + r) * kSumLanes;
#pragma GCC unroll 4
      for (int i = 0; i < Sum::kParts; ++i, lanes += kLanes) store(lanes, fused(load(lanes), broadcast(alpha[r]), sum.parts[i]));
    }
  }

  template <int R>
  HEADSTART_INLINE void values_of(int v, const float* alpha, const left* probabilities,
                                  const element* const* values, int pages, int keys) {
    constexpr int kColumns = R <= kFewRows ? 4 : kValueColumns;
    const element* columns[kBlockPages];
    for (int d = 0; d < head_dim_; d += kColumns * kLanes) {
      for (int p = 0; p < pages; ++p) columns[p] = values[p] + d * Unit::kPerWord;
      with_constant<kColumns>(std::min(kColumns, (head_dim_ - d) / kLanes), [&](auto c) {
        add_values<Unit, R, decltype(c)::value>(state_.out + size_t(v) * head_dim_ + d, head_dim_, alpha,
                                                probabilities, block_keys_, columns, pages, page_size_, keys);
      });
    }
  }

  void finish(const AttentionItem& item, int vectors) {
    for (int v = 0; v < vectors; ++v) {
      const int entry = item.entry_begin + v / group_;
      const size_t slot = slot_of(item, entry, v);
      const float* lanes = state_.sum + size_t(v) * kSumLanes;
      const float* out = state_.out + size_t(v) * head_dim_;
      if (item.last && plan_.left_open[entry]) {
        args_.partial_lse[slot] = state_.maximum[v];
        std::memcpy(args_.partial_sum + slot * kSumLanes, lanes, sizeof(Sum));
        std::memcpy(args_.partial + slot * head_dim_, out, sizeof(float) * head_dim_);
        continue;
      }
      const float sum = load_as<Sum>(lanes).total();
      const Floats inverse = broadcast(sum > 0 ? 1.0f / sum : 0.0f);
      for (int d = 0; d < head_dim_; d += kLanes) {
        store(args_.partial + slot * head_dim_ + d, load(out + d) * inverse);
      }
      args_.partial_lse[slot] = sum > 0 ? state_.maximum[v] + std::log2(sum) : -std::numeric_limits<float>::infinity();
    }
  }

  const AttendArgs& args_;
  const AttentionPlan& plan_;
  const int group_, head_dim_, page_size_, block_keys_;
  std::vector<char>& scratch_;
  TileState<Unit> state_{};
};

// out = sum_j 2^(lse_j - lse) out_j over the slots j of one row: the merge all methods share.
// With one slot there is nothing to merge and the slot itself is the row.
static HEADSTART_INLINE const float* merge_row(const AttendArgs& args, int row, float* merged) {
  const AttentionPlan& plan = *args.plan;
  const size_t begin = plan.row_slot_start[row], end = plan.row_slot_start[row + 1];
  const size_t size = size_t(plan.heads) * plan.head_dim;
  if (end - begin == 1) return args.partial + begin * size;
  for (int h = 0; h < plan.heads; ++h) {
    float* to = merged + size_t(h) * plan.head_dim;
    std::fill_n(to, plan.head_dim, 0.0f);
    float top = -std::numeric_limits<float>::infinity();
    for (size_t slot = begin; slot < end; ++slot) top = std::max(top, args.partial_lse[slot * plan.heads + h]);
    if (top == -std::numeric_limits<float>::infinity()) continue;
    float sum = 0;
    for (size_t slot = begin; slot < end; ++slot) sum += std::exp2(args.partial_lse[slot * plan.heads + h] - top);
    for (size_t slot = begin; slot < end; ++slot) {
      const float weight = std::exp2(args.partial_lse[slot * plan.heads + h] - top) / sum;
      if (weight == 0) continue;
      const float* from = args.partial + slot * size + size_t(h) * plan.head_dim;
      for (int d = 0; d < plan.head_dim; d += kLanes) store(to + d, fused(load(from + d), broadcast(weight), load(to + d)));
    }
  }
  return merged;
}

static HEADSTART_INLINE void merged_lse(const AttendArgs& args, int row) {
  const AttentionPlan& plan = *args.plan;
  const size_t begin = plan.row_slot_start[row], end = plan.row_slot_start[row + 1];
  for (int h = 0; h < plan.heads; ++h) {
    float top = -std::numeric_limits<float>::infinity();
    for (size_t slot = begin; slot < end; ++slot) top = std::max(top, args.partial_lse[slot * plan.heads + h]);
    float sum = 0;
    if (top != -std::numeric_limits<float>::infinity()) {
      for (size_t slot = begin; slot < end; ++slot) sum += std::exp2(args.partial_lse[slot * plan.heads + h] - top);
    }
    const float ln2 = 0.6931471805599453f;
    args.lse[size_t(row) * plan.heads + h] = sum > 0 ? (top + std::log2(sum)) * ln2 : -std::numeric_limits<float>::infinity();
  }
}

// Items are started in an order in which none comes before what it waits for, so whoever waits
// here waits for a thread that is at work.
static HEADSTART_INLINE void await_items(const AttendArgs& args, const AttentionItem& item) {
  const AttentionPlan& plan = *args.plan;
  for (int w = item.wait_begin; w < item.wait_end; ++w) {
    for (int spins = 0; plan.done[plan.waits[w]].load(std::memory_order_acquire) != args.run; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
  }
}

static void attend(const AttendArgs& args, Team& team) {
  const AttentionPlan& plan = *args.plan;
  const int num_items = int(plan.items.size()), size = plan.heads * plan.head_dim;
  std::atomic<int>&next = team.counter(), &next_row = team.counter();
  thread_local std::vector<char> scratch;
  thread_local std::vector<float> merged;
  auto work = [&](auto unit) {
    Attend<decltype(unit)> attend(args, scratch);
    // A cheap item takes the next one along, to ask for its keys in time. (A long one does not:
    // somebody else may be free sooner.) Each thread's items still come in rising order, so the
    // first unfinished one always has all it waits for.
    int i = next.fetch_add(1);
    while (i < num_items) {
      const AttentionItem& item = plan.items[i];
      const int following = attend.few_vectors(item) ? next.fetch_add(1) : num_items;
      await_items(args, item);
      attend.run(item, following < num_items ? &plan.items[following] : nullptr);
      if (item.awaited) plan.done[i].store(args.run, std::memory_order_release);
      i = attend.few_vectors(item) ? following : next.fetch_add(1);
    }
  };
  if (args.kv_type == Type::kF32) {
    work(F32{});
  } else {
    work(BF16{});
  }
  barrier();
  if (int(merged.size()) < size) merged.resize(size);
  turns(next_row, plan.num_rows, std::clamp(plan.num_rows / team.threads, 1, kRowsATurn), [&](int row) {
    write_row(args.out, row, size, merge_row(args, row, merged.data()));
    if (args.lse) merged_lse(args, row);
  });
}

}  // namespace headstart::HEADSTART_ISA
