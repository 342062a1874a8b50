// Copies whole blocks: the payload, all layers, and the side piece.
//
// Pairs of one launch must be independent: no block is written twice, or read and written.
// Called for copy-on-write and forks. No shared memory.
#include "ptx.cuh"

__device__ __forceinline__ void copy_bytes(u8* dst, const u8* src, long long num_bytes) {
    long long step = 16LL * gridDim.y * blockDim.x;
    long long first = 16LL * (blockIdx.y * blockDim.x + threadIdx.x);
    for (long long offset = first; offset < num_bytes; offset += step) {
        store16(dst + offset, load16(src + offset));
    }
}

// grid: (num_pairs, blocks of threads a pair)
extern "C" __global__ void __launch_bounds__(256) copy_blocks_kernel(
    u8* payload,                    // [num_blocks, payload_bytes]
    long long payload_stride,       // bytes from block to block
    u8* side,                       // [num_blocks, side_bytes]; null where side_bytes is 0
    long long side_stride,
    const int* __restrict__ pairs,  // [num_pairs, 2]: source, destination
    long long payload_bytes,        // of a block, a multiple of 16
    long long side_bytes)           // likewise
{
    long long src = pairs[2 * blockIdx.x], dst = pairs[2 * blockIdx.x + 1];
    copy_bytes(payload + dst * payload_stride, payload + src * payload_stride, payload_bytes);
    if (side_bytes) copy_bytes(side + dst * side_stride, side + src * side_stride, side_bytes);
}
