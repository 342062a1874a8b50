// Attention of one new token a row over the paged pool: split-KV, any mix of codecs in a row.
//
// grid: as many blocks as fit the device, whatever the batch: they walk the work list of
// plan_decode.cu, record by record, and in each record by tiles of up to 8 heads of one kv head.
// block: 32 * WARPS threads; each warp takes every WARPS-th unit (decode_units.cuh) of the split and
// keeps its own softmax; then the warps' sums are added in their order. Where a row has several
// splits, the block that comes last adds them in their order, so that a row's result depends neither
// on its neighbours nor on chance. counters are zero before and after a launch.
// While an item is worked on, the record and the q of the next are copied to shared memory and its
// first units follow the item's last, so that loads never cease within a block.
// Dynamic shared memory: SHARED_BYTES, see shared_bytes() of attention/paged_decode.py; at HEAD_DIM
// 128 and 4 warps 52 KiB native, 69 KiB with INT4: a unit's keys and values for each warp (8 KiB),
// the warps' sums (4.2 KiB each), q, records.
// -D: SCALAR_BF16, HEAD_DIM (64, 96, 128, 256), MAX_CODEC (0 native, 1 INT8, 2 INT4: the lowest that
// tables may name), WARPS, MIN_BLOCKS (of a multiprocessor, for the compiler), SHARED_BYTES.
#include "ptx.cuh"
#include "decode_record.cuh"
#include "decode_units.cuh"
#include "decode_values.cuh"
#include "decode_softmax.cuh"
#include "decode_merge.cuh"
#include "decode_items.cuh"

constexpr int COUNT_EVERY = 8;  // items of a block, 32 at most

struct Shared {
    Slot slots[SLOTS];
    RawQuery raw;
    Query query;
    SumSets sets;
    Stage stages[WARPS];
    int num_items;
    u32 complete;  // see settle
};

// What a warp has of the unit it is about to attend to, besides its stage.
struct Loaded {
    Unit unit;
    u32 masks[2];  // units of the same item, or of the next, that are still to come
    u32 side[SIDE_WORDS];
    u32 turn;  // 0, 1, 0, 1 ...: which of the stage's two INT4 side pieces is the unit's
};

// All units of this warp in slot `here`, then the loads of its first one in slot `there` (if
// has_next). The next unit's keys are under way while this one's values are used, and the other way
// round. Returns the codecs of the next item.
__device__ __forceinline__ int attend_units(Softmax& softmax, Loaded& loaded, Shared& shared,
                                            int here, int there, bool has_next, const Pool& pool,
                                            int warp, int lane) {
    int codecs = 0;
    Stage& stage = shared.stages[warp];
    const u8* keys = reinterpret_cast<const u8*>(stage.keys);
    const u8* values = reinterpret_cast<const u8*>(stage.values);
    const int* record = shared.slots[here].record;
    for (bool is_done = false; !is_done;) {
        const Slot* slot = &shared.slots[here];
        Unit unit = loaded.unit, next = take_unit(loaded.masks, record, pool.block_size);
        is_done = next.position < 0;
        if (is_done && has_next) {
            slot = &shared.slots[there];
            codecs = share_units(loaded.masks, slot->record, pool.block_size, warp, lane);
            next = take_unit(loaded.masks, slot->record, pool.block_size);
        }
        loaded.unit = next;
        int codec = unit.position < 0 ? -1 : unit.codec();
        u32 turn = loaded.turn, next_turn = codec < 0 ? turn : turn ^ 1;
        float x[MAX_TILES][4];
        wait_for_unit();
        if (codec == NATIVE) {
            score_native(x, keys, shared.query, lane);
        }
#if MAX_CODEC >= 1
        u32 v_scales[2] = {loaded.side[2], loaded.side[3]};
        if (codec == INT8) {
            score_int8(x, keys, shared.query, loaded.side, lane);
        }
#endif
#if MAX_CODEC == 2
        if (codec == INT4) {
            int offset = place_of(unit, 0, pool).offset;
            float super_scale = stage_int4_side(stage.int4, turn, offset, 4 * pool.block_size, lane);
            score_int4(x, keys, shared.query, stage.int4, turn, super_scale, lane);
        }
#endif
        copy_unit_keys(stage, next_turn, loaded.side, next, *slot, pool, lane);
        wait_for_unit();
        if (codec == NATIVE) {
            attend_native(softmax, x, values, unit, record, lane);
        }
#if MAX_CODEC >= 1
        if (codec == INT8) {
            attend_int8(softmax, x, values, v_scales, unit, record, lane);
        }
#endif
#if MAX_CODEC == 2
        if (codec == INT4) {
            attend_int4(softmax, x, values, stage.int4.raw[turn].v_scales, unit, record, lane);
        }
#endif
        copy_unit_values(stage, next, *slot, pool, lane);
        loaded.turn = next_turn;
    }
    return codecs;
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
    for (int part = thread; part < slot.num_heads * (HEAD_DIM / 4); part += THREADS) {
        int head = part / (HEAD_DIM / 4), channel = part % (HEAD_DIM / 4) * 4;
        Combined all = combine(sets, WARPS, head, channel);
        if (is_whole) {
            write_out(results.out_of(slot) + head * HEAD_DIM + channel, all);
            continue;
        }
        store_float4(results.split_sums + (first + head) * HEAD_DIM + channel, all.sum);
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

// The row's output from all its splits, by the whole block, a barrier before and after.
__device__ __forceinline__ void merge_item(const Results& results, SumSets& sets, const int* plan,
                                           int idx) {
    int tiles = results.tiles(), tile = idx % tiles, group_tiles = tiles / results.num_kv_heads;
    const int* record = record_of(plan, idx, tiles);
    int in_group = tile % group_tiles * 8;
    int first_head = tile / group_tiles * results.group + in_group;
    long long step = (long long)tiles * results.tile_heads();
    long long first = (long long)idx * results.tile_heads() - record[RECORD_SPLIT] * step;
    long long row = record[RECORD_ROW];
    scalar_t* out =
        results.out + (row * (results.num_kv_heads * results.group) + first_head) * HEAD_DIM;
    merge_splits(out, sets, results.split_sums, results.split_stats, first, step,
                 record[RECORD_NUM_SPLITS], min(8, results.group - in_group));
    __syncthreads();
}

// Count what the block has written since it last counted, and merge the rows that are complete.
__device__ __forceinline__ void settle(const Results& results, Shared& shared, const int* plan,
                                       int idx, int step, int num_items, int thread) {
    if (thread < 32) {
        u32 last = count_items(results, plan, idx, step, num_items, thread);
        if (thread == 0) shared.complete = last;
    }
    __syncthreads();
    for (u32 left = shared.complete; left; left &= left - 1) {
        merge_item(results, shared.sets, plan, idx + (__ffs(int(left)) - 1) * step);
    }
}

// grid: any; block: THREADS. Every tensor is contiguous. items: records times kv heads times tiles
// of up to 8 heads of a group. plan: has room for one record a block, whatever plan[0] is.
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
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Pool pool = {payload, side, num_kv_heads, layer_idx, num_layers, block_size, side_bytes};
    Results results = {out, split_sums, split_stats, counters, num_kv_heads, group};
    copy_record(shared.slots[0], plan, blockIdx.x / results.tiles());
    cp_async_commit();
    if (threadIdx.x == 0) {
        shared.num_items = plan[0] * results.tiles();
        choose_heads(shared.slots[0], blockIdx.x % results.tiles(), group);
    }
    cp_async_wait<0>();
    __syncthreads();
    // As few blocks as make no more rounds: with a part of them in a last round, the others' share of
    // the memory's speed would be left unused.
    int rounds = (shared.num_items + int(gridDim.x) - 1) / int(gridDim.x);
    int step = rounds ? (shared.num_items + rounds - 1) / rounds : 0;
    if (int(blockIdx.x) >= step) return;
    Loaded loaded;
    loaded.unit = {0, -1};
    loaded.masks[0] = loaded.masks[1] = 0;
    loaded.turn = 0;
    for (int turn = -1, idx = int(blockIdx.x) - step;; ++turn, idx += step) {
        bool has_item = turn >= 0, has_next = idx + step < shared.num_items;
        int here = turn & (SLOTS - 1), there = (turn + 1) & (SLOTS - 1);
        if (has_next) copy_query(shared.raw, shared.slots[there], q, q_rotated, num_kv_heads * group);
        if (idx + 2 * step < shared.num_items) {
            Slot& later = shared.slots[(turn + 2) & (SLOTS - 1)];
            copy_record(later, plan, (idx + 2 * step) / results.tiles());
            if (threadIdx.x == 0) choose_heads(later, (idx + 2 * step) % results.tiles(), group);
        }
        cp_async_commit();
        Softmax softmax = {{}, {LEAST, LEAST}, {0.0f, 0.0f}};
        int codecs = attend_units(softmax, loaded, shared, here, there, has_next, pool, warp, lane);
        int thread = opaque(threadIdx.x);
        if (has_item) store_sums(shared.sets, softmax, thread / 32, thread % 32);
        cp_async_wait<0>();
        __syncthreads();
        if (has_item) write_item(results, shared.sets, shared.slots[here], idx, thread);
        if (has_next) {
            store_query(shared.query, shared.raw, shared.slots[there].num_heads, codecs, scale,
                        thread);
        }
        __syncthreads();
        // Fences wait for all loads that are under way: not after every item.
        int num_uncounted = turn % COUNT_EVERY + 1;
        if (has_item && (num_uncounted == COUNT_EVERY || !has_next)) {
            settle(results, shared, plan, idx - (num_uncounted - 1) * step, step, num_uncounted,
                   thread);
        }
        if (!has_next) return;
    }
}
