// Adding up what warps, then splits, made of an item's heads: always in their order.
#pragma once

constexpr int THREADS = 32 * WARPS;
constexpr int SUM_STRIDE = HEAD_DIM + 4;  // floats from head to head

// Sets of sums of 8 heads, in units of 2^top.
struct SumSets {
    float sums[WARPS][8][SUM_STRIDE];
    float tops[WARPS][8], weights[WARPS][8];
};

__device__ __forceinline__ float4 load_float4(const float* from) {
    uint4 v = load16(from);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                       __uint_as_float(v.w));
}

__device__ __forceinline__ void store_float4(float* to, float4 v) {
    store16(to, make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z),
                           __float_as_uint(v.w)));
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 x, float factor) {
    sum.x += x.x * factor, sum.y += x.y * factor, sum.z += x.z * factor, sum.w += x.w * factor;
}

// A warp's sums to shared memory; a lane's channels are neighbours there.
__device__ __forceinline__ void store_sums(SumSets& shared, Softmax& softmax, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            softmax.weight[i] += __shfl_xor_sync(FULL_MASK, softmax.weight[i], step);
        }
        int head = lane % 4 * 2 + i;
        if (lane < 4) {
            shared.tops[warp][head] = softmax.top[i];
            shared.weights[warp][head] = softmax.weight[i];
        }
#pragma unroll
        for (int tile = 0; tile < NUM_M_TILES; ++tile) {
            int chunk = tile / (V_LANE / 2), pair = tile % (V_LANE / 2);
            int channel = (chunk * 8 + lane / 4) * V_LANE + pair * 2;
            float2* to = reinterpret_cast<float2*>(&shared.sums[warp][head][channel]);
            *to = make_float2(softmax.sums[tile][i], softmax.sums[tile][2 + i]);
        }
    }
}

struct Combined {
    float4 sum;  // of 4 channels, in units of 2^top
    float top, weight;
};

// The first num_sets sets of sums in shared memory, added in order.
__device__ __forceinline__ Combined combine(const SumSets& shared, int num_sets, int head,
                                            int channel) {
    Combined all = {make_float4(0, 0, 0, 0), LEAST, 0.0f};
    for (int set = 0; set < num_sets; ++set) all.top = fmaxf(all.top, shared.tops[set][head]);
    for (int set = 0; set < num_sets; ++set) {
        float factor = exp2_approx(shared.tops[set][head] - all.top);
        add_scaled(all.sum, load_float4(&shared.sums[set][head][channel]), factor);
        all.weight += shared.weights[set][head] * factor;
    }
    return all;
}

__device__ __forceinline__ void write_out(scalar_t* out, const Combined& all) {
    float factor = all.weight == 0.0f ? 0.0f : 1.0f / all.weight;
    *reinterpret_cast<uint2*>(out) =
        make_uint2(pack2<scalar_t>(all.sum.x * factor, all.sum.y * factor),
                   pack2<scalar_t>(all.sum.z * factor, all.sum.w * factor));
}

// What num_splits blocks wrote, every num_lanes-th from `first` on, added in order.
__device__ __forceinline__ Combined add_splits(const float* sums, const float* stats,
                                               long long sums_step, long long stats_step,
                                               int num_splits, int first, int num_lanes) {
    constexpr int BATCH = 8;  // in flight
    Combined all = {make_float4(0, 0, 0, 0), LEAST, 0.0f};
    for (int split = first; split < num_splits; split += BATCH * num_lanes) {
        float4 sum[BATCH];
        float tops[BATCH], weights[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            int here = split + i * num_lanes;
            bool is_there = here < num_splits;
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

// The row's output from all its splits, by the whole block: threads share out channels, and splits
// where threads are left. slot: of the row's first split; step: slots from split to split.
__device__ __forceinline__ void merge_splits(scalar_t* out, SumSets& shared, const float* split_sums,
                                             const float* split_stats, long long slot,
                                             long long step, int num_splits, int num_heads) {
    int num_parts = num_heads * (HEAD_DIM / 4);
    int num_lanes = max(1, min(WARPS, THREADS / num_parts));
    for (int idx = threadIdx.x; idx < num_parts * num_lanes; idx += THREADS) {
        int part = idx % num_parts, split_lane = idx / num_parts;
        int head = part / (HEAD_DIM / 4), channel = part % (HEAD_DIM / 4) * 4;
        Combined all = add_splits(split_sums + (slot + head) * HEAD_DIM + channel,
                                  split_stats + 2 * (slot + head), step * HEAD_DIM, 2 * step,
                                  num_splits, split_lane, num_lanes);
        store_float4(&shared.sums[split_lane][head][channel], all.sum);
        if (channel) continue;
        shared.tops[split_lane][head] = all.top;
        shared.weights[split_lane][head] = all.weight;
    }
    __syncthreads();
    for (int part = threadIdx.x; part < num_parts; part += THREADS) {
        int head = part / (HEAD_DIM / 4), channel = part % (HEAD_DIM / 4) * 4;
        write_out(out + head * HEAD_DIM + channel, combine(shared, num_lanes, head, channel));
    }
}
