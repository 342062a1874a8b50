// Reads memory and does nothing with it: the yardstick of the other kernels' speed.
//
// grid: any; block: any; no shared memory. A thread keeps four 16-byte loads in flight.
#include "ptx.cuh"

extern "C" __global__ void read_all_kernel(
    unsigned int* __restrict__ out,              // [1]; never written for data that is not all zero
    const unsigned char* __restrict__ from,      // [num_vectors, 16]
    long long num_vectors)
{
    long long step = (long long)gridDim.x * blockDim.x;
    long long idx = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    u32 met = 0;
    for (; idx < num_vectors; idx += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = make_uint4(0, 0, 0, 0);
            if (idx + i * step < num_vectors) v[i] = load16_stream(from + 16 * (idx + i * step));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) met |= v[i].x | v[i].y | v[i].z | v[i].w;
    }
    if (met == 0x80000001u) out[0] = met;  // so that the loads are not left out
}
