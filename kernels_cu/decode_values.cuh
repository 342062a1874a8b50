// O^T [channel, head] += V^T P^T over 16 positions: the second half of what decode_units.cuh says.
#pragma once

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
// Rows outside first .. last - 1 count as zeros: their bytes may be anything, and even 0 * NaN is
// NaN. (Codes have no NaN.)
__device__ __forceinline__ void add_native(float (&sums)[NUM_M_TILES][4], const u8* values,
                                           const float (&p)[4], int first, int last, int lane) {
    typedef Form<NATIVE> F;
    u32 b[2], rest[2];
    weights_operand<scalar_t>(b, p);
    if (SCALAR_BF16) {
        float low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) low[i] = p[i] - to_float(from_float<scalar_t>(p[i]));
        weights_operand<scalar_t>(rest, low);
    }
    bool is_whole = first <= 0 && last >= 16;
#pragma unroll
    for (int load = 0; load < F::V_LOADS; ++load) {
        u32 v[4][F::V_WORDS];
        load_values<NATIVE>(v, values, 0, load, lane);
        if (!is_whole) {
#pragma unroll
            for (int row = 0; row < 4; ++row) {
                int token = lane % 4 * 4 + row;
                bool is_seen = token >= first && token < last;
#pragma unroll
                for (int word = 0; word < F::V_WORDS; ++word) v[row][word] &= is_seen ? ~0u : 0u;
            }
        }
#pragma unroll
        for (int word = 0; word < F::V_WORDS; ++word) {
            u32 a[4] = {prmt<0x5410>(v[0][word], v[2][word]), prmt<0x7632>(v[0][word], v[2][word]),
                        prmt<0x5410>(v[1][word], v[3][word]), prmt<0x7632>(v[1][word], v[3][word])};
            float(&tile_sums)[4] = sums[load * F::V_WORDS + word];
            mma_16x8x16<scalar_t>(tile_sums, a, b);
            if (SCALAR_BF16) mma_16x8x16<scalar_t>(tile_sums, a, rest);
        }
    }
}

#if MAX_CODEC >= 1
// The same for tile `tile` of an INT8 unit; p with the values' scales in it.
__device__ __forceinline__ void add_int8(float (&sums)[NUM_M_TILES][4], const u8* values,
                                         const float (&p)[4], int tile, int lane) {
    typedef Form<INT8> F;
    constexpr int PAIRS = V_LANE / 2;  // of a load
    u32 b[2];
    weights_operand<half_t>(b, p);
#pragma unroll
    for (int load = 0; load < F::V_LOADS; ++load) {
        u32 v[4][F::V_WORDS];
        load_values<INT8>(v, values, tile, load, lane);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            u32 even[2], odd[2];
            int word = pair / 2;
            if (pair % 2 == 0) {
                int8_to_half(prmt<0x5140>(v[0][word], v[2][word]), even);
                int8_to_half(prmt<0x5140>(v[1][word], v[3][word]), odd);
            } else {
                int8_to_half(prmt<0x7362>(v[0][word], v[2][word]), even);
                int8_to_half(prmt<0x7362>(v[1][word], v[3][word]), odd);
            }
            u32 a[4] = {even[0], even[1], odd[0], odd[1]};
            mma_16x8x16<half_t>(sums[load * PAIRS + pair], a, b);
        }
    }
}
#endif

#if MAX_CODEC == 2
// The same for tile `tile` of an INT4 unit; scales: of positions 2 g and 2 g + 1, by value group.
__device__ __forceinline__ void add_int4(float (&sums)[NUM_M_TILES][4], const u8* values,
                                         const float (&p)[4],
                                         const float (&scales)[2 * NUM_V_GROUPS], int tile,
                                         int lane) {
    typedef Form<INT4> F;
    constexpr int HALF = HEAD_DIM / 2, CHUNK = 8 * V_LANE;
    u32 b[NUM_V_GROUPS][2];
#pragma unroll
    for (int group = 0; group < NUM_V_GROUPS; ++group) {
        float even = scales[group], odd = scales[NUM_V_GROUPS + group];
        float weights[4] = {p[0] * even, p[1] * even, p[2] * odd, p[3] * odd};
        weights_operand<half_t>(b[group], weights);
    }
#pragma unroll
    for (int chunk = 0; chunk < V_CHUNKS; ++chunk) {
        u32 v[4][F::V_WORDS];
        load_values<INT4>(v, values, tile, chunk, lane);
#pragma unroll
        for (int pair = 0; pair < V_LANE / 2; ++pair) {
            u32 low[2][2], high[2][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 x = v[i][pair / 2], y = v[2 + i][pair / 2];
                int4_to_centred_half(pair % 2 ? prmt<0x7632>(x, y) : prmt<0x5410>(x, y), low[i],
                                     high[i]);
            }
            u32 a_low[4] = {low[0][0], low[0][1], low[1][0], low[1][1]};
            u32 a_high[4] = {high[0][0], high[0][1], high[1][0], high[1][1]};
            mma_16x8x16<half_t>(sums[m_tile(0, chunk, pair)], a_low, b[chunk * CHUNK / V_GROUP]);
            mma_16x8x16<half_t>(sums[m_tile(1, chunk, pair)], a_high,
                                b[(HALF + chunk * CHUNK) / V_GROUP]);
        }
    }
}
#endif
