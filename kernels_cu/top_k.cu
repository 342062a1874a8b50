// The 64 largest logits of each row, or one token drawn from them, or the largest alone.
//
// grid: (parts of PART logits, num_rows), 256 threads. A block finds the 64 largest of its part; the
// last block of a row to be done finds those of the row among all parts', and draws.
// Constants: MERGE_ITEMS, keys of a thread in that, ceil(parts * 64 / 256), at most 31. A row thus
// has up to 124 * 4096 logits. Shared memory: under 5 KiB, static.
// Equal logits count in the order of their ids (-0 is 0). A row with NaN or infinity gives token -1.
// The _float kernels take logits of float32, the others scalar_t.
#include "ptx.cuh"
#include "top_k.cuh"
#include "draw.cuh"

constexpr int ITEMS = 16;  // logits of a thread
constexpr int PART = THREADS * ITEMS;
constexpr long long NO_TOKEN = -1;

// What the blocks of a row leave to its last one.
struct Parts {
    unsigned int* keys;  // [num_rows, parts, TOP]
    int* ids;            // the same shape
    int* counters;       // [num_rows], 0 before and after
};

__device__ __forceinline__ void load_keys(u32 (&keys)[8], const scalar_t* from) {
    uint4 v = load16(from);
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x = unpack2<scalar_t>(pairs[i]);
        keys[2 * i] = to_key(x.x), keys[2 * i + 1] = to_key(x.y);
    }
}

__device__ __forceinline__ void load_keys(u32 (&keys)[8], const float* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint4 v = load16(from + 4 * i);
        keys[4 * i] = to_key(__uint_as_float(v.x)), keys[4 * i + 1] = to_key(__uint_as_float(v.y));
        keys[4 * i + 2] = to_key(__uint_as_float(v.z));
        keys[4 * i + 3] = to_key(__uint_as_float(v.w));
    }
}

__device__ __forceinline__ float to_float(float x) { return x; }

// Where the i-th logit of this thread stands in its part: 8 neighbours at a time.
__device__ __forceinline__ int position_in_part(int i) {
    return (i / 8 * THREADS + int(threadIdx.x)) * 8 + i % 8;
}

// The keys of this thread's logits of the block's part; 0 behind the row's end.
template <class T>
__device__ __forceinline__ void load_part(u32 (&keys)[ITEMS], const T* logits, int num_tokens) {
    const T* row = logits + (long long)blockIdx.y * num_tokens;
#pragma unroll
    for (int vector = 0; vector < ITEMS / 8; ++vector) {
        u32 eight[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        int first = int(blockIdx.x) * PART + position_in_part(8 * vector);
        if (num_tokens % 8 == 0) {  // rows begin at multiples of 16 bytes
            if (first < num_tokens) load_keys(eight, row + first);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (first + i < num_tokens) eight[i] = to_key(to_float(row[first + i]));
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) keys[8 * vector + i] = eight[i];
    }
}

// Whether all the other blocks of the row are done; what they wrote is then there to be read.
__device__ __forceinline__ bool is_last_of_row(const Parts& parts) {
    __shared__ int is_last;
    fence_device();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = parts.counters + blockIdx.y;
        is_last = atomicAdd(counter, 1) == int(gridDim.x) - 1;
        if (is_last) *counter = 0;
    }
    __syncthreads();
    fence_device();
    return is_last;
}

// The row's 64 largest, to selection.sorted as (key, place among all parts').
__device__ __forceinline__ void merge_parts(const Parts& parts, Selection& selection) {
    u32 keys[MERGE_ITEMS];
    int num_keys = int(gridDim.x) * TOP;
    const unsigned int* from = parts.keys + (long long)blockIdx.y * num_keys;
#pragma unroll
    for (int i = 0; i < MERGE_ITEMS; ++i) {
        int place = i * THREADS + int(threadIdx.x);
        keys[i] = place < num_keys ? from[place] : 0;
    }
    select_top(keys, [](int i) { return i * THREADS + int(threadIdx.x); }, selection);
}

template <class T>
__device__ __forceinline__ void draw_row(long long* tokens, float* values, int* ids,
                                         const Parts& parts, const T* logits, const double* params,
                                         int num_tokens) {
    __shared__ Selection selection;
    __shared__ Candidates candidates;
    u32 keys[ITEMS];
    load_part(keys, logits, num_tokens);
    select_top(keys, position_in_part, selection);
    int thread = threadIdx.x, row = blockIdx.y;
    long long first = (long long)row * gridDim.x * TOP;
    if (thread < TOP) {
        u64 own = selection.sorted[thread];
        long long to = first + blockIdx.x * TOP + thread;
        parts.keys[to] = key_of(own);
        parts.ids[to] = int(blockIdx.x) * PART + position_of(own);
    }
    if (!is_last_of_row(parts)) return;
    merge_parts(parts, selection);
    bool is_finite = key_of(selection.sorted[0]) != NOT_FINITE;
    if (thread < TOP) {
        u64 own = selection.sorted[thread];
        int id = parts.ids[first + position_of(own)];
        candidates.values[thread] = from_key(key_of(own));
        candidates.ids[thread] = id;
        if (values) values[row * TOP + thread] = from_key(key_of(own)), ids[row * TOP + thread] = id;
    }
    __syncthreads();
    if (!params) return;
    long long token = NO_TOKEN;
    if (is_finite) token = draw_token(candidates, params + row * NUM_DRAW_FIELDS, num_tokens);
    if (thread == 0) tokens[row] = token;
}

// The largest of the block's entries, in thread 0.
__device__ __forceinline__ u64 block_max(u64 best) {
    __shared__ u64 warps[THREADS / 32];
#pragma unroll
    for (int lane = 16; lane; lane /= 2) best = max(best, __shfl_xor_sync(FULL_MASK, best, lane));
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < THREADS / 32; ++warp) best = max(best, warps[warp]);
    }
    return best;
}

template <class T>
__device__ __forceinline__ void find_largest(long long* tokens, const Parts& parts, const T* logits,
                                             int num_tokens) {
    u32 keys[ITEMS];
    load_part(keys, logits, num_tokens);
    u64 best = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        best = max(best, entry(keys[i], int(blockIdx.x) * PART + position_in_part(i)));
    }
    best = block_max(best);
    long long first = (long long)blockIdx.y * gridDim.x * TOP;
    if (threadIdx.x == 0) {
        parts.keys[first + blockIdx.x] = key_of(best);
        parts.ids[first + blockIdx.x] = position_of(best);
    }
    if (!is_last_of_row(parts)) return;
    best = 0;
    if (threadIdx.x < gridDim.x) {
        best = entry(parts.keys[first + threadIdx.x], parts.ids[first + threadIdx.x]);
    }
    best = block_max(best);
    if (threadIdx.x > 0) return;
    tokens[blockIdx.y] = key_of(best) == NOT_FINITE ? NO_TOKEN : position_of(best);
}

// grid: (ceil(num_tokens / PART), num_rows)
extern "C" __global__ void __launch_bounds__(256) top_k_kernel(
    long long* __restrict__ tokens,         // [num_rows]; not written without params
    float* __restrict__ values,             // [num_rows, 64], the largest first; or null
    int* __restrict__ ids,                  // [num_rows, 64]; null with values. Of a vocabulary of
                                            // less than 64: -infinity, ids from num_tokens on
    unsigned int* __restrict__ part_keys,   // [num_rows, parts, 64]
    int* __restrict__ part_ids,             // [num_rows, parts, 64]
    int* __restrict__ counters,             // [num_rows], 0 before and after
    const scalar_t* __restrict__ logits,    // [num_rows, num_tokens]
    const double* __restrict__ params,      // [num_rows, NUM_DRAW_FIELDS], see draw.cuh; or null
    int num_tokens)
{
    Parts parts = {part_keys, part_ids, counters};
    draw_row(tokens, values, ids, parts, logits, params, num_tokens);
}

// The same, from float32.
extern "C" __global__ void __launch_bounds__(256) top_k_float_kernel(
    long long* __restrict__ tokens,
    float* __restrict__ values,
    int* __restrict__ ids,
    unsigned int* __restrict__ part_keys,
    int* __restrict__ part_ids,
    int* __restrict__ counters,
    const float* __restrict__ logits,       // 16-byte aligned
    const double* __restrict__ params,
    int num_tokens)
{
    Parts parts = {part_keys, part_ids, counters};
    draw_row(tokens, values, ids, parts, logits, params, num_tokens);
}

// grid: the same. The first of each row's largest.
extern "C" __global__ void __launch_bounds__(256) largest_kernel(
    long long* __restrict__ tokens,         // [num_rows]
    unsigned int* __restrict__ part_keys,   // as above
    int* __restrict__ part_ids,
    int* __restrict__ counters,
    const scalar_t* __restrict__ logits,    // [num_rows, num_tokens]
    int num_tokens)
{
    find_largest(tokens, Parts{part_keys, part_ids, counters}, logits, num_tokens);
}

extern "C" __global__ void __launch_bounds__(256) largest_float_kernel(
    long long* __restrict__ tokens,
    unsigned int* __restrict__ part_keys,
    int* __restrict__ part_ids,
    int* __restrict__ counters,
    const float* __restrict__ logits,       // 16-byte aligned
    int num_tokens)
{
    find_largest(tokens, Parts{part_keys, part_ids, counters}, logits, num_tokens);
}
