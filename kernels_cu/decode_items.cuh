// What a block of paged_decode works on: items, their units, their q.
//
// An item is a record of the work list and up to 8 heads of one kv head's group. Item i of a block is
// in slot i % SLOTS while it is worked on or about to be; its successor's record, q and first units
// are on their way before it is done.
#pragma once

constexpr int SLOTS = 4;

struct Pool {
    const u8 *payload, *side;
    int num_kv_heads, layer_idx, num_layers, block_size, side_bytes;
    __device__ __forceinline__ int part_bytes() const { return block_size * HEAD_DIM * 2; }
};

struct __align__(16) Slot {
    int record[RECORD_INTS];
    int kv_head, first_head, num_heads;  // heads of q: first_head .. + num_heads - 1
};

// q of an item as it is in global memory.
struct RawQuery {
    uint4 q[HEAD_DIM];  // scalar_t [8, HEAD_DIM]
#if MAX_CODEC >= 1
    uint4 rotated[HEAD_DIM];  // half_t [8, HEAD_DIM]
#endif
};

// ---- copies to shared memory --------------------------------------------------------------------

__device__ __forceinline__ void copy_record(Slot& slot, const int* plan, int record_idx) {
    const int* record = plan + RECORD_HEADER + (long long)record_idx * RECORD_INTS;
    for (int i = threadIdx.x; i < RECORD_INTS / 4; i += THREADS) {
        cp_async16(slot.record + 4 * i, record + 4 * i);
    }
}

__device__ __forceinline__ void choose_heads(Slot& slot, int tile, int group) {
    int group_tiles = (group + 7) / 8;
    slot.kv_head = tile / group_tiles;
    int in_group = tile % group_tiles * 8;
    slot.first_head = slot.kv_head * group + in_group;
    slot.num_heads = min(8, group - in_group);
}

__device__ __forceinline__ void copy_query(RawQuery& raw, const Slot& slot, const scalar_t* q,
                                           const half_t* q_rotated, int num_heads) {
    long long first = ((long long)slot.record[RECORD_ROW] * num_heads + slot.first_head) * HEAD_DIM;
    for (int i = threadIdx.x; i < slot.num_heads * (HEAD_DIM / 8); i += THREADS) {
        cp_async16(&raw.q[i], q + first + 8 * i);
#if MAX_CODEC >= 1
        if (q_rotated) cp_async16(&raw.rotated[i], q_rotated + first + 8 * i);
#endif
    }
}

// ---- units --------------------------------------------------------------------------------------

// Which granules of a split begin units of this warp: bit i of masks[j] is granule 32 j + i. Units
// go round the warps in order, whatever their codec. Returns the codecs met, bit by bit.
__device__ __forceinline__ int share_units(u32 (&masks)[2], const int* record, int block_size,
                                           int warp, int lane) {
    int start = record[RECORD_START], shift = block_size == GRANULE ? 0 : 1;
    int stop = min(start + record[RECORD_SIZE], record[RECORD_END]);
    int before = 0;
    u32 codecs = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int position = start + GRANULE * (lane + 32 * i);
        int codec = 0;
        if (MAX_CODEC && position < stop) {
            codec = int(u32(record[RECORD_HEADER + ((lane + 32 * i) >> shift)]) >> 28);
        }
        int length = GRANULE << codec;
        bool is_unit = position < stop && (position & (length - 1)) == 0 &&
                       position + length > record[RECORD_OLDEST];
        u32 units = __ballot_sync(FULL_MASK, is_unit);
        int idx = before + __popc(units & ((1u << lane) - 1));
        masks[i] = __ballot_sync(FULL_MASK, is_unit && idx % WARPS == warp);
        before += __popc(units);
        if (MAX_CODEC >= 1) codecs |= __any_sync(FULL_MASK, is_unit && codec == INT8) << INT8;
        if (MAX_CODEC == 2) codecs |= __any_sync(FULL_MASK, is_unit && codec == INT4) << INT4;
    }
    return codecs;
}

// The next unit of masks, which are of the split in `record`.
__device__ __forceinline__ Unit take_unit(u32 (&masks)[2], const int* record, int block_size) {
    if (!(masks[0] | masks[1])) return {0, -1};
    bool is_first = masks[0] != 0;
    int granule = __ffs(int(is_first ? masks[0] : masks[1])) - 1 + (is_first ? 0 : 32);
    if (is_first) masks[0] &= masks[0] - 1;
    else masks[1] &= masks[1] - 1;
    int shift = block_size == GRANULE ? 0 : 1;
    return {u32(record[RECORD_HEADER + (granule >> shift)]),
            record[RECORD_START] + GRANULE * granule};
}

// Where a unit stands: of the layer and kv head, its keys' rows, and its block's side piece.
struct Place {
    const u8 *keys, *side;
    int offset;  // of the unit in its block, positions
};

__device__ __forceinline__ Place place_of(const Unit& unit, int kv_head, const Pool& pool) {
    Place place;
    place.offset = int(unit.entry >> 24 & 15) * pool.block_size + (unit.position & (pool.block_size - 1));
    long long layer = (long long)(unit.entry & 0xffffff) * pool.num_layers + pool.layer_idx;
    long long part = layer * 2 * pool.num_kv_heads + kv_head;
    place.keys = pool.payload + part * pool.part_bytes() +
                 place.offset * (2 * HEAD_DIM >> unit.codec());
    place.side = pool.side + (layer * pool.num_kv_heads + kv_head) * pool.side_bytes;
    return place;
}

// What a warp keeps in shared memory of the unit at hand and of the next: keys of the one make room
// for keys of the other when they are scored, and so do values when they are added.
struct Stage {
    uint4 keys[UNIT_BYTES / 16], values[UNIT_BYTES / 16];
#if MAX_CODEC == 2
    Int4Staged int4;
#endif
};

// One group of copies, of a warp that has done with what was there before.
__device__ __forceinline__ void copy_unit(uint4 (&to)[UNIT_BYTES / 16], const u8* from, int lane) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < UNIT_BYTES / 512; ++i) {
        cp_async16(&to[32 * i + lane], from + 512 * i + 16 * lane);
    }
    cp_async_commit();
}

// Until all groups but the last of this warp's are there, for all its lanes. Keys and values take
// turns, a group each even where there is no unit, so that this is always what is needed next.
__device__ __forceinline__ void wait_for_unit() {
    cp_async_wait<1>();
    __syncwarp();
}

// turn: of the stage's two buffers for INT4 side pieces.
__device__ __forceinline__ void copy_unit_keys(Stage& stage, int turn, u32 (&side)[SIDE_WORDS],
                                               const Unit& unit, const Slot& slot, const Pool& pool,
                                               int lane) {
    if (unit.position < 0) return cp_async_commit();
    Place place = place_of(unit, slot.kv_head, pool);
#if MAX_CODEC >= 1
    if (unit.codec() == INT8) {
        load_int8_side(side, place.side, place.offset, 2 * pool.block_size, lane);
    }
#endif
#if MAX_CODEC == 2
    if (unit.codec() == INT4) {
        copy_int4_side(stage.int4.raw[turn], place.side, place.offset, 4 * pool.block_size, lane);
    }
#endif
    copy_unit(stage.keys, place.keys, lane);
}

__device__ __forceinline__ void copy_unit_values(Stage& stage, const Unit& unit, const Slot& slot,
                                                 const Pool& pool, int lane) {
    if (unit.position < 0) return cp_async_commit();
    const u8* from = place_of(unit, slot.kv_head, pool).keys + pool.num_kv_heads * pool.part_bytes();
    copy_unit(stage.values, from, lane);
}

// ---- q ------------------------------------------------------------------------------------------

// Halves of q over a power of two that brings the largest into [0.5, 1), or zeros; by one warp.
template <int CODEC, class T>
__device__ __forceinline__ void store_scaled(Query& query, const uint4* raw, int head, bool is_real,
                                             float scale, int lane) {
    constexpr int PARTS = (HEAD_DIM + 127) / 128;  // of 4 channels, a lane
    float x[PARTS][4] = {};
    float peak = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int channel = part * 128 + lane * 4;
        if (!is_real || channel >= HEAD_DIM) continue;
        uint2 pairs = reinterpret_cast<const uint2*>(raw)[(head * HEAD_DIM + channel) / 4];
        float2 low = unpack2<T>(pairs.x), high = unpack2<T>(pairs.y);
        x[part][0] = low.x, x[part][1] = low.y, x[part][2] = high.x, x[part][3] = high.y;
#pragma unroll
        for (int i = 0; i < 4; ++i) peak = fmaxf(peak, fabsf(x[part][i]));
    }
#pragma unroll
    for (int step = 16; step; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(FULL_MASK, peak, step));
    int exponent = min(max(int(__float_as_uint(peak) >> 23) - 126, -100), 100);
    float factor = __uint_as_float(u32(127 - exponent) << 23);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int channel = part * 128 + lane * 4;
        if (channel >= HEAD_DIM) continue;
        query_part<CODEC>(query, head, channel) =
            make_uint2(pack2<half_t>(x[part][0] * factor, x[part][1] * factor),
                       pack2<half_t>(x[part][2] * factor, x[part][3] * factor));
    }
    if (lane == 0) query.scale[CODEC][head] = scale * __uint_as_float(u32(127 + exponent) << 23);
}

// q of an item's heads in the form of every codec its split has; heads there are not are zero.
__device__ __forceinline__ void store_query(Query& query, const RawQuery& raw, int num_heads,
                                            int codecs, float scale, int thread) {
    for (int part = thread; part < 2 * HEAD_DIM; part += THREADS) {
        int head = part / (HEAD_DIM / 4), channel = part % (HEAD_DIM / 4) * 4;
        uint2 pairs = make_uint2(0, 0);
        if (head < num_heads) pairs = reinterpret_cast<const uint2*>(raw.q)[part];
        query_part<NATIVE>(query, head, channel) = pairs;
    }
    if (thread < 8) query.scale[NATIVE][thread] = scale;
#if MAX_CODEC >= 1
    int lane = thread % 32;
    for (int head = thread / 32; codecs && head < 8; head += WARPS) {
        bool is_real = head < num_heads;
        if (codecs >> INT8 & 1) {
            store_scaled<INT8, half_t>(query, raw.rotated, head, is_real, scale, lane);
        }
#if MAX_CODEC == 2
        if (codecs >> INT4 & 1) {
            store_scaled<INT4, scalar_t>(query, raw.q, head, is_real, scale, lane);
        }
#endif
    }
#endif
}
