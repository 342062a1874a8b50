// Adding up what warps, then splits, made of an item's heads: always in their order.
#pragma once

// Sets of sums of 8 heads, in units of 2^top; a set fills the place of a warp's values.
struct SumStats {
    float tops[WARPS][8], weights[WARPS][8];
};
struct SumSets {
    WarpState* states;
    SumStats* stats;
    // Two neighbouring channels; heads that lanes write together are in different banks.
    __device__ __forceinline__ float2& pair(int set, int head, int pair_idx) const {
        return reinterpret_cast<float2*>(states[set].bytes.values)
            [head * (HEAD_DIM / 2) + (pair_idx ^ (head / 2 & 3))];
    }
};

__device__ __forceinline__ float4 load_float4(const float* from) {
    uint4 v = load16(from);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                       __uint_as_float(v.w));
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 x, float factor) {
    sum.x += x.x * factor, sum.y += x.y * factor, sum.z += x.z * factor, sum.w += x.w * factor;
}

// A warp's sums to shared memory; a lane's channels are neighbours there.
__device__ __forceinline__ void store_sums(const SumSets& shared, Softmax& softmax, int num_heads,
                                           int warp, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            softmax.weight[i] += __shfl_xor_sync(FULL_MASK, softmax.weight[i], step);
        }
        int head = lane % 4 * 2 + i;
        if (lane < 4) {
            shared.stats->tops[warp][head] = softmax.top[i];
            shared.stats->weights[warp][head] = softmax.weight[i];
        }
        if (head >= num_heads) continue;
#pragma unroll
        for (int tile = 0; tile < NUM_M_TILES; ++tile) {
            int chunk = tile / (V_LANE / 2), pair = tile % (V_LANE / 2);
            shared.pair(warp, head, (chunk * 8 + lane / 4) * (V_LANE / 2) + pair) =
                make_float2(softmax.sums[tile][i], softmax.sums[tile][2 + i]);
        }
    }
}

template <class T> struct Combined {
    T sum;  // of some channels, in units of 2^top
    float top, weight;
};

// The first num_sets sets of sums in shared memory, added in order.
__device__ __forceinline__ Combined<float2> combine(const SumSets& shared, int num_sets, int head,
                                                    int pair_idx) {
    const SumStats& stats = *shared.stats;
    Combined<float2> all = {make_float2(0, 0), LEAST, 0.0f};
#pragma unroll 4
    for (int set = 0; set < num_sets; ++set) all.top = fmaxf(all.top, stats.tops[set][head]);
#pragma unroll 4
    for (int set = 0; set < num_sets; ++set) {
        float factor = exp2_approx(stats.tops[set][head] - all.top);
        float2 sum = shared.pair(set, head, pair_idx);
        all.sum.x += sum.x * factor, all.sum.y += sum.y * factor;
        all.weight += stats.weights[set][head] * factor;
    }
    return all;
}

__device__ __forceinline__ void write_out(scalar_t* out, const Combined<float2>& all) {
    float factor = all.weight == 0.0f ? 0.0f : reciprocal_approx(all.weight);
    *reinterpret_cast<u32*>(out) = pack2<scalar_t>(all.sum.x * factor, all.sum.y * factor);
}

// What was written of num_splits splits, added in order; begin: the place of the first.
__device__ __forceinline__ Combined<float4> add_splits(const float* sums, const float* stats,
                                                       int sums_step, int stats_step,
                                                       int num_splits, int begin) {
    constexpr int BATCH = 8;  // in flight
    Combined<float4> all = {make_float4(0, 0, 0, 0), LEAST, 0.0f};
    for (int first = 0; first < num_splits; first += BATCH) {
        float4 sum[BATCH];
        float tops[BATCH], weights[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            bool is_there = first + i < num_splits;
            int here = begin + first + i;
            if (here >= num_splits) here -= num_splits;
            sum[i] = is_there ? load_float4(sums + here * sums_step) : make_float4(0, 0, 0, 0);
            tops[i] = is_there ? stats[here * stats_step] : LEAST;
            weights[i] = is_there ? stats[here * stats_step + 1] : 0.0f;
        }
        float top = all.top;
#pragma unroll
        for (int i = 0; i < BATCH; ++i) top = fmaxf(top, tops[i]);
        float factor = exp2_approx(all.top - top);
        all.weight *= factor;
        all.sum.x *= factor, all.sum.y *= factor, all.sum.z *= factor, all.sum.w *= factor;
        all.top = top;
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            float share = exp2_approx(tops[i] - top);
            add_scaled(all.sum, sum[i], share);
            all.weight += weights[i] * share;
        }
    }
    return all;
}
