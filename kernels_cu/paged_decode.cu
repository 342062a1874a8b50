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

// What is left of an item's record until it is counted.
struct Done {
    int num_splits, place, first;  // see decode_record.cuh
    int counter;                   // of the row and tile
    int out_head, num_heads;       // of all rows' heads the first, and how many
};

struct Shared {
    uint4 rings[WARPS][PIECES][PIECE_BYTES / 16];
    WarpSide sides[WARPS];
    Slot slots[SLOTS];
    RawQuery raw[2];
    Query query;
    SumStats stats;
    Done done[COUNT_EVERY];  // since items were last counted
    Pool pool;      // registers are few
    int num_items;  // of the whole grid
    u32 complete;   // see settle
};

// A warp's way through its units: keys and values in turn are in the pieces of its ring, and in the
// place of what has been used comes what follows PIECES later: of keys, where PIECES is odd, values.
struct Walk {
    u8* ring;
    int piece;    // at hand
    u32 at_hand;  // unit, of all the warp's
    __device__ __forceinline__ u8* here() const { return ring + piece * PIECE_BYTES; }
    __device__ __forceinline__ void advance() {
        if (PIECES == 2) piece ^= 1;  // a unit has the same pieces as that before: no variable
        else piece = piece == PIECES - 1 ? 0 : piece + 1;
    }
};

__device__ __forceinline__ void fill_ring(const Walk& walk, Shared& shared, const Pool& pool,
                                          int warp, int lane) {
    WarpSide& side = shared.sides[warp];
#pragma unroll 1
    for (int i = 0; 2 * i < PIECES; ++i) {
        copy_keys(walk.ring + 2 * i * PIECE_BYTES, side, i, shared.slots, shared.num_items, pool,
                  warp, lane);
        if (2 * i + 1 == PIECES) continue;
        copy_values(walk.ring + (2 * i + 1) * PIECE_BYTES, side, i, pool, lane);
    }
}

// Keys in the place of the piece at hand.
__device__ __forceinline__ void follow_with_keys(const Walk& walk, Shared& shared, const Pool& pool,
                                                 int warp, int lane) {
    copy_keys(walk.here(), shared.sides[warp], walk.at_hand + AHEAD - 1, shared.slots,
              shared.num_items, pool, warp, lane);
}

// The unit at hand, but for the copy that follows into its values' place.
__device__ __forceinline__ void attend_unit(Softmax& softmax, Walk& walk, Shared& shared,
                                            const int* record, const Pool& pool, int warp,
                                            int lane) {
    WarpSide& sides = shared.sides[warp];
    const u8* keys = walk.here();
    float x[MAX_TILES][4];
    wait_for_piece();
    int codec = sides.unit(walk.at_hand).codec_or_empty();
    if (codec == NATIVE) {
        score_native(x, keys, shared.query, lane);
    }
#if MAX_CODEC >= 1
    const Side& side = sides.sides[walk.at_hand % AHEAD];
    if (codec == INT8) {
        score_int8(x, keys, shared.query, side, lane);
    }
#endif
#if MAX_CODEC == 2
    if (codec == INT4) {
        int offset = offset_in_block(sides.unit(walk.at_hand), pool.block_size);
        spread_scales(sides.scales, side, offset, 4 * pool.block_size, lane);
        score_int4(x, keys, shared.query, side.zeros(), sides.scales, lane);
    }
#endif
    if constexpr (PIECES % 2) copy_values(walk.here(), sides, walk.at_hand + AHEAD - 1, pool, lane);
    else follow_with_keys(walk, shared, pool, warp, lane);
    walk.advance();
    const u8* values = walk.here();
    wait_for_piece();
    int position = sides.unit(walk.at_hand).position;
    codec = sides.unit(walk.at_hand).codec_or_empty();  // read again: registers are few
    if (codec == NATIVE) {
        attend_native(softmax, x, values, position, record, lane);
    }
#if MAX_CODEC >= 1
    if (codec == INT8) {
        attend_int8(softmax, x, values, side, position, record, lane);
    }
#endif
#if MAX_CODEC == 2
    if (codec == INT4) {
        attend_int4(softmax, x, values, side.v_scales(), position, record, lane);
    }
#endif
}

// On to the next unit.
__device__ __forceinline__ void step_on(Walk& walk, Shared& shared, const Pool& pool, int warp,
                                        int lane) {
    ++walk.at_hand;
    if constexpr (PIECES % 2) follow_with_keys(walk, shared, pool, warp, lane);
    else copy_values(walk.here(), shared.sides[warp], walk.at_hand + AHEAD - 2, pool, lane);
    walk.advance();
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
#pragma unroll 1
    for (int part = thread; part < slot.num_heads * (HEAD_DIM / 2); part += THREADS) {
        int head = part / (HEAD_DIM / 2), channel = part % (HEAD_DIM / 2) * 2;
        Combined all = combine(sets, WARPS, head, channel / 2);
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

// Counts this block's num_items items since it last counted, 32 at most, which all threads have
// written before a barrier. Bit i of the result: item i was the last of its row's splits; the others
// of that row are then visible. By warp 0; the result is for lane 0.
__device__ __forceinline__ u32 count_items(const Results& results, const Done* done, int num_items,
                                           int lane) {
    bool is_last = false;
    if (lane < num_items && done[lane].num_splits > 1) {
        unsigned int* counter = results.counters + done[lane].counter;
        is_last = add_and_fence(counter, 1) == u32(done[lane].num_splits - 1);
        if (is_last) *counter = 0;
    }
    return __ballot_sync(FULL_MASK, is_last);
}

// Four channels of a head of item idx: the row's output from all its splits.
__device__ __forceinline__ void merge_part(const Results& results, const Done& done, int idx,
                                           int part) {
    int head = part / (HEAD_DIM / 4), channel = part % (HEAD_DIM / 4) * 4;
    if (head >= done.num_heads) return;
    int step = results.tiles() * results.tile_heads();
    long long slot = (long long)idx * results.tile_heads() - done.place * step + head;
    Combined<float4> all =
        add_splits(results.split_sums + slot * HEAD_DIM + channel, results.split_stats + 2 * slot,
                   step * HEAD_DIM, 2 * step, done.num_splits, done.first);
    scalar_t* out = results.out + (long long)(done.out_head + head) * HEAD_DIM + channel;
    write_out(out, {make_float2(all.sum.x, all.sum.y), all.top, all.weight});
    write_out(out + 2, {make_float2(all.sum.z, all.sum.w), all.top, all.weight});
}

// Count what the block has written since it last counted, and merge the rows that are complete, all
// at the same time.
__device__ __forceinline__ void settle(const Results& results, u32& complete, const Done* done,
                                       int first, int num_items, int thread) {
    if (thread < 32) {
        u32 last = count_items(results, done, num_items, thread);
        if (thread == 0) complete = last;
    }
    __syncthreads();
    int parts = results.tile_heads() * (HEAD_DIM / 4), num_complete = __popc(complete);
#pragma unroll 1
    for (int i = thread; i < num_complete * parts; i += THREADS) {
        u32 left = complete;
#pragma unroll 1
        for (int skip = i / parts; skip; --skip) left &= left - 1;
        int nth = __ffs(int(left)) - 1;
        merge_part(results, done[nth], item_of(first + nth), i % parts);
    }
}

// Before the barrier at an item's end: until this thread's copies of the next item's q are there. They
// went with the piece after the last item's end; of this item came two pieces a turn, less one. A ring
// of two has waited for them already. is_first: the item has one turn only.
__device__ __forceinline__ void wait_for_query(bool is_first) {
    if constexpr (PIECES == 2) return;
    if (is_first) cp_async_wait<1>();
    else cp_async_wait<3>();
}

// Where the items' records and q are.
struct Work {
    const int* plan;
    const scalar_t* q;
    const half_t* q_rotated;
    float scale;
    int num_heads, tiles, group;
    const int& num_items;
    __device__ __forceinline__ bool has(int turn) const { return item_of(turn) < num_items; }
    // All of the records of num_turns items.
    __device__ __forceinline__ void begin_records(Slot* slots, int first, int num_turns,
                                                  const Pool& pool) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < num_turns * RECORD_CHUNKS; i += THREADS) {
            int turn = first + i / RECORD_CHUNKS;
            copy_record_chunk(slots[turn & (SLOTS - 1)], plan, item_of(turn), i % RECORD_CHUNKS,
                              tiles, group, pool);
        }
    }
    __device__ __forceinline__ void begin_query(RawQuery* raw, const Slot* slots, int turn) const {
        copy_query(raw[turn & 1], slots[turn & (SLOTS - 1)], q, q_rotated, num_heads);
    }
};

// The block's first records, waited for, and the q of its first items, which is on its way then.
// false: there is nothing for this block.
__device__ __forceinline__ bool begin_work(const Work& work, Shared& shared,
                                           const Pool& pool) {
    work.begin_records(shared.slots, 0, RECORDS_AHEAD, pool);
    cp_async_commit();
    if (threadIdx.x == 0) {
        shared.pool = pool;
        shared.num_items = work.plan[0] * work.tiles;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (!work.has(0)) return false;
    for (int turn = 0; turn < 2; ++turn) {
        if (work.has(turn)) work.begin_query(shared.raw, shared.slots, turn);
    }
    cp_async_commit();
    return true;
}

// An item is done: its sums go where the last unit's values were, in all warps the same piece, and
// from there out. Then q of the block's next item is taken up.
__device__ __forceinline__ void end_item(Softmax& softmax, const Results& results, const Work& work,
                                         Shared& shared, int piece, int turn, bool is_first) {
    Slot& slot = shared.slots[turn & (SLOTS - 1)];
    int thread = opaque(threadIdx.x);
    SumSets sets = {reinterpret_cast<u8*>(shared.rings) + piece * PIECE_BYTES, &shared.stats};
    __syncwarp();
    store_sums(sets, softmax, slot.num_heads, thread / 32, thread % 32);
    wait_for_query(is_first);
    __syncthreads();
    write_item(results, sets, slot, item_of(turn), thread);
    if (thread == 0) {
        int row = slot.record[RECORD_ROW];
        shared.done[turn % COUNT_EVERY] = {
            slot.record[RECORD_NUM_SPLITS], slot.record[RECORD_PLACE], slot.record[RECORD_FIRST],
            row * results.tiles() + slot.tile, row * work.num_heads + slot.first_head,
            slot.num_heads};
    }
    bool has_next = work.has(turn + 1);
    if (has_next) {
        int next = turn + 1;
        store_query(shared.query, shared.raw[next & 1], shared.slots[next & (SLOTS - 1)], work.scale,
                    thread);
    }
    __syncthreads();
    // Fences wait for all loads that are under way: not after every item.
    int num_uncounted = turn % COUNT_EVERY + 1;
    if (num_uncounted == COUNT_EVERY || !has_next) {
        int first = turn - (num_uncounted - 1);
        settle(results, shared.complete, shared.done, first, num_uncounted, thread);
    }
    softmax = {{}, {LEAST, LEAST}, {0.0f, 0.0f}};
}

// What later items than the next need is sent for, into the places of the item that is done.
__device__ __forceinline__ void reach_on(const Work& work, Shared& shared, const Pool& pool,
                                         int turn) {
    if (work.has(turn + 2)) work.begin_query(shared.raw, shared.slots, turn + 2);
    int later = turn + RECORDS_AHEAD;
    if (work.has(later)) work.begin_records(shared.slots, later, 1, pool);
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
    int part_bytes = block_size * HEAD_DIM * 2, layer_bytes = num_kv_heads * part_bytes * 2;
    int layer_side_bytes = num_kv_heads * side_bytes;
    Pool given = {payload + (long long)layer_idx * layer_bytes,
                 side + (long long)layer_idx * layer_side_bytes,
                 u32(num_layers) * layer_bytes, u32(num_layers) * layer_side_bytes,
                 part_bytes, layer_bytes / 2, side_bytes, block_size};
    Results results = {out, split_sums, split_stats, counters, num_kv_heads, group};
    Work work = {plan, q, q_rotated, scale, num_kv_heads * group, results.tiles(), group,
                 shared.num_items};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Pool& pool = shared.pool;
    if (!begin_work(work, shared, given)) return;
    Walk walk;
    if (lane == 0) shared.sides[warp].turn = -1, shared.sides[warp].end = 0;
    walk.ring = reinterpret_cast<u8*>(shared.rings[warp]);
    walk.piece = 0, walk.at_hand = 0;
    fill_ring(walk, shared, pool, warp, lane);
    cp_async_wait<PIECES>();
    __syncthreads();
    store_query(shared.query, shared.raw[0], shared.slots[0], scale, threadIdx.x);
    __syncthreads();
    Softmax softmax = {{}, {LEAST, LEAST}, {0.0f, 0.0f}};
    bool is_first = true;
    for (int turn = 0;;) {
        const Slot& slot = shared.slots[opaque(turn) & (SLOTS - 1)];  // not kept in a register
        attend_unit(softmax, walk, shared, slot.record, pool, warp, lane);
        bool is_last = shared.sides[warp].unit(walk.at_hand).is_last();
        if (is_last) {
            end_item(softmax, results, work, shared, walk.piece, turn, is_first);
            if (!work.has(turn + 1)) return;
            reach_on(work, shared, pool, turn);
            ++turn;
        }
        is_first = is_last;
        step_on(walk, shared, pool, warp, lane);
    }
}
