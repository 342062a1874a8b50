// RMSNorm of rows, and the same with the residual added first: residual += x; out = norm(residual).
//
// One block of threads a row, so that a row's bits do not depend on the others. In float32 up to
// the product with the weight, rounded before it and after it, as TorchOps.norm does.
// Shared memory: one float a warp. A thread keeps up to MAX_VECTORS vectors of 8 in registers, so a
// row has at most MAX_VECTORS * 8 * threads elements.
#include "ptx.cuh"

constexpr int MAX_VECTORS = 4;

__device__ __forceinline__ float sum_of_squares(uint4 v) {
    float sum = 0.0f;
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x = unpack2<scalar_t>(pairs[i]);
        sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
    }
    return sum;
}

__device__ __forceinline__ u32 add2(u32 a, u32 b) {
    float2 x = unpack2<scalar_t>(a), y = unpack2<scalar_t>(b);
    return pack2<scalar_t>(x.x + y.x, x.y + y.y);
}

__device__ __forceinline__ u32 scale2(u32 a, float factor, u32 weight) {
    float2 x = unpack2<scalar_t>(a), w = unpack2<scalar_t>(weight);
    float2 y = unpack2<scalar_t>(pack2<scalar_t>(x.x * factor, x.y * factor));
    return pack2<scalar_t>(w.x * y.x, w.y * y.y);
}

// The sum over the block's threads, the same in all of them.
__device__ __forceinline__ float block_sum(float sum) {
    __shared__ float warp_sums[32];
#pragma unroll
    for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(FULL_MASK, sum, lane);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < int(blockDim.x / 32); ++warp) total += warp_sums[warp];
    return total;
}

// grid: (num_tokens * rows_each); blocks of a multiple of 32 threads
extern "C" __global__ void __launch_bounds__(1024) rms_norm_kernel(
    scalar_t* __restrict__ out,           // [num_tokens, rows_each, size]
    scalar_t* __restrict__ residual,      // the same shape, x is added to it; or null
    const scalar_t* __restrict__ x,       // [num_tokens, rows_each, size]
    long long x_stride,                   // elements from token to token
    const scalar_t* __restrict__ weight,  // [size]
    int rows_each,                        // 1, or the heads that are normed each for itself
    int size,                             // a multiple of 8
    float eps)
{
    int token = blockIdx.x / rows_each, row = blockIdx.x % rows_each;
    const scalar_t* from = x + token * x_stride + row * size;
    long long first = (long long)blockIdx.x * size;
    uint4 kept[MAX_VECTORS];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; ++i) {
        int column = 8 * (i * blockDim.x + threadIdx.x);
        if (column >= size) break;
        uint4 v = load16(from + column);
        if (residual) {
            uint4 r = load16(residual + first + column);
            v = make_uint4(add2(r.x, v.x), add2(r.y, v.y), add2(r.z, v.z), add2(r.w, v.w));
            store16(residual + first + column, v);
        }
        kept[i] = v;
        sum += sum_of_squares(v);
    }
    float factor = rsqrtf(block_sum(sum) / size + eps);
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; ++i) {
        int column = 8 * (i * blockDim.x + threadIdx.x);
        if (column >= size) break;
        uint4 v = kept[i], w = load16(weight + column);
        uint4 y = make_uint4(scale2(v.x, factor, w.x), scale2(v.y, factor, w.y),
                             scale2(v.z, factor, w.z), scale2(v.w, factor, w.w));
        store16(out + first + column, y);
    }
}
