// What paged_decode does with one unit of a block: score it, add its values.
//
// A unit is the same bytes in every codec: 16 positions of a native block, 32 of INT8, 64 of INT4, a
// multiple of its own length from position 0 on. Its rows come to shared memory as they are, keys and
// values each a run of 32 HEAD_DIM bytes, and from there to the A operand of an mma:
//   scores  S^T [position, head] = K q^T: lane (g, t) = (lane / 4, lane % 4) reads rows 2 g and
//           2 g + 1 of each 16 positions, of each the channels that the k index t names. Which
//           channels those are does not matter as long as q is stored alike: query_part.
//   values  O^T [channel, head] += V^T P^T: lane (g, t) reads positions 4 t .. 4 t + 3 of each 16,
//           of each the channels that row g names; prmt pairs the positions.
// Codes become halves exactly (ptx.cuh), so only q, the probabilities and q * scale are rounded.
#pragma once

constexpr int NATIVE = 0, INT8 = 1, INT4 = 2;  // Codec of kv/layout.py

// Values: channels in two halves (an INT4 byte has one of each), each in chunks of 8 lanes g with
// V_LANE neighbouring channels a lane; register pairs of these are rows g and g + 8 of an mma.
constexpr int V_LANE = HEAD_DIM % 128 == 0 ? 8 : HEAD_DIM % 64 == 0 ? 4 : 2;
constexpr int V_CHUNKS = HEAD_DIM / 2 / (8 * V_LANE);  // of one half
constexpr int NUM_M_TILES = HEAD_DIM / 16;
constexpr int NUM_K_STEPS = HEAD_DIM / 16;
constexpr int V_GROUP = HEAD_DIM == 96 ? 48 : 64;  // channels that share an INT4 value's scale
constexpr int NUM_V_GROUPS = HEAD_DIM / V_GROUP;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 96 || HEAD_DIM == 128 || HEAD_DIM == 256, "head dim");

template <int CODEC> struct Form {
    static constexpr int ROW_BYTES = 2 * HEAD_DIM >> CODEC;
    static constexpr int TILES = 1 << CODEC;  // of 16 positions
    // Keys: bytes a lane loads at once, so that four lanes t cover a run of the row. Few of INT4: the
    // scaled q of each byte takes registers.
    static constexpr int K_LOAD =
        ROW_BYTES % 64 == 0 && CODEC != INT4 ? 16 : ROW_BYTES % 32 == 0 ? 8 : 4;
    static constexpr int K_LOADS = ROW_BYTES / (4 * K_LOAD);  // of a row
    static constexpr int K_WORDS = K_LOAD / 4;
    static constexpr int V_LOAD = CODEC == NATIVE ? 2 * V_LANE : V_LANE;
    static constexpr int V_LOADS = CODEC == INT4 ? V_CHUNKS : 2 * V_CHUNKS;  // of a row
    static constexpr int V_WORDS = V_LOAD < 4 ? 1 : V_LOAD / 4;
};

constexpr int PIECE_BYTES = 32 * HEAD_DIM;  // a unit's keys, or its values
constexpr int NUM_FORMS = MAX_CODEC ? 3 : 1;  // of q
constexpr int MAX_TILES = 1 << MAX_CODEC;

// entry: of the table (kv/layout.py), its two highest bits used for flags.
constexpr u32 IS_EMPTY = 1u << 30, IS_LAST = 1u << 31;
struct __align__(16) Unit {
    u32 entry;
    int position;     // of its first row
    const u8* keys;   // in global memory
    __device__ __forceinline__ int codec() const {
        return MAX_CODEC ? int(entry >> 28 & 3) : NATIVE;
    }
    __device__ __forceinline__ bool is_empty() const { return entry & IS_EMPTY; }
    __device__ __forceinline__ int codec_or_empty() const { return is_empty() ? -1 : codec(); }
    __device__ __forceinline__ bool is_last() const { return entry & IS_LAST; }  // of the item
};

// Of a unit, as they are in the pool but for the order of their sixteens (keys_place, values_place).
// Lines of 128 bytes of shared memory: copies that begin inside of one take longer.
struct __align__(128) UnitBytes {
    uint4 keys[PIECE_BYTES / 16], values[PIECE_BYTES / 16];
};

// What a team shares for one item.
struct Query {
    uint2 parts[NUM_FORMS][NUM_K_STEPS][32];  // B operands, by lane
    float scale[NUM_FORMS][8];                // turns a sum into a log2 score, by head
};

// A unit's scales and zeros as they are in global memory: of INT8 the keys' scales, then the values';
// of INT4 the zeros, the values' scales, then super-scales and scales of all groups of the block.
constexpr int ZERO_CHUNKS = HEAD_DIM / 8, V_SCALE_CHUNKS = 8 * NUM_V_GROUPS;
constexpr int TAIL_CHUNKS = (4 + 2 * HEAD_DIM + 15) / 16;
constexpr int SIDE_CHUNKS =
    MAX_CODEC == 2 ? ZERO_CHUNKS + V_SCALE_CHUNKS + TAIL_CHUNKS : MAX_CODEC ? 8 : 0;
#if MAX_CODEC >= 1
struct Side {
    uint4 chunks[SIDE_CHUNKS];
    __device__ __forceinline__ const u32* zeros() const {
        return reinterpret_cast<const u32*>(chunks);
    }
    __device__ __forceinline__ const u32* v_scales() const {
        return reinterpret_cast<const u32*>(chunks + ZERO_CHUNKS);
    }
    __device__ __forceinline__ const u8* tail() const {
        return reinterpret_cast<const u8*>(chunks + ZERO_CHUNKS + V_SCALE_CHUNKS);
    }
};
#endif

// Sixteen bytes `chunk` of a piece stand at another place of it in shared memory, so that the rows
// that lanes read at the same time are in different banks. Linear in the bits of chunk; only the
// lowest three change.
__device__ __forceinline__ constexpr int keys_place(int chunk) {
    return chunk ^ ((chunk >> 3 ^ chunk >> 4 ^ chunk >> 5 ^ chunk >> 6) & 1) << 2 ^
           (chunk >> 4 & 1) << 1;
}
__device__ __forceinline__ constexpr int values_place(int chunk) {
    return chunk ^ ((chunk >> 4 ^ chunk >> 6 ^ chunk >> 8) & 3) << 1;
}
template <bool IS_VALUES> __device__ __forceinline__ constexpr int place_of_chunk(int chunk) {
    return IS_VALUES ? values_place(chunk) : keys_place(chunk);
}

// Where byte lane_byte + fixed of a piece is. The parts have no bits in common where HEAD_DIM is a
// power of two, so that only the low bits of what is fixed meet those of the lane.
template <bool IS_VALUES> __device__ __forceinline__ int byte_place(int lane_byte, int fixed) {
    if constexpr ((HEAD_DIM & (HEAD_DIM - 1)) == 0) {
        int place = place_of_chunk<IS_VALUES>(fixed / 16);
        int lane_place = place_of_chunk<IS_VALUES>(lane_byte / 16) ^ (place & 7);
        return 16 * lane_place + lane_byte % 16 + 16 * (place & ~7) + fixed % 16;
    } else {
        int byte = lane_byte + fixed;
        return 16 * place_of_chunk<IS_VALUES>(byte / 16) + byte % 16;
    }
}

// NUM_BYTES of a row in shared memory.
template <int NUM_BYTES> __device__ __forceinline__ void load_words(u32* words, const u8* from) {
    if constexpr (NUM_BYTES == 16) {
        uint4 v = load16(from);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (NUM_BYTES == 8) {
        uint2 v = *reinterpret_cast<const uint2*>(from);
        words[0] = v.x, words[1] = v.y;
    } else if constexpr (NUM_BYTES == 4) {
        words[0] = *reinterpret_cast<const u32*>(from);
    } else {
        words[0] = *reinterpret_cast<const u16*>(from);
    }
}

// ---- loads --------------------------------------------------------------------------------------

// This lane's part of load `load` of the keys of positions 2 g and 2 g + 1 of tile `tile`.
template <int CODEC>
__device__ __forceinline__ void load_keys(u32 (&even)[Form<CODEC>::K_WORDS],
                                          u32 (&odd)[Form<CODEC>::K_WORDS], const u8* keys,
                                          int tile, int load, int lane) {
    typedef Form<CODEC> F;
    int lane_byte = lane / 4 * 2 * F::ROW_BYTES + lane % 4 * F::K_LOAD;
    int fixed = tile * 16 * F::ROW_BYTES + load * 4 * F::K_LOAD;
    load_words<F::K_LOAD>(even, keys + byte_place<false>(lane_byte, fixed));
    load_words<F::K_LOAD>(odd, keys + byte_place<false>(lane_byte, fixed + F::ROW_BYTES));
}

// This lane's part of load `load` of the values of positions 4 t .. 4 t + 3 of tile `tile`.
template <int CODEC>
__device__ __forceinline__ void load_values(u32 (&rows)[4][Form<CODEC>::V_WORDS], const u8* values,
                                            int tile, int load, int lane) {
    typedef Form<CODEC> F;
    int lane_byte = lane % 4 * 4 * F::ROW_BYTES + lane / 4 * F::V_LOAD;
    int fixed = tile * 16 * F::ROW_BYTES + load * 8 * F::V_LOAD;
#pragma unroll
    for (int row = 0; row < 4; ++row) {
        load_words<F::V_LOAD>(
            rows[row], values + byte_place<true>(lane_byte, fixed + row * F::ROW_BYTES));
    }
}

#if MAX_CODEC >= 1
// piece: the block's side piece of this layer and kv head; offset: of the unit in the block.
__device__ __forceinline__ void copy_int8_side(Side& to, const u8* piece, int offset,
                                               int block_tokens, int lane) {
    int from = 2 * offset + lane / 4 * 2 * block_tokens + lane % 4 * 16;
    if (lane < 8) cp_async16(&to.chunks[lane], piece + from);
}
#endif

#if MAX_CODEC == 2
// The part of 64 positions from `offset` on; block_tokens: of the block, 64 or 128.
__device__ __forceinline__ void copy_int4_side(Side& to, const u8* piece, int offset,
                                               int block_tokens, int lane) {
    int groups = block_tokens / 64, group = u32(offset) / 64;
    int v_scales = groups * 2 * HEAD_DIM, tail = v_scales + block_tokens * NUM_V_GROUPS * 2;
    constexpr int FIRST = ZERO_CHUNKS + V_SCALE_CHUNKS;
    for (int i = lane; i < FIRST; i += 32) {
        int from = i < ZERO_CHUNKS ? group * 2 * HEAD_DIM
                                   : v_scales + (group * V_SCALE_CHUNKS - ZERO_CHUNKS) * 16;
        cp_async16(&to.chunks[i], piece + (from + 16 * i));
    }
    int tail_bytes = groups * (2 + HEAD_DIM);
#pragma unroll
    for (int i = lane; i < TAIL_CHUNKS; i += 32) {
        if (16 * i < tail_bytes) cp_async16(&to.chunks[FIRST + i], piece + (tail + 16 * i));
    }
}

// The scales of a unit's keys as score_int4 takes them.
struct KeyScales {
    u32 pairs[HEAD_DIM / 2];  // halves: by four channels the first and the third, then the others
    float super;              // what they are multiples of
};

__device__ __forceinline__ void spread_scales(KeyScales& to, const Side& side, int offset,
                                              int block_tokens, int lane) {
    int groups = block_tokens / 64, group = offset / 64;
    const u8* tail = side.tail();
    const u16* scales = reinterpret_cast<const u16*>(tail + 2 * groups + group * HEAD_DIM);
    for (int i = lane; i < HEAD_DIM / 4; i += 32) {
        bool is_low = i < HEAD_DIM / 8;
        u32 four = prmt<0x5410>(scales[2 * i], scales[2 * i + 1]);
        u32 factor = is_low ? 0x4c004c00u : 0x3c003c00u, bias = is_low ? 0xf400f400u : 0xe400e400u;
        u32 first = lop3<AND_OR>(four, 0x00ff00ffu, 0x64006400u);  // 1024 + u
        u32 second = lop3<AND_OR>(four >> 8, 0x00ff00ffu, 0x64006400u);
        to.pairs[2 * i] = fma2<half_t>(first, factor, bias);
        to.pairs[2 * i + 1] = fma2<half_t>(second, factor, bias);
    }
    if (lane == 0) to.super = to_float(reinterpret_cast<const half_t*>(tail)[group]);
    __syncwarp();
}
#endif

// ---- scores -------------------------------------------------------------------------------------

// Where four neighbouring channels of q stand among the B operands of a codec.
template <int CODEC>
__device__ __forceinline__ uint2& query_part(Query& query, int head, int channel) {
    typedef Form<CODEC> F;
    int is_high = CODEC == INT4 && channel >= HEAD_DIM / 2;
    int byte = CODEC == NATIVE ? 2 * channel : channel - is_high * (HEAD_DIM / 2);
    constexpr int STEP = CODEC == NATIVE ? 8 : 4;  // bytes of a lane in one k step
    int step = byte / (4 * F::K_LOAD) * (F::K_LOAD / STEP) + byte % F::K_LOAD / STEP;
    if (CODEC == INT4) step = 2 * step + is_high;
    return query.parts[CODEC][step][head * 4 + byte / F::K_LOAD % 4];
}

// x: log2 scores by tile; [0], [1]: position 2 g, heads 2 t and 2 t + 1; [2], [3]: position 2 g + 1.
__device__ __forceinline__ void score_native(float (&x)[MAX_TILES][4],
                                             const u8* keys, const Query& query, int lane) {
    typedef Form<NATIVE> F;
    constexpr int STEPS = F::K_WORDS / 2;  // of a load
    float sums[2][4] = {};  // two chains
#pragma unroll
    for (int load = 0; load < F::K_LOADS; ++load) {
        u32 even[F::K_WORDS], odd[F::K_WORDS];
        load_keys<NATIVE>(even, odd, keys, 0, load, lane);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint2 q = query.parts[NATIVE][load * STEPS + step][lane];
            u32 a[4] = {even[2 * step], odd[2 * step], even[2 * step + 1], odd[2 * step + 1]};
            u32 b[2] = {q.x, q.y};
            mma_16x8x16<scalar_t>(sums[step % 2], a, b);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[0][i] = (sums[0][i] + sums[1][i]) * query.scale[NATIVE][lane % 4 * 2 + i % 2];
    }
}

#if MAX_CODEC >= 1
__device__ __forceinline__ void score_int8(float (&x)[MAX_TILES][4], const u8* keys,
                                           const Query& query, const Side& side, int lane) {
    typedef Form<INT8> F;
    float sums[2][4] = {};
#pragma unroll
    for (int load = 0; load < F::K_LOADS; ++load) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            u32 even[F::K_WORDS], odd[F::K_WORDS];
            load_keys<INT8>(even, odd, keys, tile, load, lane);
#pragma unroll
            for (int word = 0; word < F::K_WORDS; ++word) {
                uint2 q = query.parts[INT8][load * F::K_WORDS + word][lane];
                u32 b[2] = {q.x, q.y}, top[2], low[2];
                int8_to_half(even[word], top);
                int8_to_half(odd[word], low);
                u32 a[4] = {top[0], low[0], top[1], low[1]};
                mma_16x8x16<half_t>(sums[tile], a, b);
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        float2 scales = unpack2<half_t>(side.zeros()[8 * tile + lane / 4]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float scale = query.scale[INT8][lane % 4 * 2 + i % 2];
            x[tile][i] = sums[tile][i] * (scale * (i < 2 ? scales.x : scales.y));
        }
    }
}
#endif

#if MAX_CODEC == 2
// The B operands of one word of a lane's INT4 keys: q of the low and of the high codes, times their
// scales; q . zeros, where the zeros are a tile of 16 equal rows. rests += what rounding the products
// has left.
__device__ __forceinline__ void scale_query(u32 (&b)[2][2], u32 (&rests)[2],
                                            float (&zero_sums)[4], const Query& query,
                                            const u32* zeros,
                                            const u32 (&scales)[HEAD_DIM / 2], int word, int lane) {
    typedef Form<INT4> F;
    int byte = word / F::K_WORDS * 4 * F::K_LOAD + lane % 4 * F::K_LOAD + word % F::K_WORDS * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int pair = (byte + half * (HEAD_DIM / 2)) / 2;
        uint2 q = query.parts[INT4][2 * word + half][lane];
        u32 plain[2] = {q.x, q.y};
        u32 first = prmt<0x5410>(zeros[pair], zeros[pair + 1]);
        u32 second = prmt<0x7632>(zeros[pair], zeros[pair + 1]);
        u32 a[4] = {first, first, second, second};
        mma_16x8x16<half_t>(zero_sums, a, plain);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            b[half][i] = mul2<half_t>(plain[i], scales[pair + i]);
            u32 rest = fma2<half_t>(plain[i], scales[pair + i], neg2(b[half][i]));
            rests[i] = fma2<half_t>(rest, half ? 0x3c003c00u : 0x2c002c00u, rests[i]);  // 1, 1/16
        }
    }
}

// q . k = q . zeros + super * (q * scales) . codes. The codes' bits are taken for halves as they
// are: those of the low four are 2^-24 of what they mean, those of the high four 2^-20, and the low
// channels' scales are 16 times theirs. Rounding (q * scales) costs a key the more the larger its
// codes are, so what it has left is added as for a key of codes 8 (0x80, as those of the high four).
__device__ __forceinline__ void score_int4(float (&x)[MAX_TILES][4], const u8* keys,
                                           const Query& query, const u32* zeros,
                                           const KeyScales& scales, int lane) {
    typedef Form<INT4> F;
    float sums[4][4] = {}, zero_sums[4] = {}, rest_sums[4] = {};
    u32 rests[2] = {};
#pragma unroll
    for (int load = 0; load < F::K_LOADS; ++load) {
        u32 b[F::K_WORDS][2][2];
#pragma unroll
        for (int word = 0; word < F::K_WORDS; ++word) {
            scale_query(b[word], rests, zero_sums, query, zeros, scales.pairs,
                        load * F::K_WORDS + word, lane);
        }
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
            u32 even[F::K_WORDS], odd[F::K_WORDS];
            load_keys<INT4>(even, odd, keys, tile, load, lane);
#pragma unroll
            for (int word = 0; word < F::K_WORDS; ++word) {
                u32 top = even[word], next = odd[word];
                u32 a_low[4] = {top & 0x000f000fu, next & 0x000f000fu, top >> 8 & 0x000f000fu,
                                next >> 8 & 0x000f000fu};
                u32 a_high[4] = {top & 0x00f000f0u, next & 0x00f000f0u, top >> 8 & 0x00f000f0u,
                                 next >> 8 & 0x00f000f0u};
                mma_16x8x16<half_t>(sums[tile], a_low, b[word][0]);
                mma_16x8x16<half_t>(sums[tile], a_high, b[word][1]);
            }
        }
    }
    u32 middle[4] = {0x00800080u, 0x00800080u, 0x00800080u, 0x00800080u};
    mma_16x8x16<half_t>(rest_sums, middle, rests);
    float super_scale = 1048576.0f * scales.super;  // 2^20
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // the same for all positions
        float scale = query.scale[INT4][lane % 4 * 2 + i % 2], factor = super_scale * scale;
        float same = fmaf(rest_sums[i % 2], factor, zero_sums[i % 2] * scale);
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) x[tile][i] = fmaf(sums[tile][i], factor, same);
    }
}
#endif
