// The 64 largest of some thousand keys that a block of 256 threads holds in registers, in order.
//
// A key is 32 bits in the order of the logits: 0 stands for no logit, NOT_FINITE for NaN and both
// infinities, above all others. Among equal keys the one at the lower position comes first, and
// positions are in the order of token ids: what is chosen depends on the logits alone.
#pragma once

constexpr int TOP = 64;
constexpr int THREADS = 256;
constexpr int MAX_CANDIDATES = THREADS / 2;  // that are put in order by counting who is above
constexpr int MAX_ITEMS = 31;  // keys of a thread: three counts of a warp's keys fit in 32 bits
constexpr u32 NOT_FINITE = 0xffffffffu;

struct Selection {
    int counts[3][3];  // of keys from three thresholds up, for three steps in turn
    int num_candidates;
    u64 candidates[MAX_CANDIDATES];
    u64 sorted[TOP];  // entry(key, position), the largest first
};

__device__ __forceinline__ u64 entry(u32 key, int position) {
    return u64(key) << 32 | u32(~position);
}

__device__ __forceinline__ u32 key_of(u64 entry) { return u32(entry >> 32); }
__device__ __forceinline__ int position_of(u64 entry) { return ~int(u32(entry)); }

__device__ __forceinline__ u32 to_key(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return NOT_FINITE;
    if (bits == 0x80000000u) return bits;  // -0 as 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The logit of a key; -infinity for 0.
__device__ __forceinline__ float from_key(u32 key) {
    if (key == 0) return -INFINITY;
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The largest t, two bits a step from the top, such that at least TOP keys are >= t; less far where
// it takes no more bits for at most MAX_CANDIDATES to be. Returns t, and how many keys are >= t.
template <int ITEMS>
__device__ __forceinline__ u32 find_threshold(const u32 (&keys)[ITEMS], Selection& shared,
                                              int& count) {
    __syncthreads();
    if (threadIdx.x < 9) shared.counts[threadIdx.x / 3][threadIdx.x % 3] = 0;
    __syncthreads();
    u32 t = 0;
    count = THREADS * ITEMS;
    for (int shift = 30, step = 0; shift >= 0 && count > MAX_CANDIDATES; shift -= 2, ++step) {
        u32 packed = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            packed += u32(keys[i] >= (t | 1u << shift)) + (u32(keys[i] >= (t | 2u << shift)) << 10) +
                      (u32(keys[i] >= (t | 3u << shift)) << 20);
        }
        packed = warp_sum(packed);
        int lane = threadIdx.x % 32;
        int* counts = shared.counts[step % 3];
        if (lane < 3) atomicAdd(&counts[lane], int(packed >> 10 * lane & 0x3ff));
        __syncthreads();
        if (threadIdx.x < 3) shared.counts[(step + 2) % 3][threadIdx.x] = 0;
        for (int i = 2; i >= 0; --i) {
            if (counts[i] < TOP) continue;
            t |= u32(i + 1) << shift;
            count = counts[i];
            break;
        }
    }
    return t;
}

// shared.sorted from the candidates, of which there are TOP or more: two threads count for each how
// many are above it.
__device__ __forceinline__ void sort_candidates(Selection& shared) {
    int num_candidates = shared.num_candidates, mine = threadIdx.x / 2;
    bool is_mine = mine < num_candidates;
    u64 own = is_mine ? shared.candidates[mine] : 0;
    int place = 0;
    for (int i = threadIdx.x % 2; i < num_candidates; i += 2) place += shared.candidates[i] > own;
    place += __shfl_xor_sync(FULL_MASK, place, 1);
    if (is_mine && place < TOP && threadIdx.x % 2 == 0) shared.sorted[place] = own;
    __syncthreads();
}

// shared.sorted from the block's keys; the i-th of this thread stands at position(i).
template <int ITEMS, class Position>
__device__ __forceinline__ void select_top(const u32 (&keys)[ITEMS], Position position,
                                           Selection& shared) {
    static_assert(ITEMS <= MAX_ITEMS, "too many keys for the counts");
    int count;
    u32 t = find_threshold(keys, shared, count), order[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) order[i] = keys[i];
    if (count > MAX_CANDIDATES) {  // too many equal ones: of these, the first
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            order[i] = keys[i] > t ? ~0u : keys[i] < t ? 0 : 0x80000000u - position(i);
        }
        t = find_threshold(order, shared, count);
    }
    if (threadIdx.x == 0) shared.num_candidates = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (order[i] < t) continue;
        shared.candidates[atomicAdd(&shared.num_candidates, 1)] = entry(keys[i], position(i));
    }
    __syncthreads();
    sort_candidates(shared);
}
