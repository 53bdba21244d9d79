#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace headstart {

namespace {
constexpr int kTileVectors = 96;  // vectors of one item: their state stays in L2
constexpr int kSplitPages = 16;   // pages of one item: enough pieces to balance, few enough to merge
constexpr int kCheapVectors = 6;  // up to here arithmetic hides behind reading keys

void check_entry(int row, int num_rows, int visible, int keys) {
  if (row < 0 || row >= num_rows) {
    throw std::invalid_argument("a KV range names row " + std::to_string(row) + " of " + std::to_string(num_rows));
  }
  if (visible < 0 || visible > keys) {
    throw std::invalid_argument("a row sees " + std::to_string(visible) + " keys of a range of " + std::to_string(keys));
  }
}
}  // namespace

AttentionPlan::AttentionPlan(int num_rows, int heads, int kv_heads, int head_dim, int page_size,
                             int num_ranges, const int32_t* page_start,
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

  // Every range is cut at the same keys, whatever its rows and whatever else is in the batch. So
  // the order of every sum is fixed, and an answer is the same bit for bit alone or in a batch,
  // in one chunk or in many, from the cache or not (as long as its linear layers are, too: int8).
  std::vector<int32_t> splits_of(num_entries, 1);
  for (int i = 0; i < num_ranges; ++i) {
    const int available = page_start[i + 1] - page_start[i];
    for (int e = row_start[i]; e < row_start[i + 1]; e += tile_rows) {
      const int end = std::min(e + tile_rows, row_start[i + 1]);
      int most = 0;
      for (int k = e; k < end; ++k) {
        check_entry(rows[k], num_rows, visible[k], available * page_size);
        most = std::max(most, visible[k]);
      }
      const int needed = (most + page_size - 1) / page_size;
      const int splits = std::max(1, (needed + kSplitPages - 1) / kSplitPages);
      for (int k = e; k < end; ++k) splits_of[k] = splits;
      for (int h = 0; h < kv_heads; ++h) {
        for (int s = 0; s < splits; ++s) {
          const int first = s * kSplitPages, last = std::min(needed, first + kSplitPages);
          const int64_t cost = int64_t(last - first) * std::max((end - e) * group, kCheapVectors);
          items.push_back({e, end, h, page_start[i] + first, page_start[i] + last, first * page_size, s, cost});
        }
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
