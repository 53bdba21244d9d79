// How one step's attention is cut into work items. Made once a step, used by every layer.
//
// A KV range is a run of pages, the rows that read it and, per row, how many of its keys that
// row sees. Rows times the query heads of one KV head are the *vectors* that read the same keys:
//
//          pages of the range ->
//   v0   [ x x x x | x x x . | . . . . ]
//   v1   [ x x x x | x x x . | . . . . ]     one item = a tile of vectors x a run of pages
//   v2   [ x x x x | x x x x | x . . . ]     x one KV head
//          ^ split 0 ^ split 1 ...           each split leaves (out, lse) in its own slot
//
// Every (range, row) entry gets one slot a split; `row_slots` lists the slots of each row for
// the merge. A row that is in no range gets none, and comes out as zero.
#pragma once

#include <cstdint>
#include <vector>

namespace headstart {

struct AttentionItem {
  int32_t entry_begin, entry_end;  // rows of this item, as indices into `rows` and `visible`
  int32_t kv_head;
  int32_t page_begin, page_end;    // as indices into `pages`
  int32_t key_offset;              // position of page_begin's first key within its range
  int32_t split;                   // slot of entry e: entry_slot[e] + split
  int64_t cost;
};

struct AttentionPlan {
  int num_rows, heads, kv_heads, head_dim, page_size;
  std::vector<int32_t> pages, rows, visible;
  std::vector<int32_t> entry_slot;
  std::vector<int32_t> row_slot_start, row_slots;
  std::vector<AttentionItem> items;
  int num_partials = 0;

  // range i has pages[page_start[i] .. page_start[i+1]) and entries [row_start[i] .. row_start[i+1])
  AttentionPlan(int num_rows, int heads, int kv_heads, int head_dim, int page_size, int num_ranges,
                const int32_t* page_start, const int32_t* pages,
                const int32_t* row_start, const int32_t* rows, const int32_t* visible);
};

}  // namespace headstart
