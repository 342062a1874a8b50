// What the bytes of a block mean, for the kernels that write, gather and compress blocks: offsets
// as in kv/layout.py, numbers as in kv/codecs.py, bit for bit (float32, no fused multiply-adds).
//
// Needs HEAD_DIM (a multiple of 8) and BLOCK_SIZE. A row is one token of one head; a warp holds it
// as ROW_REGS registers a lane, element 32 r + lane, zeros beyond HEAD_DIM.
#pragma once

constexpr int NATIVE = 0, INT8 = 1, INT4 = 2;  // Codec of kv/layout.py
constexpr int PART_BYTES = BLOCK_SIZE * HEAD_DIM * 2;
constexpr int ROW_REGS = (HEAD_DIM + 31) / 32;
constexpr int ROTATION = HEAD_DIM & -HEAD_DIM;  // channels that are rotated among themselves
constexpr int K_GROUP = 64;                     // tokens that share an INT4 key channel's scale

__device__ constexpr int largest_even_divisor(int dim, int limit) {
    return dim % limit == 0 ? limit : largest_even_divisor(dim, limit - 2);
}
constexpr int V_GROUP = largest_even_divisor(HEAD_DIM, 64);
constexpr int NUM_V_GROUPS = HEAD_DIM / V_GROUP;

// Side pieces, byte offsets.
constexpr int INT8_TOKENS = 2 * BLOCK_SIZE;  // of a block
constexpr int INT8_V_SCALES = 2 * INT8_TOKENS;
constexpr int INT8_SIDE_END = 4 * INT8_TOKENS;
constexpr int INT4_TOKENS = 4 * BLOCK_SIZE;
constexpr int INT4_GROUPS = INT4_TOKENS / K_GROUP;
constexpr int INT4_V_SCALES = 2 * INT4_GROUPS * HEAD_DIM;
constexpr int INT4_SUPERS = INT4_V_SCALES + 2 * INT4_TOKENS * NUM_V_GROUPS;
constexpr int INT4_K_SCALES = INT4_SUPERS + 2 * INT4_GROUPS;
constexpr int INT4_SIDE_END = INT4_K_SCALES + INT4_GROUPS * HEAD_DIM;

__device__ constexpr float inverse_sqrt(int power_of_two) {
    return power_of_two == 1   ? 1.0f
           : power_of_two == 2 ? 0.70710678118654752f
                               : 0.5f * inverse_sqrt(power_of_two / 4);
}
constexpr float ROTATION_SCALE = inverse_sqrt(ROTATION);

// A block table's entry.
__device__ __forceinline__ int entry_block(int entry) { return entry & 0xffffff; }
__device__ __forceinline__ int entry_span_idx(int entry) { return entry >> 24 & 15; }
__device__ __forceinline__ int entry_codec(int entry) { return entry >> 28 & 15; }

// The payload of one layer, K (0) or V (1), and head: [L, 2, Hk, part_bytes] from a block on.
__device__ __forceinline__ long long part_offset(int layer, int which, int head, int num_kv_heads) {
    return ((long long)(2 * layer + which) * num_kv_heads + head) * PART_BYTES;
}

__device__ __forceinline__ float load_half(const u8* address) {
    return to_float(half_t{*reinterpret_cast<const u16*>(address)});
}

// Sylvester's Hadamard matrix times every run of ROTATION elements, by butterflies of 1, 2, 4 ...
__device__ __forceinline__ void hadamard(float (&x)[ROW_REGS]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 1; half < ROTATION && half < 32; half *= 2) {
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) {
            float other = __shfl_xor_sync(FULL_MASK, x[reg], half);
            x[reg] = lane & half ? other - x[reg] : x[reg] + other;
        }
    }
#pragma unroll
    for (int half = 1; half < ROTATION / 32; half *= 2) {
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) {
            if (reg & half) continue;
            float a = x[reg], b = x[reg + half];
            x[reg] = a + b;
            x[reg + half] = a - b;
        }
    }
}

// rotate() and unrotate() of kv/codecs.py; signs: [HEAD_DIM], +1 and -1.
__device__ __forceinline__ void rotate(float (&x)[ROW_REGS], const float* signs) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int reg = 0; reg < ROW_REGS; ++reg) {
        int channel = 32 * reg + lane;
        x[reg] = channel < HEAD_DIM ? x[reg] * signs[channel] : 0.0f;
    }
    hadamard(x);
#pragma unroll
    for (int reg = 0; reg < ROW_REGS; ++reg) x[reg] *= ROTATION_SCALE;
}

__device__ __forceinline__ void unrotate(float (&x)[ROW_REGS], const float* signs) {
    int lane = threadIdx.x % 32;
    hadamard(x);
#pragma unroll
    for (int reg = 0; reg < ROW_REGS; ++reg) {
        int channel = 32 * reg + lane;
        x[reg] *= channel < HEAD_DIM ? signs[channel] * ROTATION_SCALE : 0.0f;
    }
}
