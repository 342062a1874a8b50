// out = silu(gate) * up, from the rows of the fused gate and up product.
//
// silu in float32, rounded, then the product: as torch computes silu(gate) * up in 16 bits.
// No shared memory; a thread takes 8 columns.
#include "ptx.cuh"

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ u32 silu_mul2(u32 gate, u32 up) {
    float2 g = unpack2<scalar_t>(gate), u = unpack2<scalar_t>(up);
    float2 s = unpack2<scalar_t>(pack2<scalar_t>(silu(g.x), silu(g.y)));
    return pack2<scalar_t>(s.x * u.x, s.y * u.y);
}

// grid: (ceil(size / 8 / block), num_rows)
extern "C" __global__ void __launch_bounds__(256) silu_mul_kernel(
    scalar_t* __restrict__ out,            // [num_rows, size]
    const scalar_t* __restrict__ gate_up,  // [num_rows, 2 * size]: gate, then up
    long long gate_up_stride,              // elements from row to row
    int size)                              // a multiple of 8
{
    int column = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (column >= size) return;
    const scalar_t* row = gate_up + blockIdx.y * gate_up_stride;
    uint4 gate = load16(row + column), up = load16(row + size + column);
    uint4 result = make_uint4(silu_mul2(gate.x, up.x), silu_mul2(gate.y, up.y),
                              silu_mul2(gate.z, up.z), silu_mul2(gate.w, up.w));
    store16(out + (long long)blockIdx.y * size + column, result);
}
