// Writes paged_decode's work list from the rows' lengths: once a step and window, for all layers.
//
// grid: num_rows blocks of any size; no shared memory beyond one int. A row's splits depend on its
// own length only: the least power of two that makes at most target_splits of them, from min_split
// to MAX_SPLIT positions. A row of length 0 gets one empty split, so that its output is zero.
// Teams take every so manieth record, which may be the same split of row after row; so each row begins
// with another of its splits, or the native ones would all fall to the same teams.
#include "ptx.cuh"
#include "decode_record.cuh"

struct Splits {
    int oldest, first, size, count;  // first: the index, in splits of `size` from position 0
};

__device__ __forceinline__ Splits splits_of(int seq_len, int window, int target_splits,
                                            int min_split) {
    Splits splits;
    splits.oldest = window > 0 ? max(0, seq_len - window) : 0;
    splits.size = min_split;
    while (splits.size < MAX_SPLIT && splits.size * target_splits < seq_len - splits.oldest) {
        splits.size *= 2;
    }
    splits.first = splits.oldest / splits.size;
    splits.count = max(1, (seq_len + splits.size - 1) / splits.size - splits.first);
    return splits;
}

// How far a row's splits are turned: by the golden section of them a row, so that rows at any
// distance differ.
__device__ __forceinline__ int turn_of(int row, int count) {
    u32 turn = u32(row) * 2654435769u;  // of a whole one, in 2^-32
    return int((unsigned long long)turn * u32(count) >> 32);
}

__device__ __forceinline__ int place_of_split(int split, int turn, int count) {
    return split < turn ? split - turn + count : split - turn;
}

// grid: (num_rows), any block size.
extern "C" __global__ void plan_decode_kernel(
    int* __restrict__ plan,            // [RECORD_HEADER + records * RECORD_INTS]
    const int* __restrict__ tables,    // [num_rows, entries a row], see kv/layout.py
    long long tables_stride,           // entries from row to row
    const int* __restrict__ seq_lens,  // [num_rows]; 0: a row that is padding
    int block_size,                    // positions of a table entry
    int window,                        // positions a row sees, or 0: all
    int target_splits, int min_split)  // min_split: a power of two, 128 or more
{
    __shared__ int base;
    int row = blockIdx.x;
    if (threadIdx.x == 0) base = 0;
    __syncthreads();
    int before = 0;
    for (int other = threadIdx.x; other < row; other += blockDim.x) {
        before += splits_of(seq_lens[other], window, target_splits, min_split).count;
    }
    if (before) atomicAdd(&base, before);
    __syncthreads();
    Splits splits = splits_of(seq_lens[row], window, target_splits, min_split);
    if (row == int(gridDim.x) - 1 && threadIdx.x == 0) plan[0] = base + splits.count;
    int* records = plan + RECORD_HEADER + (long long)base * RECORD_INTS;
    int turn = turn_of(row, splits.count), entries_each = splits.size / block_size;
    int first_entry = splits.first * entries_each;
    int num_entries = (seq_lens[row] + block_size - 1) / block_size - first_entry;
    for (int i = threadIdx.x; i < num_entries; i += blockDim.x) {
        int place = place_of_split(i / entries_each, turn, splits.count);
        int* record = records + place * RECORD_INTS;
        record[RECORD_HEADER + i % entries_each] = tables[row * tables_stride + first_entry + i];
    }
    for (int split = threadIdx.x; split < splits.count; split += blockDim.x) {
        int place = place_of_split(split, turn, splits.count);
        int* record = records + place * RECORD_INTS;
        int start = (splits.first + split) * splits.size;
        record[RECORD_ROW] = row;
        record[RECORD_OLDEST] = splits.oldest;
        record[RECORD_END] = seq_lens[row];
        record[RECORD_START] = start;
        record[RECORD_SIZE] = splits.size;
        record[RECORD_NUM_SPLITS] = splits.count;
        record[RECORD_PLACE] = place;
        record[RECORD_FIRST] = place_of_split(0, turn, splits.count);
    }
}
