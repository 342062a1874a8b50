// Decodes one layer of some blocks, of any codec, to K and V side by side, keys unrotated: what
// torch's attention reads for a chunk of prompt.
//
// A block of threads takes a table entry, one kv head, K or V: BLOCK_SIZE rows; then, where there are
// more entries than blocks, the entry that lies a grid further. Native rows are copied; codes become
// float32 in shared memory (the values of kv/codecs.decode, then rounded).
// Shared memory: BLOCK_SIZE * HEAD_DIM floats, and 2 * HEAD_DIM for INT4 keys.
// MAX_CODEC: the lowest codec of the pool; entries name no lower one.
#include "ptx.cuh"
#include "block_codec.cuh"

constexpr int NUM_THREADS = 128;
constexpr int NUM_VALUES = BLOCK_SIZE * HEAD_DIM;

__device__ __forceinline__ void copy_rows(scalar_t* out, const u8* part, int num_rows) {
    for (int i = 8 * threadIdx.x; i < num_rows * HEAD_DIM; i += 8 * NUM_THREADS) {
        store16(out + i, load16_stream(part + 2 * i));
    }
}

#if MAX_CODEC >= 1
// values: [BLOCK_SIZE, HEAD_DIM] floats of the rows from `first` on.
__device__ __forceinline__ void decode_int8(float* values, const u8* part, const u8* side,
                                            int first, bool is_v) {
    const u8* codes = part + first * HEAD_DIM;
    const u8* scales = side + (is_v ? INT8_V_SCALES : 0) + 2 * first;
    for (int i = 8 * threadIdx.x; i < NUM_VALUES; i += 8 * NUM_THREADS) {
        uint2 eight = load8_stream(codes + i);
        float scale = load_half(scales + 2 * (i / HEAD_DIM));
#pragma unroll
        for (int byte = 0; byte < 8; ++byte) {
            u32 word = byte < 4 ? eight.x : eight.y;
            values[i + byte] = float(s8(word >> 8 * (byte % 4))) * scale;
        }
    }
}

__device__ __forceinline__ void unrotate_rows(float* values, const float* signs) {
    for (int row = threadIdx.x / 32; row < BLOCK_SIZE; row += NUM_THREADS / 32) {
        float x[ROW_REGS];
        float* from = values + row * HEAD_DIM + threadIdx.x % 32;
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) {
            x[reg] = 32 * reg + threadIdx.x % 32 < HEAD_DIM ? from[32 * reg] : 0.0f;
        }
        unrotate(x, signs);
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) {
            if (32 * reg + threadIdx.x % 32 < HEAD_DIM) from[32 * reg] = x[reg];
        }
    }
}
#endif

#if MAX_CODEC >= 2
// grids: [HEAD_DIM] steps, then [HEAD_DIM] zeros, of the 64 tokens that row `first` is of.
__device__ __forceinline__ void load_grids(float* grids, const u8* side, int first) {
    int group = first / K_GROUP;
    float super = load_half(side + INT4_SUPERS + 2 * group);
    for (int channel = threadIdx.x; channel < HEAD_DIM; channel += NUM_THREADS) {
        int i = group * HEAD_DIM + channel;
        grids[channel] = super * float(side[INT4_K_SCALES + i]);
        grids[HEAD_DIM + channel] = load_half(side + 2 * i);
    }
}

__device__ __forceinline__ float decode_int4(int code, int channel, const float* grids,
                                             const u8* v_scales, bool is_v) {
    if (!is_v) return float(code) * grids[channel] + grids[HEAD_DIM + channel];
    return (float(code) - 7.5f) * load_half(v_scales + 2 * (channel / V_GROUP));
}

__device__ __forceinline__ void decode_int4_rows(float* values, const u8* part, const u8* side,
                                                 int first, bool is_v, const float* grids) {
    const u8* codes = part + first * (HEAD_DIM / 2);
    for (int i = 4 * threadIdx.x; i < NUM_VALUES / 2; i += 4 * NUM_THREADS) {
        u32 word = *reinterpret_cast<const u32*>(codes + i);
        int row = i / (HEAD_DIM / 2), channel = i % (HEAD_DIM / 2);
        const u8* v_scales = side + INT4_V_SCALES + 2 * (first + row) * NUM_V_GROUPS;
        float* to = values + row * HEAD_DIM;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte, ++channel) {
            int low = word >> 8 * byte & 15, high = word >> (8 * byte + 4) & 15;
            int upper = channel + HEAD_DIM / 2;
            to[channel] = decode_int4(low, channel, grids, v_scales, is_v);
            to[upper] = decode_int4(high, upper, grids, v_scales, is_v);
        }
    }
}
#endif

// to: [num_rows, HEAD_DIM]; own_side: of the entry's head.
__device__ __forceinline__ void gather_rows(scalar_t* to, const u8* part, const u8* own_side,
                                            int entry, bool is_v, int num_rows,
                                            const float* signs) {
    if (entry_codec(entry) == NATIVE) return copy_rows(to, part, num_rows);
#if MAX_CODEC >= 1
    __shared__ float values[NUM_VALUES];
    __syncthreads();  // the entry before has been read
    int first = entry_span_idx(entry) * BLOCK_SIZE;
    if (entry_codec(entry) == INT8) {
        decode_int8(values, part, own_side, first, is_v);
        __syncthreads();
        if (!is_v) unrotate_rows(values, signs);
    }
#if MAX_CODEC >= 2
    else {
        __shared__ float grids[2 * HEAD_DIM];
        if (!is_v) load_grids(grids, own_side, first);
        __syncthreads();
        decode_int4_rows(values, part, own_side, first, is_v, grids);
    }
#endif
    __syncthreads();
    for (int i = 8 * threadIdx.x; i < num_rows * HEAD_DIM; i += 8 * NUM_THREADS) {
        const float* x = values + i;
        store16(to + i, make_uint4(pack2<scalar_t>(x[0], x[1]), pack2<scalar_t>(x[2], x[3]),
                                   pack2<scalar_t>(x[4], x[5]), pack2<scalar_t>(x[6], x[7])));
    }
#endif
}

// grid: (up to the number of entries, num_kv_heads, 2)
extern "C" __global__ void __launch_bounds__(128) gather_blocks_kernel(
    scalar_t* __restrict__ out,      // [2, num_kv_heads, num_tokens, HEAD_DIM]
    const u8* __restrict__ payload,  // [num_blocks, 2, num_kv_heads, PART_BYTES] of this layer
    long long payload_stride,        // bytes from block to block
    const u8* __restrict__ side,     // [num_blocks, num_kv_heads, side_bytes] of this layer
    long long side_stride,
    const int* __restrict__ table,   // [num_entries], of positions 0, BLOCK_SIZE, ... of `out`
    const int* __restrict__ in_use,  // how many of the entries are wanted; null: all
    const float* __restrict__ signs, // [HEAD_DIM]; null where MAX_CODEC is 0
    int num_tokens,                  // above (num_entries - 1) * BLOCK_SIZE
    int side_bytes)                  // of one head's piece
{
    int head = blockIdx.y;
    bool is_v = blockIdx.z == 1;
    int num_entries = in_use ? *in_use : (num_tokens + BLOCK_SIZE - 1) / BLOCK_SIZE;
    for (int idx = blockIdx.x; idx < num_entries; idx += gridDim.x) {
        int entry = table[idx], position = idx * BLOCK_SIZE;
        long long row = ((long long)blockIdx.z * gridDim.y + head) * num_tokens + position;
        const u8* part = payload + entry_block(entry) * payload_stride +
                         part_offset(0, is_v, head, gridDim.y);
        const u8* own_side = side + entry_block(entry) * side_stride + head * side_bytes;
        gather_rows(out + row * HEAD_DIM, part, own_side, entry, is_v,
                    min(BLOCK_SIZE, num_tokens - position), signs);
    }
}
