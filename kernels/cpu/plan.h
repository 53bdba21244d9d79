// How one step's attention is cut into work items. Made once a step, used by every layer.
//
// A KV range is a run of pages, the rows that read it and, per row, how many of its keys that
// row sees. Rows times the query heads of one KV head are the *vectors* that read the same keys:
//
//          pages of the range ->
//   v0   [ x x x x | x x x . | . . . . ]
//   v1   [ x x x x | x x x . | . . . . ]     one item = a tile of vectors x a run of pages
//   v2   [ x x x x | x x x x | x . . . ]     x one KV head
//          ^ split 0 ^ split 1 ...           each split leaves (out, lse) in a slot
//
// Splits end at multiples of kSplitPages counted from key 0 of the row's sequence, wherever its
// ranges begin. A row has one slot a split, side by side, in key order. Where a range ends inside
// a split, the row's next range goes on from the state the first one left in that slot:
//
//   keys of row 5     0       1024     2048  2304     3072   3136
//   splits            |---0----|---1----|----2---------|--3--|
//   range a, shared   [ item   |  item  | item ]                     leaves slot 2 open
//   range b, own                               [ item  | item]       its first item waits for a
//   slots of row 5    [ 0          1       2              3  ]
//
// So the sums of a row are made in the same order however its keys are divided among ranges:
// sharing a prefix changes no bit of an answer, as long as ranges begin at multiples of
// kBlockPages, where the online softmax inside an item may stop and go on.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace headstart {

inline constexpr int kBlockPages = 4;   // keys of one round of online softmax
inline constexpr int kSplitPages = 32;  // pages of one item: enough pieces to balance, few enough to merge
static_assert(kSplitPages % kBlockPages == 0);

struct AttentionItem {
  int32_t entry_begin, entry_end;  // rows of this item, as indices into `rows` and `visible`
  int32_t kv_head;
  int32_t page_begin, page_end;    // as indices into `pages`
  int32_t key_offset;              // position of page_begin's first key within its range
  int32_t split;                   // slot of entry e: entry_slot[e] + split
  bool last;                       // of its range's splits: entries may leave their slot open
  bool awaited;                    // another item resumes what this one leaves
  int32_t level;                   // 0, or one more than the items it waits for
  int32_t wait_begin, wait_end;    // the items it waits for, as indices into `waits`
  int64_t cost;
};

struct AttentionPlan {
  int num_rows, heads, kv_heads, head_dim, page_size;
  std::vector<int32_t> pages, rows, visible;
  std::vector<int32_t> entry_slot;          // slot of an entry's first split
  std::vector<uint8_t> resumes, left_open;  // of an entry: goes on in a slot; is gone on from
  std::vector<int32_t> row_slot_start;      // row r has slots [row_slot_start[r], row_slot_start[r + 1])
  std::vector<AttentionItem> items;         // in the order they are started: after what they wait for
  std::vector<int32_t> waits;
  int num_partials = 0;

  // done[i] == the run's number: item i of this run is finished. `runs` were begun so far. A plan is
  // used by one thread team at a time.
  mutable std::unique_ptr<std::atomic<uint32_t>[]> done;
  mutable uint32_t runs = 0;

  // range i has pages[page_start[i] .. page_start[i+1]) and entries [row_start[i] .. row_start[i+1]);
  // its first key is key first_key[i], a multiple of page_size, of the sequence its rows attend to.
  // Ranges of one row come in key order.
  AttentionPlan(int num_rows, int heads, int kv_heads, int head_dim, int page_size, int num_ranges,
                const int32_t* page_start, const int32_t* pages, const int32_t* first_key,
                const int32_t* row_start, const int32_t* rows, const int32_t* visible);

 private:
  struct Tile;
  void cut_into_tiles(int num_ranges, const int32_t* page_start, const int32_t* first_key,
                      const int32_t* row_start, std::vector<Tile>& tiles);
  void assign_slots(std::vector<Tile>& tiles);
  void make_items(const std::vector<Tile>& tiles);
  void order_items();
};

}  // namespace headstart
