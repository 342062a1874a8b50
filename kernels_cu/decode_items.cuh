// What a team of paged_decode works on: items, their units, their q.
//
// An item is a record of the work list and up to 8 heads of one kv head's group. Item i of a team is
// in slot i % SLOTS while it is worked on or about to be; records, q and units of its successors are
// on their way before it is done. A warp's units stand in a queue of its own in shared memory, whole
// items at a time, so that where they are is worked out by 32 lanes at once.
#pragma once

__device__ constexpr int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

// A block's threads are TEAMS teams that have nothing to do with each other. Two blocks would do as
// well, but then two that follow each other may come to one multiprocessor, and another stays idle.
constexpr int THREADS = 32 * WARPS;  // of a team

constexpr int SLOTS = 4;  // as many items' records are there or on their way
constexpr int RECORD_CHUNKS = RECORD_INTS / 4;
constexpr int AHEAD = 2;  // units of a warp whose keys, at least, are there or on their way
// Units in a warp's queue: an item's, and the last of the item before, which is still at hand.
constexpr int MOST_UNITS = (MAX_SPLIT / GRANULE + WARPS - 1) / WARPS + 1;
// A power of two, so that idx % QUEUE is a mask, where it costs little memory.
constexpr int QUEUE = WARPS > 4 ? power_of_two(MOST_UNITS) : MOST_UNITS;

__device__ __forceinline__ int team_of_block() { return TEAMS == 1 ? 0 : threadIdx.x / THREADS; }
__device__ __forceinline__ int thread_of_team() {
    return TEAMS == 1 ? threadIdx.x : threadIdx.x % THREADS;
}
__device__ __forceinline__ void sync_team() { sync_some<THREADS>(team_of_block()); }

// Item `turn` of this team, of all the grid's.
__device__ __forceinline__ int item_of(int turn) {
    return blockIdx.x + (team_of_block() + turn * TEAMS) * gridDim.x;
}

// Of one layer.
struct Pool {
    const u8 *payload, *side;            // of block 0
    u32 block_bytes, block_side_bytes;  // from block to block
    int part_bytes, values_step;        // a kv head's keys; from them to its values
    int side_bytes, block_size;
};

struct __align__(16) Slot {
    int record[RECORD_INTS];
    const u8 *keys, *side;      // of the kv head in block 0
    int first_head, num_heads;  // of q
    int tile;                   // of the row's
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

__device__ __forceinline__ void choose_heads(Slot& slot, int tile, int group, const Pool& pool) {
    int kv_head = tile, in_group = 0;
    if (group > 8) {
        int group_tiles = (group + 7) / 8;
        kv_head = tile / group_tiles;
        in_group = (tile - kv_head * group_tiles) * 8;
    }
    slot.keys = pool.payload + (long long)kv_head * pool.part_bytes;
    slot.side = pool.side + (long long)kv_head * pool.side_bytes;
    slot.first_head = kv_head * group + in_group;
    slot.num_heads = min(8, group - in_group);
    slot.tile = tile;
}

// Sixteen bytes of the record of item idx; with the first, what follows from idx alone.
__device__ __forceinline__ void copy_record_chunk(Slot& slot, const int* plan, int idx, int chunk,
                                                  int tiles, int group, const Pool& pool) {
    int record = idx / tiles;
    const int* from = plan + RECORD_HEADER + (long long)record * RECORD_INTS;
    cp_async16(slot.record + 4 * chunk, from + 4 * chunk);
    if (chunk == 0) choose_heads(slot, idx - record * tiles, group, pool);
}

__device__ __forceinline__ void copy_query(RawQuery& raw, const Slot& slot, const scalar_t* q,
                                           const half_t* q_rotated, int num_heads) {
    long long first = ((long long)slot.record[RECORD_ROW] * num_heads + slot.first_head) * HEAD_DIM;
#pragma unroll 1
    for (int i = thread_of_team(); i < slot.num_heads * (HEAD_DIM / 8); i += THREADS) {
        cp_async16(&raw.q[i], q + first + 8 * i);
#if MAX_CODEC >= 1
        if (q_rotated) cp_async16(&raw.rotated[i], q_rotated + first + 8 * i);
#endif
    }
}

// ---- units --------------------------------------------------------------------------------------

// What a warp keeps in shared memory.
struct WarpState {
    UnitBytes bytes;    // the values of the unit at hand; its keys, or the next one's
    Unit units[QUEUE];  // unit i in place i % QUEUE
    int turn;           // of the team: the item whose units came to the queue last
    u32 end;            // of the queue: how many have come
#if MAX_CODEC >= 1
    Side sides[AHEAD];  // of unit i in place i % AHEAD
#endif
#if MAX_CODEC == 2
    KeyScales scales;  // of the unit at hand
#endif
    __device__ __forceinline__ Unit& unit(u32 idx) { return units[idx % QUEUE]; }
};

__device__ __forceinline__ int offset_in_block(const Unit& unit, int block_size) {
    return int(unit.entry >> 24 & 15) * block_size + (unit.position & (block_size - 1));
}

__device__ __forceinline__ const u8* keys_of(const Unit& unit, const Slot& slot, const Pool& pool) {
    return slot.keys + u64(unit.entry & 0xffffff) * pool.block_bytes +
           offset_in_block(unit, pool.block_size) * (2 * HEAD_DIM >> unit.codec());
}

// Puts this warp's units of an item in the queue, behind unit `end`; returns the queue's new end.
// Units go round the warps in order, whatever their codec; all warps have equally many turns, one at
// least, so the last may be empty.
__device__ __forceinline__ u32 queue_item(WarpState& state, u32 end, Slot& slot, const Pool& pool,
                                          int warp, int lane) {
    const int* record = slot.record;
    int start = record[RECORD_START], shift = pool.block_size == GRANULE ? 0 : 1;
    int stop = min(start + record[RECORD_SIZE], record[RECORD_END]), oldest = record[RECORD_OLDEST];
    int before = 0, codecs = 0;
#pragma unroll 1
    for (int granule = lane; start + GRANULE * (granule - lane) < stop; granule += 32) {
        Unit unit = {0, start + GRANULE * granule, nullptr};
        if (unit.position < stop) unit.entry = u32(record[RECORD_HEADER + (granule >> shift)]);
        int length = GRANULE << unit.codec();
        bool is_unit = unit.position < stop && (unit.position & (length - 1)) == 0 &&
                       unit.position + length > oldest;
        u32 units = __ballot_sync(FULL_MASK, is_unit);
        int idx = before + __popc(units & ((1u << lane) - 1));
        if (is_unit && idx % WARPS == warp) {
            unit.keys = keys_of(unit, slot, pool);
            state.unit(end + u32(idx) / WARPS) = unit;
        }
        before += __popc(units);
        int codec = is_unit ? unit.codec() : NATIVE;
        if (MAX_CODEC >= 1) codecs |= __any_sync(FULL_MASK, codec == INT8) << INT8;
        if (MAX_CODEC == 2) codecs |= __any_sync(FULL_MASK, codec == INT4) << INT4;
    }
    int turns = max(1, (before + WARPS - 1) / WARPS);
    __syncwarp();
    if (lane == 0) {
        Unit& last = state.unit(end + turns - 1);
        if ((turns - 1) * WARPS + warp >= before) last = {IS_EMPTY, 0, nullptr};
        last.entry |= IS_LAST;
    }
    if (thread_of_team() == 0) slot.codecs = codecs;
    return end + turns;
}

// Has the queue reach beyond unit `end`: the next item, or an empty unit where there is none.
__device__ __forceinline__ void extend_queue(WarpState& state, u32 end, Slot* slots,
                                             const int& num_items, const Pool& pool, int warp,
                                             int lane) {
    int turn = state.turn + 1;
    __syncwarp();
    if (item_of(turn) < num_items) {
        u32 new_end = queue_item(state, end, slots[turn & (SLOTS - 1)], pool, warp, lane);
        if (lane == 0) state.turn = turn, state.end = new_end;
    } else if (lane == 0) {
        state.unit(end) = {IS_EMPTY, 0, nullptr};
        state.end = end + 1;
    }
    __syncwarp();
}

template <bool IS_VALUES, int I>
__device__ __forceinline__ void copy_chunks(u8* to, const u8* from, int lane_place) {
    if constexpr (I < PIECE_BYTES / 512) {
        constexpr int place = place_of_chunk<IS_VALUES>(32 * I);
        cp_async16_at<16 * (place & ~7), 512 * I>(to + 16 * (lane_place ^ (place & 7)), from);
        copy_chunks<IS_VALUES, I + 1>(to, from, lane_place);
    }
}

// By a warp that has done with what was there before.
template <bool IS_VALUES>
__device__ __forceinline__ void copy_piece(uint4* to, const u8* from, int lane) {
    int lane_place = place_of_chunk<IS_VALUES>(lane);
    copy_chunks<IS_VALUES, 0>(reinterpret_cast<u8*>(to), from + 16 * lane, lane_place);
}

// Until all groups but the last are there, for all the warp's lanes. Keys and values take turns, a
// group each even where there is no unit, so that this is what is needed next.
__device__ __forceinline__ void wait_for_piece() {
    cp_async_wait<1>();
    __syncwarp();
}

// Starts to copy the keys and the scales of unit idx, the first of which there are none yet.
__device__ __forceinline__ void copy_keys(WarpState& state, u32 idx, Slot* slots,
                                          const int& num_items, const Pool& pool, int warp,
                                          int lane) {
    __syncwarp();
    if (idx == state.end) extend_queue(state, idx, slots, num_items, pool, warp, lane);
    const Unit unit = state.unit(idx);
    if (!unit.is_empty()) {
        copy_piece<false>(state.bytes.keys, unit.keys, lane);
#if MAX_CODEC >= 1
        const u8* piece = slots[state.turn & (SLOTS - 1)].side +
                          u64(unit.entry & 0xffffff) * pool.block_side_bytes;
        int offset = offset_in_block(unit, pool.block_size);
        if (unit.codec() == INT8) {
            copy_int8_side(state.sides[idx % AHEAD], piece, offset, 2 * pool.block_size, lane);
        }
#endif
#if MAX_CODEC == 2
        if (unit.codec() == INT4) {
            copy_int4_side(state.sides[idx % AHEAD], piece, offset, 4 * pool.block_size, lane);
        }
#endif
    }
    cp_async_commit();
}

__device__ __forceinline__ void copy_values(WarpState& state, u32 idx, const Pool& pool,
                                            int lane) {
    __syncwarp();
    const Unit& unit = state.unit(idx);
    if (!unit.is_empty()) copy_piece<true>(state.bytes.values, unit.keys + pool.values_step, lane);
    cp_async_commit();
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
#pragma unroll 1
    for (int part = thread; part < 2 * HEAD_DIM; part += THREADS) {
        int head = part / (HEAD_DIM / 4), channel = part % (HEAD_DIM / 4) * 4;
        uint2 pairs = make_uint2(0, 0);
        if (head < num_heads) pairs = reinterpret_cast<const uint2*>(raw.q)[part];
        query_part<NATIVE>(query, head, channel) = pairs;
    }
    if (thread < 8) query.scale[NATIVE][thread] = scale;
#if MAX_CODEC >= 1
    int lane = thread % 32, codecs = slot.codecs;
#pragma unroll 1
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
