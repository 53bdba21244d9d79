#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace headstart {

namespace {
constexpr int kTileVectors = 96;     // vectors of one item: their state stays in L2
constexpr int kMinSplitPages = 4;    // below this a split costs more than it balances
constexpr int kItemsPerThread = 6;   // enough that dynamic scheduling evens out
constexpr int kCheapVectors = 6;     // up to here an item is bound by reading keys, not by arithmetic
}  // namespace

AttentionPlan::AttentionPlan(int num_rows, int heads, int kv_heads, int head_dim, int page_size,
                             int threads, int num_ranges, const int32_t* page_start,
                             const int32_t* pages_in, const int32_t* row_start,
                             const int32_t* rows_in, const int32_t* visible_in)
    : num_rows(num_rows), heads(heads), kv_heads(kv_heads), head_dim(head_dim), page_size(page_size) {
  if (num_ranges > 0) {
    pages.assign(pages_in, pages_in + page_start[num_ranges]);
    rows.assign(rows_in, rows_in + row_start[num_ranges]);
    visible.assign(visible_in, visible_in + row_start[num_ranges]);
  }
  const int num_entries = int(rows.size());
  const int group = heads / kv_heads;
  const int tile_rows = std::max(1, kTileVectors / group);

  struct Tile {
    int32_t entry_begin, entry_end, page_begin, num_pages;
    int64_t cost;
  };
  std::vector<Tile> tiles;
  int64_t total = 0;
  for (int i = 0; i < num_ranges; ++i) {
    const int available = page_start[i + 1] - page_start[i];
    for (int e = row_start[i]; e < row_start[i + 1]; e += tile_rows) {
      const int end = std::min(e + tile_rows, row_start[i + 1]);
      int most = 0;
      for (int k = e; k < end; ++k) {
        if (rows[k] < 0 || rows[k] >= num_rows) throw std::invalid_argument("a KV range names row " + std::to_string(rows[k]) + " of " + std::to_string(num_rows));
        if (visible[k] < 0 || visible[k] > available * page_size) throw std::invalid_argument("a row sees " + std::to_string(visible[k]) + " keys of a range of " + std::to_string(available * page_size));
        most = std::max(most, visible[k]);
      }
      const int needed = (most + page_size - 1) / page_size;
      const int64_t cost = int64_t(needed) * std::max((end - e) * group, kCheapVectors);
      tiles.push_back({e, end, page_start[i], needed, cost});
      total += cost * kv_heads;
    }
  }

  const int64_t target = std::max<int64_t>(1, total / (int64_t(threads) * kItemsPerThread));
  std::vector<int32_t> splits_of(num_entries, 1);
  for (const Tile& t : tiles) {
    int splits = 1;
    if (threads > 1 && t.cost > target) {
      splits = int(std::min<int64_t>((t.cost + target - 1) / target, std::max(1, t.num_pages / kMinSplitPages)));
    }
    const int step = std::max(1, (t.num_pages + splits - 1) / splits);
    splits = std::max(1, (t.num_pages + step - 1) / step);
    for (int e = t.entry_begin; e < t.entry_end; ++e) splits_of[e] = splits;
    for (int h = 0; h < kv_heads; ++h) {
      for (int s = 0; s < splits; ++s) {
        const int first = s * step, last = std::min(t.num_pages, first + step);
        items.push_back({t.entry_begin, t.entry_end, h, t.page_begin + first, t.page_begin + last,
                         first * page_size, s, t.cost / splits});
      }
    }
  }
  // The long ones first, so that none is left over at the end.
  std::stable_sort(items.begin(), items.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });

  entry_slot.resize(num_entries);
  row_slot_start.assign(num_rows + 1, 0);
  for (int e = 0; e < num_entries; ++e) {
    entry_slot[e] = num_partials;
    num_partials += splits_of[e];
    row_slot_start[rows[e] + 1] += splits_of[e];
  }
  for (int r = 0; r < num_rows; ++r) row_slot_start[r + 1] += row_slot_start[r];
  row_slots.resize(num_partials);
  std::vector<int32_t> next(row_slot_start.begin(), row_slot_start.end() - 1);
  for (int e = 0; e < num_entries; ++e) {
    for (int s = 0; s < splits_of[e]; ++s) row_slots[next[rows[e]]++] = entry_slot[e] + s;
  }
}

}  // namespace headstart
