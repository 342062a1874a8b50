// Attention of one new token a row over the paged pool: split-KV, any mix of codecs in a row.
//
// grid: as many blocks as fit the device, whatever the batch: they walk the work list of
// plan_decode.cu, record by record, and in each record by tiles of up to 8 heads of one kv head.
// block: 32 * WARPS threads; each warp takes every WARPS-th unit (decode_units.cuh) of the split and
// keeps its own softmax; then the warps' sums are added in their order. Where a row has several
// splits, the block that comes last adds them in their order, so that a row's result depends neither
// on its neighbours nor on chance. counters are zero before and after a launch.
// While an item is worked on, the record and the q of the next are copied to shared memory and its
// first units are loaded, and what counts a split as done is left to the end of the next item, so
// that only the first and the last item of a block show any latency.
// Static shared memory at HEAD_DIM 128, a codec more 2 to 4 KiB more: the warps' sums (4.2 KiB each),
// q (4 KiB), records (1.2 KiB).
// -D: SCALAR_BF16, HEAD_DIM (64, 96, 128, 256), MAX_CODEC (0 native, 1 INT8, 2 INT4: the lowest that
// tables may name), WARPS, MIN_BLOCKS (of a multiprocessor, for the compiler).
#include "ptx.cuh"
#include "decode_record.cuh"
#include "decode_units.cuh"
#include "decode_softmax.cuh"
#include "decode_merge.cuh"
#include "decode_items.cuh"

struct Shared {
    Slot slots[SLOTS];
    RawQuery raw;
    Query query;
    SumSets sets;
#if MAX_CODEC == 2
    Int4Staged staged[WARPS];
#endif
    int is_last;
};

// What a warp has in registers of the unit it is about to attend to.
struct Loaded {
    Unit unit;
    u32 masks[2];  // units of the same item, or of the next, that are still to come
    u32 keys[KEY_WORDS], values[VALUE_WORDS], side[SIDE_WORDS];
};

// All units of this warp in slot `here`, then the loads of its first one in slot `there` (if
// has_next). The next unit's keys are under way while this one's values are used, and the other way
// round. Returns the codecs of the next item.
__device__ __forceinline__ int attend_units(Softmax& softmax, Loaded& loaded, Shared& shared,
                                            int here, int there, bool has_next, const Pool& pool,
                                            int warp, int lane) {
    int codecs = 0;
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
        float x[MAX_TILES][4];
#if MAX_CODEC >= 1
        u32 v_scales[2] = {};
#endif
        if (codec == NATIVE) {
            score_native(x, loaded.keys, shared.query, lane);
        }
#if MAX_CODEC >= 1
        else if (codec == INT8) {
            score_int8(x, loaded.keys, shared.query, loaded.side, lane);
            v_scales[0] = loaded.side[2], v_scales[1] = loaded.side[3];
        }
#endif
#if MAX_CODEC == 2
        else if (codec == INT4) {
            float super_scale = stage_int4_side(shared.staged[warp], loaded.side, lane);
            score_int4(x, loaded.keys, shared.query, shared.staged[warp], super_scale, lane);
        }
#endif
        load_unit_keys(loaded.keys, loaded.side, next, *slot, pool, lane);
        if (codec == NATIVE) {
            attend_native(softmax, x, loaded.values, unit, record, lane);
        }
#if MAX_CODEC >= 1
        else if (codec == INT8) {
            attend_int8(softmax, x, loaded.values, v_scales, unit, record, lane);
        }
#endif
#if MAX_CODEC == 2
        else if (codec == INT4) {
            attend_int4(softmax, x, loaded.values, shared.staged[warp], unit, record, lane);
        }
#endif
        load_unit_values(loaded.values, next, *slot, pool, lane);
    }
    return codecs;
}

// Where an item's results go.
struct Results {
    scalar_t* out;
    float *split_sums, *split_stats;
    unsigned int* counters;
    int num_heads, tiles, tile_heads;

    __device__ __forceinline__ scalar_t* out_of(const Slot& slot) const {
        long long row = slot.record[RECORD_ROW];
        return out + (row * num_heads + slot.first_head) * HEAD_DIM;
    }
    __device__ __forceinline__ unsigned int* counter_of(const Slot& slot) const {
        return counters + (long long)slot.record[RECORD_ROW] * tiles + slot.tile;
    }
};

// The sums of all warps: to the output, where the row has one split, or to this split's scratch.
__device__ __forceinline__ void write_item(const Results& results, const SumSets& sets,
                                           const Slot& slot, int idx) {
    bool is_whole = slot.record[RECORD_NUM_SPLITS] == 1;
    long long first = (long long)idx * results.tile_heads;
    for (int part = threadIdx.x; part < slot.num_heads * (HEAD_DIM / 4); part += THREADS) {
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

// Count a split as done, by one thread, after a barrier that follows its writes; true for the last
// of the row, which then sees what all others wrote.
__device__ __forceinline__ bool count_split(const Results& results, const Slot& slot) {
    __threadfence();
    unsigned int* counter = results.counter_of(slot);
    bool is_last = atomicAdd(counter, 1u) == unsigned(slot.record[RECORD_NUM_SPLITS] - 1);
    if (is_last) *counter = 0;
    __threadfence();
    return is_last;
}

__device__ __forceinline__ void merge_item(const Results& results, SumSets& sets, const Slot& slot,
                                           int idx) {
    long long step = (long long)results.tiles * results.tile_heads;
    long long first = (long long)idx * results.tile_heads - slot.record[RECORD_SPLIT] * step;
    merge_splits(results.out_of(slot), sets, results.split_sums, results.split_stats, first, step,
                 slot.record[RECORD_NUM_SPLITS], slot.num_heads);
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
    __shared__ Shared shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, step = gridDim.x;
    int tiles = num_kv_heads * ((group + 7) / 8);
    Pool pool = {payload, side, num_kv_heads, layer_idx, num_layers, block_size, side_bytes};
    Results results = {out, split_sums, split_stats, counters, num_kv_heads * group, tiles,
                       min(group, 8)};
    copy_record(shared.slots[0], plan, blockIdx.x / tiles);
    cp_async_commit();
    int num_items = plan[0] * tiles;
    if (threadIdx.x == 0) choose_heads(shared.slots[0], blockIdx.x % tiles, group);
    cp_async_wait<0>();
    __syncthreads();
    Loaded loaded;
    loaded.unit = {0, -1};
    loaded.masks[0] = loaded.masks[1] = 0;
    bool is_pending = false;  // the item before: written, not yet counted
    for (int turn = -1, idx = int(blockIdx.x) - step;; ++turn, idx += step) {
        bool has_item = turn >= 0, has_next = idx + step < num_items;
        int here = turn & (SLOTS - 1), there = (turn + 1) & (SLOTS - 1);
        int before = (turn - 1) & (SLOTS - 1), later = (turn + 2) & (SLOTS - 1);
        if (has_next) copy_query(shared.raw, shared.slots[there], q, q_rotated, results.num_heads);
        if (idx + 2 * step < num_items) {
            copy_record(shared.slots[later], plan, (idx + 2 * step) / tiles);
            if (threadIdx.x == 0) {
                choose_heads(shared.slots[later], (idx + 2 * step) % tiles, group);
            }
        }
        cp_async_commit();
        Softmax softmax = {{}, {LEAST, LEAST}, {0.0f, 0.0f}};
        int codecs = attend_units(softmax, loaded, shared, here, there, has_next, pool, warp, lane);
        if (threadIdx.x == 0) {
            shared.is_last = is_pending && count_split(results, shared.slots[before]);
        }
        if (has_item) store_sums(shared.sets, softmax, warp, lane);
        cp_async_wait<0>();
        __syncthreads();
        bool is_last = shared.is_last;
        if (has_item) write_item(results, shared.sets, shared.slots[here], idx);
        if (has_next) {
            store_query(shared.query, shared.raw, shared.slots[there].num_heads, codecs, scale,
                        warp, lane);
        }
        if (is_last) {
            __syncthreads();
            merge_item(results, shared.sets, shared.slots[before], idx - step);
        }
        is_pending = has_item && shared.slots[here].record[RECORD_NUM_SPLITS] > 1;
        __syncthreads();
        if (has_next) continue;
        if (!is_pending) return;
        if (threadIdx.x == 0) shared.is_last = count_split(results, shared.slots[here]);
        __syncthreads();
        if (shared.is_last) merge_item(results, shared.sets, shared.slots[here], idx);
        return;
    }
}
