// The product of skinny_gemm.cuh for weights of the activations' dtype. dim: a multiple of 64.
#define INT8_WEIGHTS 0
#include "ptx.cuh"
#include "skinny_gemm.cuh"

// grid: any; block: THREADS.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) skinny_gemm_kernel(
    scalar_t* y,                      // [num_rows, num_out]
    const scalar_t* __restrict__ x,   // [num_rows, dim]
    long long x_stride,               // elements from row to row, a multiple of 8
    const scalar_t* __restrict__ w,   // [num_out, dim]; GATED: [2 * num_out, dim]
    const scalar_t* __restrict__ bias,      // [rows of w] or null
    scalar_t* residual,                     // [num_rows, num_out], may be y, or null
    int num_rows, int num_out, int dim)
{
    multiply_all(y, x, x_stride, w, nullptr, bias, residual, num_rows, num_out, dim);
}
