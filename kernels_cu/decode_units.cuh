// What paged_decode does with one unit of a block: load it, score it, add its values.
//
// A unit is what 32 lanes hold at a time, the same bytes in every codec: 16 positions of a native
// block, 32 of INT8, 64 of INT4, a multiple of its own length from position 0 on. Everything goes
// from global memory straight to the registers of an mma's A operand:
//   scores  S^T [position, head] = K q^T: lane (g, t) = (lane / 4, lane % 4) loads rows 2 g and
//           2 g + 1 of each 16 positions, of each the channels that the k index t names. Which
//           channels those are does not matter as long as q is stored alike: store_query.
//   values  O^T [channel, head] += V^T P^T: lane (g, t) loads positions 4 t .. 4 t + 3 of each 16,
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
    // Keys: bytes a lane loads at once, so that four lanes t cover a run of the row.
    static constexpr int K_LOAD = ROW_BYTES % 64 == 0 ? 16 : ROW_BYTES % 32 == 0 ? 8 : 4;
    static constexpr int K_LOADS = ROW_BYTES / (4 * K_LOAD);  // of a row
    static constexpr int K_WORDS = K_LOAD / 4;
    static constexpr int V_LOAD = CODEC == NATIVE ? 2 * V_LANE : V_LANE;
    static constexpr int V_LOADS = CODEC == INT4 ? V_CHUNKS : 2 * V_CHUNKS;  // of a row
    static constexpr int V_WORDS = V_LOAD < 4 ? 1 : V_LOAD / 4;
};

constexpr int KEY_WORDS = HEAD_DIM / 4;  // registers of a lane for a unit's keys
constexpr int VALUE_WORDS = V_LANE == 2 && MAX_CODEC ? HEAD_DIM / 2 : HEAD_DIM / 4;
constexpr int NUM_FORMS = MAX_CODEC ? 3 : 1;  // of q
constexpr int MAX_TILES = 1 << MAX_CODEC;
constexpr int ZERO_WORDS = (HEAD_DIM / 32 + 1) / 2;  // of a lane's share of 64 tokens' key zeros
constexpr int SIDE_WORDS = MAX_CODEC == INT4 ? 2 * ZERO_WORDS + NUM_V_GROUPS + 1 : 4;

struct Unit {
    u32 entry;     // of the table, see kv/layout.py
    int position;  // of its first row; -1: there is no unit
    __device__ __forceinline__ int codec() const { return MAX_CODEC ? int(entry >> 28) : NATIVE; }
};

// What the whole block of threads shares for one item.
struct Query {
    uint2 parts[NUM_FORMS][NUM_K_STEPS][32];  // B operands, by lane
    float scale[NUM_FORMS][8];                // turns a sum into a log2 score, by head
};

// What one warp keeps of an INT4 unit's side piece.
struct Int4Staged {
    u32 zeros[HEAD_DIM / 2];               // halves by channel
    u32 scales[HEAD_DIM / 2];              // halves 1 .. 255 by channel
    u32 v_scales[64 * NUM_V_GROUPS / 2];   // halves [64 tokens, V groups]
};

template <int NUM_BYTES> __device__ __forceinline__ void load_words(u32* words, const u8* from) {
    if constexpr (NUM_BYTES == 16) {
        uint4 v = load16_stream(from);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (NUM_BYTES == 8) {
        uint2 v = load8_stream(from);
        words[0] = v.x, words[1] = v.y;
    } else if constexpr (NUM_BYTES == 4) {
        words[0] = *reinterpret_cast<const u32*>(from);
    } else {
        words[0] = *reinterpret_cast<const u16*>(from);
    }
}

// ---- loads --------------------------------------------------------------------------------------

template <int CODEC>
__device__ __forceinline__ void load_keys(u32 (&keys)[KEY_WORDS], const u8* part, int lane) {
    typedef Form<CODEC> F;
    const u8* from = part + lane / 4 * 2 * F::ROW_BYTES + lane % 4 * F::K_LOAD;
#pragma unroll
    for (int row = 0; row < 2 * F::TILES; ++row) {
#pragma unroll
        for (int i = 0; i < F::K_LOADS; ++i) {
            int offset = (row / 2 * 16 + row % 2) * F::ROW_BYTES + i * 4 * F::K_LOAD;
            load_words<F::K_LOAD>(keys + (row * F::K_LOADS + i) * F::K_WORDS, from + offset);
        }
    }
}

template <int CODEC, bool IS_WHOLE>
__device__ __forceinline__ void load_value_rows(u32 (&values)[VALUE_WORDS], const u8* part,
                                                int lane, int first, int last) {
    typedef Form<CODEC> F;
    const u8* from = part + lane % 4 * 4 * F::ROW_BYTES + lane / 4 * F::V_LOAD;
#pragma unroll
    for (int row = 0; row < 4 * F::TILES; ++row) {
        int token = row / 4 * 16 + lane % 4 * 4 + row % 4;
#pragma unroll
        for (int i = 0; i < F::V_LOADS; ++i) {
            u32* words = values + (row * F::V_LOADS + i) * F::V_WORDS;
            int offset = (row / 4 * 16 + row % 4) * F::ROW_BYTES + i * 8 * F::V_LOAD;
            if (IS_WHOLE || (token >= first && token < last)) {
                load_words<F::V_LOAD>(words, from + offset);
            } else {
#pragma unroll
                for (int word = 0; word < F::V_WORDS; ++word) words[word] = 0;
            }
        }
    }
}

// Native rows outside first .. last - 1 (of the unit) come as zeros: their bytes may be anything,
// and even 0 * NaN is NaN. Codes have no NaN.
template <int CODEC>
__device__ __forceinline__ void load_values(u32 (&values)[VALUE_WORDS], const u8* part, int lane,
                                            int first, int last) {
    if (CODEC != NATIVE || (first <= 0 && last >= GRANULE)) {
        load_value_rows<CODEC, true>(values, part, lane, first, last);
    } else {
        load_value_rows<CODEC, false>(values, part, lane, first, last);
    }
}

// This lane's scales of 32 INT8 positions: words 0, 1: keys 2 g and 2 g + 1 of each 16; 2, 3: values.
// piece: the block's side piece of this layer and kv head; offset: of the unit in the block.
__device__ __forceinline__ void load_int8_side(u32 (&side)[SIDE_WORDS], const u8* piece, int offset,
                                               int block_tokens, int lane) {
    const u8* from = piece + 2 * (offset + lane / 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        load_words<4>(side + i, from + (i / 2) * 2 * block_tokens + (i % 2) * 32);
    }
}

#if MAX_CODEC == 2
constexpr int SHARE = HEAD_DIM / 32;  // channels of one lane when 32 share them

// This lane's share of the side piece of 64 INT4 positions: zeros, scales (a byte in each half),
// the value scales of positions 2 lane and 2 lane + 1, the super-scale. block_tokens: of the block.
__device__ __forceinline__ void load_int4_side(u32 (&side)[SIDE_WORDS], const u8* piece, int offset,
                                               int block_tokens, int lane) {
    int groups = block_tokens / 64, group = offset / 64;
    const u8* zeros = piece + group * 2 * HEAD_DIM + lane * 2 * SHARE;
    const u8* v_scales = piece + groups * 2 * HEAD_DIM;
    const u8* supers = v_scales + block_tokens * NUM_V_GROUPS * 2;
    const u8* scales = supers + groups * 2 + group * HEAD_DIM + lane * SHARE;
    if constexpr (SHARE % 2 == 0) {
        load_words<2 * SHARE>(side, zeros);
#pragma unroll
        for (int i = 0; i < SHARE / 2; ++i) {
            u32 pair;
            load_words<2>(&pair, scales + 2 * i);
            side[ZERO_WORDS + i] = prmt<0x4140>(pair, 0u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2 * ZERO_WORDS; ++i) side[i] = 0;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            side[i / 2] |= u32(reinterpret_cast<const u16*>(zeros)[i]) << i % 2 * 16;
            side[ZERO_WORDS + i / 2] |= u32(scales[i]) << i % 2 * 16;
        }
    }
    load_words<4 * NUM_V_GROUPS>(side + 2 * ZERO_WORDS,
                                 v_scales + (group * 64 + lane * 2) * NUM_V_GROUPS * 2);
    load_words<2>(side + 2 * ZERO_WORDS + NUM_V_GROUPS, supers + group * 2);
}

// To where all lanes find it; returns the super-scale.
__device__ __forceinline__ float stage_int4_side(Int4Staged& staged, const u32 (&side)[SIDE_WORDS],
                                                 int lane) {
    __syncwarp();  // the last unit's is read
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
        u16* zeros = reinterpret_cast<u16*>(staged.zeros) + lane * SHARE;
        u16* scales = reinterpret_cast<u16*>(staged.scales) + lane * SHARE;
        u32 pair = fma2<half_t>(side[ZERO_WORDS + i / 2] | 0x64006400u, 0x3c003c00u, 0xe400e400u);
        if (SHARE % 2 == 0) {
            if (i % 2) continue;
            reinterpret_cast<u32*>(zeros)[i / 2] = side[i / 2];
            reinterpret_cast<u32*>(scales)[i / 2] = pair;
        } else {
            zeros[i] = u16(side[i / 2] >> i % 2 * 16);
            scales[i] = u16(pair >> i % 2 * 16);
        }
    }
#pragma unroll
    for (int i = 0; i < NUM_V_GROUPS; ++i) {
        staged.v_scales[lane * NUM_V_GROUPS + i] = side[2 * ZERO_WORDS + i];
    }
    __syncwarp();
    return to_float(half_t{u16(side[2 * ZERO_WORDS + NUM_V_GROUPS])});
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
                                             const u32 (&keys)[KEY_WORDS], const Query& query,
                                             int lane) {
    typedef Form<NATIVE> F;
    constexpr int ROW = F::K_LOADS * F::K_WORDS;
    float sums[4] = {};
#pragma unroll
    for (int step = 0; step < NUM_K_STEPS; ++step) {
        uint2 q = query.parts[NATIVE][step][lane];
        u32 a[4] = {keys[2 * step], keys[ROW + 2 * step], keys[2 * step + 1],
                    keys[ROW + 2 * step + 1]};
        u32 b[2] = {q.x, q.y};
        mma_16x8x16<scalar_t>(sums, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[0][i] = sums[i] * query.scale[NATIVE][lane % 4 * 2 + i % 2];
}

#if MAX_CODEC >= 1
__device__ __forceinline__ void score_int8(float (&x)[MAX_TILES][4], const u32 (&keys)[KEY_WORDS],
                                           const Query& query, const u32 (&side)[SIDE_WORDS],
                                           int lane) {
    typedef Form<INT8> F;
    constexpr int ROW = F::K_LOADS * F::K_WORDS;
    float sums[2][4] = {};
#pragma unroll
    for (int step = 0; step < NUM_K_STEPS; ++step) {
        uint2 q = query.parts[INT8][step][lane];
        u32 b[2] = {q.x, q.y};
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            u32 even[2], odd[2];
            int8_to_half(keys[2 * tile * ROW + step], even);
            int8_to_half(keys[(2 * tile + 1) * ROW + step], odd);
            u32 a[4] = {even[0], odd[0], even[1], odd[1]};
            mma_16x8x16<half_t>(sums[tile], a, b);
        }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        float2 scales = unpack2<half_t>(side[tile]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float scale = query.scale[INT8][lane % 4 * 2 + i % 2];
            x[tile][i] = sums[tile][i] * (scale * (i < 2 ? scales.x : scales.y));
        }
    }
}
#endif

#if MAX_CODEC == 2
// q . k = q . zeros + super * (q * scales) . codes; the zeros are a tile of 16 equal rows.
__device__ __forceinline__ void score_int4(float (&x)[MAX_TILES][4], const u32 (&keys)[KEY_WORDS],
                                           const Query& query, const Int4Staged& staged,
                                           float super_scale, int lane) {
    typedef Form<INT4> F;
    constexpr int ROW = F::K_LOADS * F::K_WORDS;
    float sums[4][4] = {}, zero_sums[4] = {};
#pragma unroll
    for (int word = 0; word < ROW; ++word) {
        u32 b[2][2];  // low and high codes' q, times their scales
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int channel = word / F::K_WORDS * 4 * F::K_LOAD + lane % 4 * F::K_LOAD +
                          word % F::K_WORDS * 4 + half * (HEAD_DIM / 2);
            uint2 q = query.parts[INT4][2 * word + half][lane];
            u32 plain[2] = {q.x, q.y};
            u32 a[4] = {staged.zeros[channel / 2], staged.zeros[channel / 2],
                        staged.zeros[channel / 2 + 1], staged.zeros[channel / 2 + 1]};
            mma_16x8x16<half_t>(zero_sums, a, plain);
            b[half][0] = mul2<half_t>(q.x, staged.scales[channel / 2]);
            b[half][1] = mul2<half_t>(q.y, staged.scales[channel / 2 + 1]);
        }
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
            u32 low[2][2], high[2][2];
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                int4_to_half(keys[(2 * tile + row) * ROW + word], low[row], high[row]);
            }
            u32 a_low[4] = {low[0][0], low[1][0], low[0][1], low[1][1]};
            u32 a_high[4] = {high[0][0], high[1][0], high[0][1], high[1][1]};
            mma_16x8x16<half_t>(sums[tile], a_low, b[0]);
            mma_16x8x16<half_t>(sums[tile], a_high, b[1]);
        }
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float scale = query.scale[INT4][lane % 4 * 2 + i % 2];
            x[tile][i] = (sums[tile][i] * super_scale + zero_sums[i]) * scale;
        }
    }
}
#endif

// ---- values -------------------------------------------------------------------------------------

// The accumulator that holds channels of chunk `chunk` of a half, register pair `pair` of the lane.
__device__ __forceinline__ constexpr int m_tile(int half, int chunk, int pair) {
    return (half * V_CHUNKS + chunk) * (V_LANE / 2) + pair;
}

// A 16 x 8 tile of weights [position, head], as scores lie, to the B operand of P^T.
template <class T>
__device__ __forceinline__ void weights_operand(u32 (&b)[2], const float (&p)[4]) {
    b[0] = movmatrix_trans(pack2<T>(p[0], p[1]));
    b[1] = movmatrix_trans(pack2<T>(p[2], p[3]));
}

// sums += values * p over 16 positions. bf16 weights are two bf16 each, so that 16 bits are kept.
__device__ __forceinline__ void add_native(float (&sums)[NUM_M_TILES][4],
                                           const u32 (&values)[VALUE_WORDS], const float (&p)[4]) {
    typedef Form<NATIVE> F;
    constexpr int ROW = F::V_LOADS * F::V_WORDS;
    u32 b[2], rest[2];
    weights_operand<scalar_t>(b, p);
    if (SCALAR_BF16) {
        float low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) low[i] = p[i] - to_float(from_float<scalar_t>(p[i]));
        weights_operand<scalar_t>(rest, low);
    }
#pragma unroll
    for (int tile = 0; tile < NUM_M_TILES; ++tile) {  // words of a row stand in the tiles' order
        const u32 *v0 = values + tile, *v1 = v0 + ROW, *v2 = v1 + ROW, *v3 = v2 + ROW;
        u32 a[4] = {prmt<0x5410>(*v0, *v2), prmt<0x7632>(*v0, *v2), prmt<0x5410>(*v1, *v3),
                    prmt<0x7632>(*v1, *v3)};
        mma_16x8x16<scalar_t>(sums[tile], a, b);
        if (SCALAR_BF16) mma_16x8x16<scalar_t>(sums[tile], a, rest);
    }
}

#if MAX_CODEC >= 1
// The same for tile `tile` of an INT8 unit; p with the values' scales in it.
__device__ __forceinline__ void add_int8(float (&sums)[NUM_M_TILES][4],
                                         const u32 (&values)[VALUE_WORDS], const float (&p)[4],
                                         int tile) {
    typedef Form<INT8> F;
    constexpr int ROW = F::V_LOADS * F::V_WORDS;
    u32 b[2];
    weights_operand<half_t>(b, p);
#pragma unroll
    for (int m = 0; m < NUM_M_TILES; ++m) {
        constexpr int PAIRS = V_LANE / 2;  // of a load
        const u32* v = values + tile * 4 * ROW + m / PAIRS * F::V_WORDS + m % PAIRS / 2;
        u32 even[2], odd[2];
        if (m % PAIRS % 2 == 0) {
            int8_to_half(prmt<0x5140>(v[0], v[2 * ROW]), even);
            int8_to_half(prmt<0x5140>(v[ROW], v[3 * ROW]), odd);
        } else {
            int8_to_half(prmt<0x7362>(v[0], v[2 * ROW]), even);
            int8_to_half(prmt<0x7362>(v[ROW], v[3 * ROW]), odd);
        }
        u32 a[4] = {even[0], even[1], odd[0], odd[1]};
        mma_16x8x16<half_t>(sums[m], a, b);
    }
}
#endif

#if MAX_CODEC == 2
// The same for tile `tile` of an INT4 unit; scales: of positions 2 g and 2 g + 1, by value group.
__device__ __forceinline__ void add_int4(float (&sums)[NUM_M_TILES][4],
                                         const u32 (&values)[VALUE_WORDS], const float (&p)[4],
                                         const float (&scales)[2 * NUM_V_GROUPS], int tile) {
    typedef Form<INT4> F;
    constexpr int ROW = F::V_LOADS * F::V_WORDS;
    u32 b[NUM_V_GROUPS][2];
#pragma unroll
    for (int group = 0; group < NUM_V_GROUPS; ++group) {
        float even = scales[group], odd = scales[NUM_V_GROUPS + group];
        float weights[4] = {p[0] * even, p[1] * even, p[2] * odd, p[3] * odd};
        weights_operand<half_t>(b[group], weights);
    }
#pragma unroll
    for (int chunk = 0; chunk < V_CHUNKS; ++chunk) {
#pragma unroll
        for (int pair = 0; pair < V_LANE / 2; ++pair) {
            const u32* v = values + tile * 4 * ROW + chunk * F::V_WORDS + pair / 2;
            u32 low[2][2], high[2][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 x = v[i * ROW], y = v[(2 + i) * ROW];
                int4_to_centred_half(pair % 2 ? prmt<0x7632>(x, y) : prmt<0x5410>(x, y), low[i],
                                     high[i]);
            }
            u32 a_low[4] = {low[0][0], low[0][1], low[1][0], low[1][1]};
            u32 a_high[4] = {high[0][0], high[0][1], high[1][0], high[1][1]};
            constexpr int HALF = HEAD_DIM / 2, CHUNK = 8 * V_LANE;
            mma_16x8x16<half_t>(sums[m_tile(0, chunk, pair)], a_low, b[chunk * CHUNK / V_GROUP]);
            mma_16x8x16<half_t>(sums[m_tile(1, chunk, pair)], a_high,
                                b[(HALF + chunk * CHUNK) / V_GROUP]);
        }
    }
}
#endif
