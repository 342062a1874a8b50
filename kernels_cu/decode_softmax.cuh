// The running softmax of one warp of paged_decode over the units it takes.
//
// p = 2^(x - top), where top is the running maximum of the log2 scores x, each plus the exponent of
// its value's scale: p * scale, rounded to a half, is then at most 1 whatever the scales, and no
// weight that counts becomes a subnormal.
#pragma once

constexpr float LEAST = -1e30f;                        // the maximum of nothing
constexpr int MIN_EXPONENT = -24, MAX_EXPONENT = 16;  // of a half: for scales that are 0, or NaN

// Columns: heads 2 t and 2 t + 1.
struct Softmax {
    float sums[NUM_M_TILES][4];  // O^T, in units of 2^top
    float top[2], weight[2];     // weight: this lane's positions only
};

// The least integer e with x < 2^e, for scales of values.
__device__ __forceinline__ float exponent_above(float x) {
    int exponent = int(__float_as_uint(x) >> 23 & 255) - 126;
    return float(min(max(exponent, MIN_EXPONENT), MAX_EXPONENT));
}

// Scores of positions outside oldest .. end - 1 become -infinity.
template <int TILES>
__device__ __forceinline__ void mask_scores(float (&x)[MAX_TILES][4], int position, int oldest,
                                            int end, int lane) {
    if (position >= oldest && position + GRANULE * TILES <= end) return;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int here = position + GRANULE * tile + lane / 4 * 2 + i / 2;
            if (here < oldest || here >= end) x[tile][i] = -INFINITY;
        }
    }
}

// Raise the maxima to cover a unit's scores (with their values' exponents) and rescale the sums.
__device__ __forceinline__ void raise_tops(Softmax& softmax, float (&tops)[2]) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            tops[i] = fmaxf(tops[i], __shfl_xor_sync(FULL_MASK, tops[i], step));
        }
    }
    if (!__any_sync(FULL_MASK, tops[0] > softmax.top[0] || tops[1] > softmax.top[1])) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float top = fmaxf(softmax.top[i], tops[i]);
        float factor = exp2_approx(softmax.top[i] - top);
        softmax.top[i] = top;
        softmax.weight[i] *= factor;
#pragma unroll
        for (int tile = 0; tile < NUM_M_TILES; ++tile) {
            softmax.sums[tile][i] *= factor;
            softmax.sums[tile][2 + i] *= factor;
        }
    }
}

// p of one tile's scores, in place; counted in the weights.
__device__ __forceinline__ void weigh(Softmax& softmax, float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] = exp2_approx(x[i] - softmax.top[i % 2]);
        softmax.weight[i % 2] += x[i];
    }
}

// p * scale, 0 where p is: a value that is not seen may have any scale.
__device__ __forceinline__ float scaled(float p, float scale) { return p == 0.0f ? 0.0f : p * scale; }

// A softmax step over a unit's log2 scores x, and its values.
__device__ __forceinline__ void attend_native(Softmax& softmax, float (&x)[MAX_TILES][4],
                                              const u8* values, int position,
                                              const int* record, int lane) {
    mask_scores<1>(x, position, record[RECORD_OLDEST], record[RECORD_END], lane);
    float tops[2] = {fmaxf(x[0][0], x[0][2]), fmaxf(x[0][1], x[0][3])};
    raise_tops(softmax, tops);
    weigh(softmax, x[0]);
    add_native(softmax.sums, values, x[0], record[RECORD_OLDEST] - position,
               record[RECORD_END] - position, lane);
}

#if MAX_CODEC >= 1
__device__ __forceinline__ void attend_int8(Softmax& softmax, float (&x)[MAX_TILES][4],
                                            const u8* values,
                                            const Side& side, int position,
                                            const int* record, int lane) {
    u32 scales[2] = {side.zeros()[16 + lane / 4], side.zeros()[24 + lane / 4]};
    mask_scores<2>(x, position, record[RECORD_OLDEST], record[RECORD_END], lane);
    float tops[2] = {LEAST, LEAST};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float2 pair = unpack2<half_t>(scales[i / 4]);
        float here = x[i / 4][i % 4] + exponent_above(i % 4 < 2 ? pair.x : pair.y);
        tops[i % 2] = fmaxf(tops[i % 2], here);
    }
    raise_tops(softmax, tops);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        weigh(softmax, x[tile]);
        float2 pair = unpack2<half_t>(scales[tile]);
        float weights[4] = {scaled(x[tile][0], pair.x), scaled(x[tile][1], pair.x),
                            scaled(x[tile][2], pair.y), scaled(x[tile][3], pair.y)};
        add_int8(softmax.sums, values, weights, tile, lane);
    }
}
#endif

#if MAX_CODEC == 2
// The value scales of positions 2 g and 2 g + 1 of a tile, by value group.
__device__ __forceinline__ void read_v_scales(float (&scales)[2 * NUM_V_GROUPS],
                                              const u32* v_scales, int tile,
                                              int lane) {
    int first = (GRANULE * tile + lane / 4 * 2) * NUM_V_GROUPS / 2;
#pragma unroll
    for (int i = 0; i < NUM_V_GROUPS; ++i) {
        float2 pair = unpack2<half_t>(v_scales[first + i]);
        scales[2 * i] = pair.x;
        scales[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ void attend_int4(Softmax& softmax, float (&x)[MAX_TILES][4],
                                            const u8* values,
                                            const u32* v_scales, int position,
                                            const int* record, int lane) {
    mask_scores<4>(x, position, record[RECORD_OLDEST], record[RECORD_END], lane);
    float tops[2] = {LEAST, LEAST};
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        float scales[2 * NUM_V_GROUPS];
        read_v_scales(scales, v_scales, tile, lane);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float most = scales[row * NUM_V_GROUPS];
#pragma unroll
            for (int i = 1; i < NUM_V_GROUPS; ++i) {
                most = fmaxf(most, scales[row * NUM_V_GROUPS + i]);
            }
            float exponent = exponent_above(most);
            tops[0] = fmaxf(tops[0], x[tile][2 * row] + exponent);
            tops[1] = fmaxf(tops[1], x[tile][2 * row + 1] + exponent);
        }
    }
    raise_tops(softmax, tops);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        float scales[2 * NUM_V_GROUPS];
        read_v_scales(scales, v_scales, tile, lane);
        weigh(softmax, x[tile]);
        add_int4(softmax.sums, values, x[tile], scales, tile, lane);
    }
}
#endif
