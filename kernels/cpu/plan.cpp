#include "plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace headstart {

namespace {
constexpr int kTileVectors = 96;  // vectors of one item: their state stays in L2
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

// Up to kTileVectors vectors of one range, over all its splits.
struct AttentionPlan::Tile {
  int entry_begin, entry_end;
  int page_begin;              // of the range, as an index into `pages`
  int num_pages;               // those that one of its rows sees
  int first_page;              // page_begin counted from the sequence's start
  int splits;
  int first_item;              // item of KV head h, split s: first_item + h * splits + s
  std::vector<int> waits_for;  // tiles whose last split this one's first goes on from
  int level = 0;
  bool awaited = false;

  int first_split() const { return first_page / kSplitPages; }
  // Where split s begins and ends, in pages of the range.
  int split_begin(int s) const { return std::max(0, (first_split() + s) * kSplitPages - first_page); }
  int split_end(int s) const { return std::min(num_pages, (first_split() + s + 1) * kSplitPages - first_page); }
};

AttentionPlan::AttentionPlan(int num_rows, int heads, int kv_heads, int head_dim, int page_size,
                             int num_ranges, const int32_t* page_start, const int32_t* pages_in,
                             const int32_t* first_key, const int32_t* row_start,
                             const int32_t* rows_in, const int32_t* visible_in)
    : num_rows(num_rows), heads(heads), kv_heads(kv_heads), head_dim(head_dim), page_size(page_size) {
  if (num_ranges > 0) {
    pages.assign(pages_in, pages_in + page_start[num_ranges]);
    rows.assign(rows_in, rows_in + row_start[num_ranges]);
    visible.assign(visible_in, visible_in + row_start[num_ranges]);
  }
  std::vector<Tile> tiles;
  cut_into_tiles(num_ranges, page_start, first_key, row_start, tiles);
  assign_slots(tiles);
  make_items(tiles);
  order_items();
  done = std::make_unique<std::atomic<uint32_t>[]>(items.size());
}

void AttentionPlan::cut_into_tiles(int num_ranges, const int32_t* page_start, const int32_t* first_key,
                                   const int32_t* row_start, std::vector<Tile>& tiles) {
  const int tile_rows = std::max(1, kTileVectors / (heads / kv_heads));
  for (int i = 0; i < num_ranges; ++i) {
    if (first_key[i] < 0 || first_key[i] % page_size) {
      throw std::invalid_argument("a KV range begins at key " + std::to_string(first_key[i]) +
                                  ", which is not the start of a page");
    }
    const int keys = (page_start[i + 1] - page_start[i]) * page_size;
    for (int begin = row_start[i]; begin < row_start[i + 1]; begin += tile_rows) {
      const int end = std::min(begin + tile_rows, row_start[i + 1]);
      int most = 0;
      for (int e = begin; e < end; ++e) {
        check_entry(rows[e], num_rows, visible[e], keys);
        most = std::max(most, visible[e]);
      }
      Tile tile{begin, end, page_start[i], (most + page_size - 1) / page_size, first_key[i] / page_size, 1, 0, {}};
      const int end_page = tile.first_page + tile.num_pages;
      tile.splits = std::max(1, (end_page + kSplitPages - 1) / kSplitPages - tile.first_split());
      tiles.push_back(std::move(tile));
    }
  }
}

// A row's slots lie side by side. An entry whose first split is the one its row stopped in goes on
// in that slot.
void AttentionPlan::assign_slots(std::vector<Tile>& tiles) {
  struct Reached {
    int entry = -1, tile = -1, split = -1;
  };
  std::vector<Reached> reached(num_rows);
  std::vector<int32_t> used(num_rows, 0);
  entry_slot.resize(rows.size());
  resumes.assign(rows.size(), 0);
  left_open.assign(rows.size(), 0);
  for (int t = 0; t < int(tiles.size()); ++t) {
    Tile& tile = tiles[t];
    for (int e = tile.entry_begin; e < tile.entry_end; ++e) {
      Reached& row = reached[rows[e]];
      resumes[e] = row.split == tile.first_split();
      if (row.tile == t) {
        throw std::invalid_argument("a KV range names row " + std::to_string(rows[e]) + " twice");
      }
      if (resumes[e]) {
        left_open[row.entry] = 1;
        Tile& before = tiles[row.tile];
        before.awaited = true;
        tile.level = std::max(tile.level, before.level + 1);
        if (tile.waits_for.empty() || tile.waits_for.back() != row.tile) tile.waits_for.push_back(row.tile);
      }
      entry_slot[e] = used[rows[e]] - resumes[e];
      used[rows[e]] += tile.splits - resumes[e];
      row = {e, t, tile.first_split() + tile.splits - 1};
    }
  }
  row_slot_start.assign(num_rows + 1, 0);
  std::partial_sum(used.begin(), used.end(), row_slot_start.begin() + 1);
  num_partials = row_slot_start[num_rows];
  for (size_t e = 0; e < rows.size(); ++e) entry_slot[e] += row_slot_start[rows[e]];
  int first_item = 0;
  for (Tile& tile : tiles) {
    tile.first_item = first_item;
    first_item += tile.splits * kv_heads;
  }
}

void AttentionPlan::make_items(const std::vector<Tile>& tiles) {
  const int group = heads / kv_heads;
  for (const Tile& tile : tiles) {
    const int vectors = (tile.entry_end - tile.entry_begin) * group;
    for (int h = 0; h < kv_heads; ++h) {
      for (int s = 0; s < tile.splits; ++s) {
        const int begin = tile.split_begin(s), end = std::max(begin, tile.split_end(s));
        const bool first = s == 0, last = s == tile.splits - 1;
        const int wait_begin = int(waits.size());
        if (first) {
          for (int t : tile.waits_for) waits.push_back(tiles[t].first_item + (h + 1) * tiles[t].splits - 1);
        }
        items.push_back({tile.entry_begin, tile.entry_end, h, tile.page_begin + begin, tile.page_begin + end,
                         begin * page_size, s, last, last && tile.awaited, first ? tile.level : 0,
                         wait_begin, int(waits.size()), int64_t(end - begin) * std::max(vectors, kCheapVectors)});
      }
    }
  }
}

// What is waited for comes early, and then the long items, so that none is left over at the end.
void AttentionPlan::order_items() {
  std::vector<int32_t> order(items.size()), place(items.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const auto &x = items[a], &y = items[b];
    if (x.level != y.level) return x.level < y.level;
    if (x.awaited != y.awaited) return x.awaited;
    return x.cost > y.cost;
  });
  std::vector<AttentionItem> sorted(items.size());
  for (size_t i = 0; i < order.size(); ++i) {
    sorted[i] = items[order[i]];
    place[order[i]] = int32_t(i);
  }
  items = std::move(sorted);
  for (int32_t& item : waits) item = place[item];
}

}  // namespace headstart
