// What a block of paged_decode works on: items, their units, their q.
//
// An item is a record of the work list and up to 8 heads of one kv head's group. Item i of a block is
// in slot i % SLOTS while it is worked on or about to be; records, q and units of its successors are
// on their way before it is done.
#pragma once

constexpr int SLOTS = 8;
constexpr int NUM_MASKS = MAX_SPLIT / (32 * GRANULE);
constexpr int AHEAD = (PIECES + 1) / 2;      // units that a warp's ring reaches into
constexpr int RECORDS_AHEAD = AHEAD + 2;  // items whose records are there or on their way
static_assert(PIECES == 3 || PIECES == 5, "wait_for_query counts on it");

struct Pool {
    const u8 *payload, *side;
    int num_kv_heads, layer_idx, num_layers, block_size, side_bytes;
    __device__ __forceinline__ int part_bytes() const { return block_size * HEAD_DIM * 2; }
};

struct __align__(16) Slot {
    int record[RECORD_INTS];
    int kv_head, first_head, num_heads;  // heads of q: first_head .. + num_heads - 1
    int codecs;  // met in it, bit by bit; when its first unit is on its way
};

// q of an item as it is in global memory.
struct RawQuery {
    uint4 q[HEAD_DIM];  // scalar_t [8, HEAD_DIM]
#if MAX_CODEC >= 1
    uint4 rotated[HEAD_DIM];  // half_t [8, HEAD_DIM]
#endif
};

// ---- copies to shared memory --------------------------------------------------------------------

__device__ __forceinline__ void choose_heads(Slot& slot, int tile, int group) {
    int group_tiles = (group + 7) / 8;
    slot.kv_head = tile / group_tiles;
    int in_group = tile % group_tiles * 8;
    slot.first_head = slot.kv_head * group + in_group;
    slot.num_heads = min(8, group - in_group);
}

// Of item idx.
__device__ __forceinline__ void copy_record(Slot& slot, const int* plan, int idx, int tiles,
                                            int group) {
    const int* record = plan + RECORD_HEADER + (long long)(idx / tiles) * RECORD_INTS;
    if (threadIdx.x == 0) choose_heads(slot, idx % tiles, group);
    for (int i = threadIdx.x; i < RECORD_INTS / 4; i += THREADS) {
        cp_async16(slot.record + 4 * i, record + 4 * i);
    }
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
// go round the warps in order, whatever their codec. codecs: met in the split, bit by bit. Returns
// the most units of a warp, at least 1.
__device__ __forceinline__ int share_units(u32 (&masks)[NUM_MASKS], int& codecs, const int* record,
                                           int block_size, int warp, int lane) {
    int start = record[RECORD_START], shift = block_size == GRANULE ? 0 : 1;
    int stop = min(start + record[RECORD_SIZE], record[RECORD_END]);
    int before = 0;
    codecs = 0;
    for (int i = 0; i < NUM_MASKS && start + 32 * GRANULE * i < stop; ++i) {
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
        u32 mask = __ballot_sync(FULL_MASK, is_unit && idx % WARPS == warp);
        if (lane == 0) masks[i] = mask;
        before += __popc(units);
        if (MAX_CODEC >= 1) codecs |= __any_sync(FULL_MASK, is_unit && codec == INT8) << INT8;
        if (MAX_CODEC == 2) codecs |= __any_sync(FULL_MASK, is_unit && codec == INT4) << INT4;
    }
    __syncwarp();
    return max(1, (before + WARPS - 1) / WARPS);
}

// Where a unit stands: of the layer and kv head, its keys' rows, and its block's side piece.
struct Place {
    const u8 *keys, *side;
    int offset;  // of the unit in its block, positions
};

__device__ __forceinline__ int offset_in_block(const Unit& unit, int block_size) {
    return int(unit.entry >> 24 & 15) * block_size + (unit.position & (block_size - 1));
}

__device__ __forceinline__ Place place_of(const Unit& unit, int kv_head, const Pool& pool) {
    Place place;
    place.offset = offset_in_block(unit, pool.block_size);
    long long layer = (long long)(unit.entry & 0xffffff) * pool.num_layers + pool.layer_idx;
    long long part = layer * 2 * pool.num_kv_heads + kv_head;
    place.keys = pool.payload + part * pool.part_bytes() +
                 place.offset * (2 * HEAD_DIM >> unit.codec());
    place.side = pool.side + (layer * pool.num_kv_heads + kv_head) * pool.side_bytes;
    return place;
}

// What a warp keeps in shared memory besides its ring.
struct WarpSide {
    u32 masks[NUM_MASKS];  // its units of the item whose copies have begun
#if MAX_CODEC >= 1
    Side sides[AHEAD];  // of the unit at hand and of those whose keys follow
#endif
#if MAX_CODEC == 2
    u32 scales[HEAD_DIM / 2];  // of the unit at hand: halves 1 .. 255 by channel
#endif
};

// One group of copies, of a warp that has done with what was there before.
template <bool IS_VALUES>
__device__ __forceinline__ void copy_piece(u8* to, const u8* from, int lane) {
#pragma unroll
    for (int i = 0; i < PIECE_BYTES / 512; ++i) {
        int place = place_of_chunk<IS_VALUES>(32 * i);
        int lane_place = place_of_chunk<IS_VALUES>(lane) ^ (place & 7);
        cp_async16(to + 16 * (lane_place + (place & ~7)), from + 512 * i + 16 * lane);
    }
}

// Until all groups but a ring's last PIECES - 1 are there, for all the warp's lanes. Keys and values
// take turns, a group each even where there is no unit, so that this is what is needed next.
__device__ __forceinline__ void wait_for_piece() {
    cp_async_wait<PIECES - 1>();
    __syncwarp();
}

__device__ __forceinline__ void copy_values(u8* to, const Unit& unit, const Pool& pool, int lane) {
    __syncwarp();
    if (!unit.is_empty()) {
        copy_piece<true>(to, unit.keys + pool.num_kv_heads * pool.part_bytes(), lane);
    }
    cp_async_commit();
}

// Where a warp's copies are in the block's items.
struct Reach {
    int idx, step, num_items;  // the item that is taken up next; from one to the next; of all
    int slot;                  // of the item before that
    u32 mask;                  // its units that are still to come, of 32 granules
    int mask_idx, num_masks;   // which granules; of the item
    int turns;                 // of it that are still to come; the last may be empty
};

// Takes up the next item.
__device__ __forceinline__ void take_item(Reach& reach, u32 (&masks)[NUM_MASKS], Slot* slots,
                                          int block_size, int warp, int lane) {
    reach.idx += reach.step;
    reach.slot = (reach.slot + 1) & (SLOTS - 1);
    Slot& slot = slots[reach.slot];
    int codecs;
    reach.turns = share_units(masks, codecs, slot.record, block_size, warp, lane);
    int size = min(slot.record[RECORD_SIZE], slot.record[RECORD_END] - slot.record[RECORD_START]);
    reach.num_masks = (size + 32 * GRANULE - 1) / (32 * GRANULE);
    reach.mask = reach.num_masks > 0 ? masks[0] : 0;
    reach.mask_idx = 0;
    if (threadIdx.x == 0) slot.codecs = codecs;
}

// The next unit, or an empty one; the keys of units are copied in this order.
__device__ __forceinline__ Unit take_unit(Reach& reach, u32 (&masks)[NUM_MASKS], Slot* slots,
                                          const Pool& pool, int warp, int lane) {
    Unit unit = {IS_EMPTY, 0, nullptr};
    if (reach.turns == 0) {
        if (reach.idx >= reach.num_items) return unit;
        take_item(reach, masks, slots, pool.block_size, warp, lane);
    }
    bool is_last = --reach.turns == 0;
    while (!reach.mask && reach.mask_idx + 1 < reach.num_masks) {
        reach.mask = masks[++reach.mask_idx];
    }
    if (reach.mask) {
        int granule = __ffs(int(reach.mask)) - 1 + 32 * reach.mask_idx;
        reach.mask &= reach.mask - 1;
        const Slot& slot = slots[reach.slot];
        int shift = pool.block_size == GRANULE ? 0 : 1;
        unit.entry = u32(slot.record[RECORD_HEADER + (granule >> shift)]);
        unit.position = slot.record[RECORD_START] + GRANULE * granule;
    }
    if (is_last) unit.entry |= IS_LAST;
    return unit;
}

// Takes the next unit and starts to copy its keys and its scales.
__device__ __forceinline__ Unit copy_next_keys(u8* to, WarpSide& side, int side_idx, Reach& reach,
                                               Slot* slots, const Pool& pool, int warp, int lane) {
    __syncwarp();
    Unit unit = take_unit(reach, side.masks, slots, pool, warp, lane);
    if (!unit.is_empty()) {
        Place place = place_of(unit, slots[reach.slot].kv_head, pool);
        unit.keys = place.keys;
        copy_piece<false>(to, place.keys, lane);
#if MAX_CODEC >= 1
        if (unit.codec() == INT8) {
            copy_int8_side(side.sides[side_idx], place.side, place.offset, 2 * pool.block_size, lane);
        }
#endif
#if MAX_CODEC == 2
        if (unit.codec() == INT4) {
            copy_int4_side(side.sides[side_idx], place.side, place.offset, 4 * pool.block_size, lane);
        }
#endif
    }
    cp_async_commit();
    return unit;
}

// ---- q ------------------------------------------------------------------------------------------

__device__ __forceinline__ void swap(float& a, float& b) {
    float was = a;
    a = b;
    b = was;
}

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
        float* four = x[part];
        if (CODEC == INT4) swap(four[1], four[2]);  // see spread_scales
        query_part<CODEC>(query, head, channel) =
            make_uint2(pack2<half_t>(four[0] * factor, four[1] * factor),
                       pack2<half_t>(four[2] * factor, four[3] * factor));
    }
    if (lane == 0) query.scale[CODEC][head] = scale * __uint_as_float(u32(127 + exponent) << 23);
}

// q of an item's heads in the form of every codec its split has; heads there are not are zero.
__device__ __forceinline__ void store_query(Query& query, const RawQuery& raw, const Slot& slot,
                                            float scale, int thread) {
    int num_heads = slot.num_heads;
    for (int part = thread; part < 2 * HEAD_DIM; part += THREADS) {
        int head = part / (HEAD_DIM / 4), channel = part % (HEAD_DIM / 4) * 4;
        uint2 pairs = make_uint2(0, 0);
        if (head < num_heads) pairs = reinterpret_cast<const uint2*>(raw.q)[part];
        query_part<NATIVE>(query, head, channel) = pairs;
    }
    if (thread < 8) query.scale[NATIVE][thread] = scale;
#if MAX_CODEC >= 1
    int lane = thread % 32, codecs = slot.codecs;
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
