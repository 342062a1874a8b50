// Attention of one new token a row over the paged pool: split-KV, any mix of codecs in a row.
//
// grid: a block for each multiprocessor, whatever the batch. block: TEAMS teams of WARPS warps each,
// which walk the work list of plan_decode.cu, record by record, and in each record by tiles of up to 8
// heads of one kv head. Of an item each warp takes every WARPS-th unit (decode_units.cuh) and keeps
// its own softmax; then the warps' sums are added in their order. Where a row has several splits, the
// team that comes last adds them in their order, so that a row's result depends neither on its
// neighbours nor on chance. counters are zero before and after a launch.
// Each warp has room for the keys and the values of one unit, filled by cp.async: what has been used
// makes room for the same of the next unit, of the next items too, so that loads never cease between
// a team's items. Records and q go ahead in the same way.
// Dynamic shared memory: SHARED_BYTES, see shared_bytes() of attention/paged_decode.py; at HEAD_DIM
// 128, 2 teams of 8 warps 157 KiB native, 201 KiB with INT4.
// -D: SCALAR_BF16, HEAD_DIM (64, 96, 128, 256), MAX_CODEC (0 native, 1 INT8, 2 INT4: the lowest that
// tables may name), TEAMS, WARPS (of a team), SHARED_BYTES.
#include "ptx.cuh"
#include "decode_record.cuh"
#include "decode_units.cuh"
#include "decode_values.cuh"
#include "decode_softmax.cuh"
#include "decode_items.cuh"
#include "decode_merge.cuh"

constexpr int COUNT_EVERY = 32;  // items of a team: a bit each

// What is left of an item's record until it is counted.
struct Done {
    int num_splits, place, first;  // see decode_record.cuh
    int counter;                   // of the row and tile
    int out_head, num_heads;       // of all rows' heads the first, and how many
};

struct Shared {
    WarpState states[WARPS];
    Slot slots[SLOTS];
    RawQuery raw[2];
    Query query;
    SumStats stats;
    Done done[COUNT_EVERY];  // since items were last counted
    Pool pool;               // registers are few
    int num_items;           // of the whole grid
    u32 complete;            // see settle
};

// Unit idx of a warp, whose keys and values are there or on their way; the keys of the next go where
// its own were.
__device__ __forceinline__ void attend_unit(Softmax& softmax, u32 idx, Shared& shared,
                                            const int* record, int warp, int lane) {
    WarpState& state = shared.states[warp];
    const u8* keys = reinterpret_cast<const u8*>(state.bytes.keys);
    const u8* values = reinterpret_cast<const u8*>(state.bytes.values);
    float x[MAX_TILES][4];
    wait_for_piece();
    int codec = state.unit(idx).codec_or_empty();
    if (codec == NATIVE) {
        score_native(x, keys, shared.query, lane);
    }
#if MAX_CODEC >= 1
    const Side& side = state.sides[idx % AHEAD];
    if (codec == INT8) {
        score_int8(x, keys, shared.query, side, lane);
    }
#endif
#if MAX_CODEC == 2
    if (codec == INT4) {
        int block_size = shared.pool.block_size;
        int offset = offset_in_block(state.unit(idx), block_size);
        spread_scales(state.scales, side, offset, 4 * block_size, lane);
        score_int4(x, keys, shared.query, side.zeros(), state.scales, lane);
    }
#endif
    copy_keys(state, idx + 1, shared.slots, shared.num_items, shared.pool, warp, lane);
    wait_for_piece();
    int position = state.unit(idx).position;
    codec = state.unit(idx).codec_or_empty();  // read again: registers are few
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

static_assert(TEAMS * sizeof(Shared) <= SHARED_BYTES, "the host reserves too little");

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

// Counts this team's num_items items since it last counted, 32 at most, which all threads have
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

// Count what the team has written since it last counted, and merge the rows that are complete, all
// at the same time.
__device__ __forceinline__ void settle(const Results& results, u32& complete, const Done* done,
                                       int first, int num_items, int thread) {
    if (thread < 32) {
        u32 last = count_items(results, done, num_items, thread);
        if (thread == 0) complete = last;
    }
    sync_team();
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
        for (int i = thread_of_team(); i < num_turns * RECORD_CHUNKS; i += THREADS) {
            int turn = first + i / RECORD_CHUNKS;
            copy_record_chunk(slots[turn & (SLOTS - 1)], plan, item_of(turn), i % RECORD_CHUNKS,
                              tiles, group, pool);
        }
    }
    __device__ __forceinline__ void begin_query(RawQuery* raw, const Slot* slots, int turn) const {
        copy_query(raw[turn & 1], slots[turn & (SLOTS - 1)], q, q_rotated, num_heads);
    }
};

// The team's first records, waited for, and the q of its first items, which is on its way then.
// false: there is nothing for this team.
__device__ __forceinline__ bool begin_work(const Work& work, Shared& shared, const Pool& pool) {
    work.begin_records(shared.slots, 0, SLOTS, pool);
    cp_async_commit();
    if (thread_of_team() == 0) {
        shared.pool = pool;
        shared.num_items = work.plan[0] * work.tiles;
    }
    cp_async_wait<0>();
    sync_team();
    if (!work.has(0)) return false;
    for (int turn = 0; turn < 2; ++turn) {
        if (work.has(turn)) work.begin_query(shared.raw, shared.slots, turn);
    }
    cp_async_commit();
    return true;
}

// An item is done: its sums go where the last unit's values were, and from there out. Then q of the
// team's next item is taken up: it came with the values after the last item's end, for which each
// thread has waited.
__device__ __forceinline__ void end_item(Softmax& softmax, const Results& results, const Work& work,
                                         Shared& shared, int turn) {
    Slot& slot = shared.slots[turn & (SLOTS - 1)];
    int thread = opaque(thread_of_team());
    SumSets sets = {shared.states, &shared.stats};
    __syncwarp();
    store_sums(sets, softmax, slot.num_heads, thread / 32, thread % 32);
    sync_team();
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
    sync_team();
    // Fences wait for all loads that are under way: not after every item.
    int num_uncounted = turn % COUNT_EVERY + 1;
    if (num_uncounted == COUNT_EVERY || !has_next) {
        int first = turn - (num_uncounted - 1);
        settle(results, shared.complete, shared.done, first, num_uncounted, thread);
    }
    softmax = {{}, {LEAST, LEAST}, {0.0f, 0.0f}};
}

// What later items than the next need is sent for, into the places of the item that is done.
__device__ __forceinline__ void reach_on(const Work& work, Shared& shared, int turn) {
    if (work.has(turn + 2)) work.begin_query(shared.raw, shared.slots, turn + 2);
    int later = turn + SLOTS;
    if (work.has(later)) work.begin_records(shared.slots, later, 1, shared.pool);
}

// grid: any; block: TEAMS * THREADS. Every tensor is contiguous. items: records times kv heads times
// tiles of up to 8 heads of a group. plan: has room for the first SLOTS items of every team, whatever
// plan[0] is.
extern "C" __global__ void __launch_bounds__(TEAMS * THREADS, 1) paged_decode_kernel(
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
    Shared& shared = block_memory[team_of_block()];
    int part_bytes = block_size * HEAD_DIM * 2, layer_bytes = num_kv_heads * part_bytes * 2;
    int layer_side_bytes = num_kv_heads * side_bytes;
    Pool given = {payload + (long long)layer_idx * layer_bytes,
                 side + (long long)layer_idx * layer_side_bytes,
                 u32(num_layers) * layer_bytes, u32(num_layers) * layer_side_bytes,
                 part_bytes, layer_bytes / 2, side_bytes, block_size};
    Results results = {out, split_sums, split_stats, counters, num_kv_heads, group};
    Work work = {plan, q, q_rotated, scale, num_kv_heads * group, results.tiles(), group,
                 shared.num_items};
    int warp = thread_of_team() / 32, lane = threadIdx.x % 32;
    if (!begin_work(work, shared, given)) return;
    WarpState& state = shared.states[warp];
    if (lane == 0) state.turn = -1, state.end = 0;
    copy_keys(state, 0, shared.slots, shared.num_items, shared.pool, warp, lane);
    copy_values(state, 0, shared.pool, lane);
    cp_async_wait<2>();
    sync_team();
    store_query(shared.query, shared.raw[0], shared.slots[0], scale, thread_of_team());
    sync_team();
    Softmax softmax = {{}, {LEAST, LEAST}, {0.0f, 0.0f}};
    int turn = 0;
    for (u32 idx = 0;; ++idx) {
        const Slot& slot = shared.slots[turn & (SLOTS - 1)];
        attend_unit(softmax, idx, shared, slot.record, warp, lane);
        if (state.unit(idx).is_last()) {
            end_item(softmax, results, work, shared, turn);
            if (!work.has(turn + 1)) return;
            reach_on(work, shared, turn);
            ++turn;
        }
        copy_values(state, idx + 1, shared.pool, lane);
    }
}
