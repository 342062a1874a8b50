// Attention of one new token a row over the paged pool: split-KV, any mix of codecs in a row.
//
// grid: as many blocks as fit the device, whatever the batch: they walk the work list of
// plan_decode.cu, record by record, and in each record by tiles of up to 8 heads of one kv head.
// block: 32 * WARPS threads; each warp takes every WARPS-th unit (decode_units.cuh) of the split and
// keeps its own softmax; then the warps' sums are added in their order. Where a row has several
// splits, the block that comes last adds them in their order, so that a row's result depends neither
// on its neighbours nor on chance. counters are zero before and after a launch.
// Each warp has a ring of PIECES pieces of shared memory, filled by cp.async with its units' keys and
// values in turn: what has been used makes room for what comes PIECES later, of the next items too,
// so that loads never cease between a block's items. Records and q go ahead in the same way.
// Dynamic shared memory: SHARED_BYTES, see shared_bytes() of attention/paged_decode.py; at HEAD_DIM
// 128, 6 warps and 3 pieces 83 KiB native, 102 KiB with INT4.
// -D: SCALAR_BF16, HEAD_DIM (64, 96, 128, 256), MAX_CODEC (0 native, 1 INT8, 2 INT4: the lowest that
// tables may name), WARPS, PIECES (3 or 5), MIN_BLOCKS (of a multiprocessor, for the compiler),
// SHARED_BYTES.
#include "ptx.cuh"
#include "decode_record.cuh"
#include "decode_units.cuh"
#include "decode_values.cuh"
#include "decode_softmax.cuh"
#include "decode_merge.cuh"
#include "decode_items.cuh"

constexpr int COUNT_EVERY = 32;  // items of a block: a bit each

struct Shared {
    uint4 rings[WARPS][PIECES][PIECE_BYTES / 16];
    WarpSide sides[WARPS];
    Slot slots[SLOTS];
    RawQuery raw[2];
    Query query;
    SumStats stats;
    u32 complete;  // see settle
};

// A warp's way through its units: keys and values in turn are in the pieces of its ring, and in the
// place of what has been used comes what follows PIECES later.
struct Walk {
    Unit units[AHEAD];  // at hand, and those whose keys, or all, are there or on their way
    Reach reach;
    u8* ring;
    int piece, side_idx;  // at hand
    __device__ __forceinline__ u8* here() const { return ring + piece * PIECE_BYTES; }
    __device__ __forceinline__ void advance() { piece = piece == PIECES - 1 ? 0 : piece + 1; }
};

__device__ __forceinline__ void fill_ring(Walk& walk, Shared& shared, const Pool& pool, int warp,
                                          int lane) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        walk.units[i] = copy_next_keys(walk.ring + 2 * i * PIECE_BYTES, shared.sides[warp], i,
                                       walk.reach, shared.slots, pool, warp, lane);
        if (2 * i + 1 == PIECES) continue;
        copy_values(walk.ring + (2 * i + 1) * PIECE_BYTES, walk.units[i], pool, lane);
    }
}

// The unit at hand, but for the copy that follows into its values' place.
__device__ __forceinline__ void attend_unit(Softmax& softmax, Walk& walk, Shared& shared,
                                            const int* record, const Pool& pool, int warp,
                                            int lane) {
    const Unit& unit = walk.units[0];
    int codec = unit.is_empty() ? -1 : unit.codec();
    const u8* keys = walk.here();
    float x[MAX_TILES][4];
    wait_for_piece();
    if (codec == NATIVE) {
        score_native(x, keys, shared.query, lane);
    }
#if MAX_CODEC >= 1
    WarpSide& sides = shared.sides[warp];
    const Side& side = sides.sides[walk.side_idx];
    if (codec == INT8) {
        score_int8(x, keys, shared.query, side, lane);
    }
#endif
#if MAX_CODEC == 2
    if (codec == INT4) {
        int offset = offset_in_block(unit, pool.block_size);
        float super_scale = spread_scales(sides.scales, side, offset, 4 * pool.block_size, lane);
        score_int4(x, keys, shared.query, side.zeros(), sides.scales, super_scale, lane);
    }
#endif
    copy_values(walk.here(), walk.units[AHEAD - 1], pool, lane);
    walk.advance();
    const u8* values = walk.here();
    wait_for_piece();
    if (codec == NATIVE) {
        attend_native(softmax, x, values, unit, record, lane);
    }
#if MAX_CODEC >= 1
    if (codec == INT8) {
        attend_int8(softmax, x, values, side, unit, record, lane);
    }
#endif
#if MAX_CODEC == 2
    if (codec == INT4) {
        attend_int4(softmax, x, values, side.v_scales(), unit, record, lane);
    }
#endif
}

// On to the next unit.
__device__ __forceinline__ void step_on(Walk& walk, Shared& shared, const Pool& pool, int warp,
                                        int lane) {
    Unit next = copy_next_keys(walk.here(), shared.sides[warp], walk.side_idx, walk.reach,
                               shared.slots, pool, warp, lane);
#pragma unroll
    for (int i = 0; i + 1 < AHEAD; ++i) walk.units[i] = walk.units[i + 1];
    walk.units[AHEAD - 1] = next;
    walk.advance();
    walk.side_idx = walk.side_idx == AHEAD - 1 ? 0 : walk.side_idx + 1;
}

static_assert(sizeof(Shared) <= SHARED_BYTES, "the host reserves too little");

// Where an item's results go.
struct Results {
    scalar_t* out;
    float *split_sums, *split_stats;
    unsigned int* counters;
    int num_kv_heads, group;

    __device__ __forceinline__ int tiles() const { return num_kv_heads * ((group + 7) / 8); }
    __device__ __forceinline__ int tile_heads() const { return min(group, 8); }
    __device__ __forceinline__ scalar_t* out_of(const Slot& slot) const {
        long long row = slot.record[RECORD_ROW];
        return out + (row * (num_kv_heads * group) + slot.first_head) * HEAD_DIM;
    }
};

// The sums of all warps: to the output, where the row has one split, or to this split's scratch.
__device__ __forceinline__ void write_item(const Results& results, const SumSets& sets,
                                           const Slot& slot, int idx, int thread) {
    bool is_whole = slot.record[RECORD_NUM_SPLITS] == 1;
    long long first = (long long)idx * results.tile_heads();
    for (int part = thread; part < slot.num_heads * (HEAD_DIM / 2); part += THREADS) {
        int head = part / (HEAD_DIM / 2), channel = part % (HEAD_DIM / 2) * 2;
        Combined<float2> all = combine(sets, WARPS, head, channel / 2);
        if (is_whole) {
            write_out(results.out_of(slot) + head * HEAD_DIM + channel, all);
            continue;
        }
        float* to = results.split_sums + (first + head) * HEAD_DIM + channel;
        *reinterpret_cast<float2*>(to) = all.sum;
        if (channel) continue;
        results.split_stats[2 * (first + head)] = all.top;
        results.split_stats[2 * (first + head) + 1] = all.weight;
    }
}

// Where item idx is: its row's part of the work list.
__device__ __forceinline__ const int* record_of(const int* plan, int idx, int tiles) {
    return plan + RECORD_HEADER + (long long)(idx / tiles) * RECORD_INTS;
}

// Counts this block's items idx, idx + step, ... (num_items of them, 32 at most), which all threads
// have written before a barrier. Bit i of the result: item i was the last of its row's splits; the
// others of that row are then visible. By warp 0; the result is for lane 0.
__device__ __forceinline__ u32 count_items(const Results& results, const int* plan, int idx,
                                           int step, int num_items, int lane) {
    bool is_last = false;
    fence_device();
    if (lane < num_items) {
        int here = idx + lane * step;
        const int* record = record_of(plan, here, results.tiles());
        int num_splits = record[RECORD_NUM_SPLITS];
        unsigned int* counter = results.counters + (long long)record[RECORD_ROW] * results.tiles() +
                                here % results.tiles();
        if (num_splits > 1) {
            is_last = atomicAdd(counter, 1u) == unsigned(num_splits - 1);
            if (is_last) *counter = 0;
        }
    }
    fence_device();
    return __ballot_sync(FULL_MASK, is_last);
}

// Four channels of a head of item idx: the row's output from all its splits.
__device__ __forceinline__ void merge_part(const Results& results, const int* plan, int idx,
                                           int part) {
    int tiles = results.tiles(), tile = idx % tiles, group_tiles = tiles / results.num_kv_heads;
    const int* record = record_of(plan, idx, tiles);
    int in_group = tile % group_tiles * 8;
    int head = part / (HEAD_DIM / 4), channel = part % (HEAD_DIM / 4) * 4;
    if (in_group + head >= results.group) return;
    long long step = (long long)tiles * results.tile_heads();
    long long slot = (long long)idx * results.tile_heads() - record[RECORD_PLACE] * step + head;
    Combined<float4> all =
        add_splits(results.split_sums + slot * HEAD_DIM + channel, results.split_stats + 2 * slot,
                   step * HEAD_DIM, 2 * step, record[RECORD_NUM_SPLITS], record[RECORD_FIRST]);
    long long row = record[RECORD_ROW];
    int first_head = tile / group_tiles * results.group + in_group;
    scalar_t* out = results.out + (row * (results.num_kv_heads * results.group) + first_head + head) *
                                      HEAD_DIM + channel;
    write_out(out, {make_float2(all.sum.x, all.sum.y), all.top, all.weight});
    write_out(out + 2, {make_float2(all.sum.z, all.sum.w), all.top, all.weight});
}

// Count what the block has written since it last counted, and merge the rows that are complete, all
// at the same time.
__device__ __forceinline__ void settle(const Results& results, u32& complete, const int* plan,
                                       int idx, int step, int num_items, int thread) {
    if (thread < 32) {
        u32 last = count_items(results, plan, idx, step, num_items, thread);
        if (thread == 0) complete = last;
    }
    __syncthreads();
    int parts = results.tile_heads() * (HEAD_DIM / 4), num_complete = __popc(complete);
    for (int i = thread; i < num_complete * parts; i += THREADS) {
        u32 left = complete;
        for (int skip = i / parts; skip; --skip) left &= left - 1;
        merge_part(results, plan, idx + (__ffs(int(left)) - 1) * step, i % parts);
    }
}

// Before the barrier at an item's end: until this thread's copies of the next item's q, which went
// with the keys after the last item's end, are there. is_first: the item has one turn only.
__device__ __forceinline__ void wait_for_query(bool is_first) {
    if (is_first) cp_async_wait<1>();
    else cp_async_wait<PIECES - 2>();
}

// Where the items' records and q are. num_items: of the whole grid.
struct Work {
    const int* plan;
    const scalar_t* q;
    const half_t* q_rotated;
    float scale;
    int num_heads, tiles, group, step, num_items;
    __device__ __forceinline__ bool has(int idx) const { return idx < num_items; }
    __device__ __forceinline__ void begin_record(Slot& slot, int idx) const {
        copy_record(slot, plan, idx, tiles, group);
    }
    __device__ __forceinline__ void begin_query(RawQuery& raw, const Slot& slot) const {
        copy_query(raw, slot, q, q_rotated, num_heads);
    }
};

// The block's first records, waited for, and the q of its first items, which is on its way then.
// false: there is nothing for this block.
__device__ __forceinline__ bool begin_work(Work& work, Shared& shared, int idx) {
    for (int i = 0; i < RECORDS_AHEAD; ++i) {
        work.begin_record(shared.slots[i], idx + i * work.step);
    }
    cp_async_commit();
    work.num_items = work.plan[0] * work.tiles;
    cp_async_wait<0>();
    __syncthreads();
    if (!work.has(idx)) return false;
    for (int i = 0; i < 2; ++i) {
        if (work.has(idx + i * work.step)) work.begin_query(shared.raw[i], shared.slots[i]);
    }
    cp_async_commit();
    return true;
}

// An item is done: its sums go where the last unit's values were, in all warps the same piece, and
// from there out. Then q of the block's next item is taken up.
__device__ __forceinline__ void end_item(Softmax& softmax, const Results& results, const Work& work,
                                         Shared& shared, int piece, int idx, int turn,
                                         bool is_first) {
    Slot& slot = shared.slots[turn & (SLOTS - 1)];
    int thread = opaque(threadIdx.x);
    SumSets sets = {reinterpret_cast<u8*>(shared.rings) + piece * PIECE_BYTES, &shared.stats};
    __syncwarp();
    store_sums(sets, softmax, slot.num_heads, thread / 32, thread % 32);
    wait_for_query(is_first);
    __syncthreads();
    write_item(results, sets, slot, idx, thread);
    bool has_next = work.has(idx + work.step);
    if (has_next) {
        int next = turn + 1;
        store_query(shared.query, shared.raw[next & 1], shared.slots[next & (SLOTS - 1)], work.scale,
                    thread);
    }
    __syncthreads();
    // Fences wait for all loads that are under way: not after every item.
    int num_uncounted = turn % COUNT_EVERY + 1;
    if (num_uncounted == COUNT_EVERY || !has_next) {
        int first = idx - (num_uncounted - 1) * work.step;
        settle(results, shared.complete, work.plan, first, work.step, num_uncounted, thread);
    }
    softmax = {{}, {LEAST, LEAST}, {0.0f, 0.0f}};
}

// What later items than the next need is sent for, into the places of the item that is done.
__device__ __forceinline__ void reach_on(const Work& work, Shared& shared, int idx, int turn) {
    if (work.has(idx + 2 * work.step)) {
        work.begin_query(shared.raw[turn & 1], shared.slots[(turn + 2) & (SLOTS - 1)]);
    }
    int later = idx + RECORDS_AHEAD * work.step;
    if (work.has(later)) {
        work.begin_record(shared.slots[(turn + RECORDS_AHEAD) & (SLOTS - 1)], later);
    }
}

// grid: any; block: THREADS. Every tensor is contiguous. items: records times kv heads times tiles
// of up to 8 heads of a group. plan: has room for the first RECORDS_AHEAD
// items of every block, whatever plan[0] is.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) paged_decode_kernel(
    scalar_t* __restrict__ out,           // [rows, num_heads, HEAD_DIM]
    float* split_sums,                    // [items, min(group, 8), HEAD_DIM]: scratch
    float* split_stats,                   // [items, min(group, 8), 2]: scratch
    unsigned int* counters,               // [rows, num_kv_heads * tiles]: zero
    const scalar_t* __restrict__ q,       // [rows, num_heads, HEAD_DIM], rotated by position
    const half_t* __restrict__ q_rotated,  // the same by codecs.rotate, for INT8; else null
    const unsigned char* __restrict__ payload,  // [blocks, num_layers, 2, num_kv_heads, part bytes]
    const unsigned char* __restrict__ side,     // [blocks, num_layers, num_kv_heads, side_bytes]
    const int* __restrict__ plan,               // of plan_decode.cu
    float scale,                                // of the scores, times log2(e)
    int layer_idx, int num_layers, int num_kv_heads, int group, int block_size, int side_bytes)
{
    DYNAMIC_SHARED(Shared, block_memory);
    Shared& shared = *block_memory;
    Pool pool = {payload, side, num_kv_heads, layer_idx, num_layers, block_size, side_bytes};
    Results results = {out, split_sums, split_stats, counters, num_kv_heads, group};
    Work work = {plan, q, q_rotated, scale, num_kv_heads * group, results.tiles(), group,
                 int(gridDim.x), 0};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, idx = blockIdx.x;
    if (!begin_work(work, shared, idx)) return;
    Walk walk;
    walk.reach = {idx, work.step, work.num_items, SLOTS - 1, 0, 0, 0, 0};
    walk.ring = reinterpret_cast<u8*>(shared.rings[warp]);
    walk.piece = walk.side_idx = 0;
    fill_ring(walk, shared, pool, warp, lane);
    cp_async_wait<PIECES>();
    __syncthreads();
    store_query(shared.query, shared.raw[0], shared.slots[0], scale, threadIdx.x);
    __syncthreads();
    Softmax softmax = {{}, {LEAST, LEAST}, {0.0f, 0.0f}};
    bool is_first = true;
    for (int turn = 0;;) {
        const int* record = shared.slots[turn & (SLOTS - 1)].record;
        attend_unit(softmax, walk, shared, record, pool, warp, lane);
        bool is_last = walk.units[0].is_last();
        if (is_last) {
            end_item(softmax, results, work, shared, walk.piece, idx, turn, is_first);
            if (!work.has(idx + work.step)) return;
            reach_on(work, shared, idx, turn);
            ++turn, idx += work.step;
        }
        is_first = is_last;
        step_on(walk, shared, pool, warp, lane);
    }
}
