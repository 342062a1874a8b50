// The work list of paged_decode: one record a split, which is so many positions of one row.
//
// plan: int [RECORD_HEADER + max records * RECORD_INTS]; plan[0] is the number of records, the
// records follow. A record is its header, then the row's table entries from the split's start on,
// so that a team has all it needs to know after one load.
#pragma once

constexpr int RECORD_ROW = 0;         // of q, out, the tables
constexpr int RECORD_OLDEST = 1;      // first position the row may see (its window's start, or 0)
constexpr int RECORD_END = 2;         // positions from here on are not seen: the row's seq_len
constexpr int RECORD_START = 3;       // of the split, a multiple of its size
constexpr int RECORD_SIZE = 4;        // positions of a split of this row; the last may hold fewer
constexpr int RECORD_NUM_SPLITS = 5;  // of the row; their records stand one after another
constexpr int RECORD_PLACE = 6;       // of this one among these, which begin anywhere and go round
constexpr int RECORD_FIRST = 7;       // the place of the row's first
constexpr int RECORD_HEADER = 8;
constexpr int MAX_SPLIT = 2048;  // positions
constexpr int GRANULE = 16;      // positions that are in one block whatever the block's codec
constexpr int RECORD_INTS = RECORD_HEADER + MAX_SPLIT / GRANULE;  // blocks of 32: half are unused
