// Every instruction of ptx.cuh on given registers, for tests: emulator against hand-written tables,
// and, where there is a GPU, emulator against GPU.
//
// grid: 1 block of 32 threads each; lane-major arrays. Shared memory: at most 1 KiB.
#include "ptx.cuh"

extern "C" __global__ void mma_kernel(
    float* __restrict__ d,               // [32, 4]
    const unsigned int* __restrict__ a,  // [32, 4]
    const unsigned int* __restrict__ b,  // [32, 2]
    const float* __restrict__ c)         // [32, 4]
{
    int lane = threadIdx.x;
    u32 own_a[4], own_b[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) own_a[i] = a[4 * lane + i], sums[i] = c[4 * lane + i];
    for (int i = 0; i < 2; ++i) own_b[i] = b[2 * lane + i];
    mma_16x8x16<scalar_t>(sums, own_a, own_b);
    for (int i = 0; i < 4; ++i) d[4 * lane + i] = sums[i];
}

extern "C" __global__ void ldmatrix_kernel(
    unsigned int* __restrict__ out,         // [7 forms, 32, 4]: x1, x2, x4, the same .trans, mov
    const unsigned int* __restrict__ rows)  // [32, 4]: 32 rows of 8 elements of 16 bits
{
    __shared__ uint4 shared[32];
    int lane = threadIdx.x;
    shared[lane] = load16(rows + 4 * lane);
    __syncwarp();
    u32 x1[1], x2[2], x4[4];
    u32* to = out + 4 * lane;
    const void* row = &shared[lane];
    ldmatrix_x1(x1, row);
    to[0] = x1[0];
    ldmatrix_x2(x2, row);
    for (int i = 0; i < 2; ++i) to[128 + i] = x2[i];
    ldmatrix_x4(x4, row);
    for (int i = 0; i < 4; ++i) to[256 + i] = x4[i];
    to[768] = movmatrix_trans(x4[0]);
    ldmatrix_x1_trans(x1, row);
    to[384] = x1[0];
    ldmatrix_x2_trans(x2, row);
    for (int i = 0; i < 2; ++i) to[512 + i] = x2[i];
    ldmatrix_x4_trans(x4, row);
    for (int i = 0; i < 4; ++i) to[640 + i] = x4[i];
}

extern "C" __global__ void codes_kernel(
    unsigned int* __restrict__ out,          // [32, 6]: int8 pairs, int4 low pairs, high pairs - 7.5
    const unsigned int* __restrict__ codes)  // [32]
{
    u32 pairs[2], low[2], high[2];
    int8_to_half(codes[threadIdx.x], pairs);
    int4_to_centred_half(codes[threadIdx.x], low, high);
    for (int i = 0; i < 2; ++i) {
        out[6 * threadIdx.x + i] = pairs[i];
        out[6 * threadIdx.x + 2 + i] = low[i];
        out[6 * threadIdx.x + 4 + i] = high[i];
    }
}

extern "C" __global__ void numbers_kernel(
    scalar_t* __restrict__ rounded,      // [32, 2]
    float* __restrict__ widened,         // [32, 2]: of what was rounded
    unsigned int* __restrict__ pairs,    // [32, 3]: x * y + z, x * y, bytes 3 0 1 2 of x and y
    float* __restrict__ powers,          // [32, 2]: 2^x
    const float* __restrict__ x,         // [32, 2]
    const unsigned int* __restrict__ y,  // [32, 3]: pairs of scalar_t
    int steps)                           // of the shuffles in the last column of `pairs`
{
    int lane = threadIdx.x;
    float low = x[2 * lane], high = x[2 * lane + 1];
    u32 pair = pack2<scalar_t>(low, high);
    rounded[2 * lane] = from_float<scalar_t>(low);
    rounded[2 * lane + 1] = scalar_t{u16(pair >> 16)};
    float2 wide = unpack2<scalar_t>(pair);
    widened[2 * lane] = wide.x, widened[2 * lane + 1] = wide.y;
    powers[2 * lane] = exp2_approx(low), powers[2 * lane + 1] = exp2_approx(high);
    u32 a = y[3 * lane], b = y[3 * lane + 1], c = y[3 * lane + 2];
    pairs[3 * lane] = fma2<scalar_t>(a, b, c);
    pairs[3 * lane + 1] = mul2<scalar_t>(a, b);
    u32 mixed = lop3<AND_OR>(prmt<0x2107>(a, b), 0x00ffff00u, c);
    pairs[3 * lane + 2] = __shfl_sync(FULL_MASK, mixed, lane + steps);
}

extern "C" __global__ void warp_kernel(
    int* __restrict__ out,      // [32, 7]
    const int* __restrict__ x)  // [32]
{
    int lane = threadIdx.x, own = x[lane];
    int* to = out + 7 * lane;
    to[0] = __shfl_up_sync(FULL_MASK, own, 3);
    to[1] = __shfl_down_sync(FULL_MASK, own, 5, 16);
    to[2] = __shfl_xor_sync(FULL_MASK, own, 9);
    to[3] = __shfl_sync(FULL_MASK, own, 2 * lane, 8);
    to[4] = int(__ballot_sync(FULL_MASK, own % 3 == 0));
    to[5] = __any_sync(FULL_MASK, own < 0) + 2 * __all_sync(FULL_MASK, own < 100);
    to[6] = lane < 16 ? __shfl_xor_sync(0xffffu, own, 1) : 0;
}

extern "C" __global__ void cp_async_kernel(
    unsigned int* __restrict__ out,         // [32, 5]: the row, then the sum of another lane's
    const unsigned int* __restrict__ rows)  // [32, 4]; odd rows are not copied but zeros
{
    __shared__ uint4 vectors[32];
    __shared__ u32 words[32];
    int lane = threadIdx.x;
    cp_async16(&vectors[lane], rows + 4 * lane, lane % 2 == 0);
    cp_async_commit();
    cp_async4(&words[lane], rows + 4 * lane);
    cp_async_commit();
    cp_async_wait<1>();
    uint4 own = vectors[lane];
    cp_async_wait<0>();
    __syncthreads();
    u32* to = out + 5 * lane;
    to[0] = own.x, to[1] = own.y, to[2] = own.z, to[3] = own.w;
    to[4] = words[31 - lane];
}
