// Encodes blocks anew: native -> INT8, native -> INT4, INT8 -> INT4, all layers and heads.
//
// Bit for bit what kv/codecs.encode(decode(...)) gives: the same float32 operations in the same
// order, fp16 scales rounded alike, codes rounded to even. NaN stays NaN.
// A block of threads takes one chunk (the tokens of one source block for INT8, 64 tokens for INT4)
// of K or V of one layer and head: the source bytes to shared memory, codes in shared memory, then
// out. Dynamic shared memory: one Int8Shared or Int4Shared.
// Jobs: a destination block and its sources in order; no job reads what another of them writes.
#include "ptx.cuh"
#include "block_codec.cuh"

constexpr int NUM_THREADS = 128, NUM_WARPS = 4;
constexpr float LAST_INT8 = 127.0f, LAST_INT4 = 15.0f, INT4_MID = 7.5f, MAX_STEPS = 255.0f;
constexpr float MIN_INT8_SCALE = 1.0f / (1 << 17), MIN_V_SCALE = 1.0f / (1 << 21);
constexpr float MIN_SUPER = 1.0f / (1 << 15);
constexpr float ALMOST_ONE = 1.0f - 1.0f / 1024;

// What all three kernels are given.
struct Pool {
    u8 *payload, *side;
    long long payload_stride, side_stride;
    int num_kv_heads, side_bytes;
    const float* signs;

    __device__ u8* part(int block, int layer, int which, int head) const {
        return payload + block * payload_stride + part_offset(layer, which, head, num_kv_heads);
    }
    __device__ u8* piece(int block, int layer, int head) const {
        return side + block * side_stride + ((long long)layer * num_kv_heads + head) * side_bytes;
    }
};

// ---- numbers ------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_nan(float x) { return x != x; }
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }
// As torch.amin and amax: a NaN wins.
__device__ __forceinline__ float nan_min(float a, float b) { return b < a || is_nan(b) ? b : a; }
__device__ __forceinline__ float nan_max(float a, float b) { return b > a || is_nan(b) ? b : a; }
// As clamp(min): a NaN stays.
__device__ __forceinline__ float at_least(float x, float least) { return x < least ? least : x; }

// What float16 stores of x, as float32; what it cannot hold is NaN, and -0 is 0.
__device__ __forceinline__ float as_half(float x) {
    float rounded = to_float(from_float<half_t>(x));
    return is_finite(rounded) ? rounded + 0.0f : not_a_number();
}

__device__ __forceinline__ void store_half(u8* address, float x) {
    u16 bits = is_nan(x) ? u16(0x7e00) : from_float<half_t>(x).bits;
    *reinterpret_cast<u16*>(address) = bits;
}

// x rounded, halves to even, into low .. high; 0 for a NaN.
__device__ __forceinline__ int code_of(float x, float low, float high) {
    float rounded = rintf(x);
    if (is_nan(rounded)) return 0;
    return int(rounded < low ? low : rounded > high ? high : rounded);
}

__device__ __forceinline__ float warp_peak(float size) {  // of magnitudes; a NaN wins
#pragma unroll
    for (int lane = 16; lane; lane /= 2) {
        size = nan_max(size, __shfl_xor_sync(FULL_MASK, size, lane));
    }
    return size;
}

// ---- rows and tiles -----------------------------------------------------------------------------

__device__ __forceinline__ void copy_tile(u8* dst, const u8* src, int num_bytes) {
    for (int i = 16 * threadIdx.x; i < num_bytes; i += 16 * NUM_THREADS) {
        store16(dst + i, load16(src + i));
    }
}

// A row of a tile of native values or INT8 codes as float32, keys unrotated; a whole warp comes.
template <int SOURCE>
__device__ __forceinline__ void load_row(float (&x)[ROW_REGS], const u8* tile, int row,
                                         const float* scales, const float* signs, bool is_v) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int reg = 0; reg < ROW_REGS; ++reg) {
        int channel = 32 * reg + lane;
        x[reg] = 0.0f;
        if (channel >= HEAD_DIM) continue;
        if (SOURCE == NATIVE) {
            x[reg] = to_float(reinterpret_cast<const scalar_t*>(tile)[row * HEAD_DIM + channel]);
        } else {
            x[reg] = float(s8(tile[row * HEAD_DIM + channel])) * scales[row];
        }
    }
    if (SOURCE == INT8 && !is_v) unrotate(x, signs);
}

__device__ __forceinline__ void zero_rest(u8* piece, int used, int side_bytes) {
    for (int i = used + threadIdx.x; i < side_bytes; i += NUM_THREADS) piece[i] = 0;
}

// ---- native -> INT8 -----------------------------------------------------------------------------

struct Int8Shared {
    uint4 tile[BLOCK_SIZE * HEAD_DIM / 8];    // a native block's rows
    uint4 codes[BLOCK_SIZE * HEAD_DIM / 16];
};

// grid: (num_jobs * 2, num_layers, num_kv_heads * 2); dynamic shared memory: Int8Shared
extern "C" __global__ void __launch_bounds__(128) compress_native_int8_kernel(
    u8* payload,                     // [num_blocks, num_layers, 2, num_kv_heads, PART_BYTES]
    long long payload_stride,        // bytes from block to block
    u8* side,                        // [num_blocks, num_layers, num_kv_heads, side_bytes]
    long long side_stride,
    const int* __restrict__ jobs,    // [num_jobs, 1 + 2]: destination, sources
    const float* __restrict__ signs, // [HEAD_DIM]
    int num_kv_heads, int side_bytes)
{
    Pool pool = {payload, side, payload_stride, side_stride, num_kv_heads, side_bytes, signs};
    DYNAMIC_SHARED(Int8Shared, shared);
    u8 *tile = reinterpret_cast<u8*>(shared->tile), *codes = reinterpret_cast<u8*>(shared->codes);
    int source = blockIdx.x % 2, head = blockIdx.z / 2, lane = threadIdx.x % 32;
    bool is_v = blockIdx.z % 2;
    const int* job = jobs + blockIdx.x / 2 * 3;
    copy_tile(tile, pool.part(job[1 + source], blockIdx.y, is_v, head), PART_BYTES);
    __syncthreads();
    u8* piece = pool.piece(job[0], blockIdx.y, head);
    u8* scales = piece + (is_v ? INT8_V_SCALES : 0) + 2 * source * BLOCK_SIZE;
    for (int row = threadIdx.x / 32; row < BLOCK_SIZE; row += NUM_WARPS) {
        float x[ROW_REGS], peak = 0.0f;
        load_row<NATIVE>(x, tile, row, nullptr, signs, is_v);
        if (!is_v) rotate(x, signs);
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) peak = nan_max(peak, fabsf(x[reg]));
        float scale = at_least(as_half(__fdiv_rn(warp_peak(peak), LAST_INT8)), MIN_INT8_SCALE);
        if (lane == 0) store_half(scales + 2 * row, scale);
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) {
            int channel = 32 * reg + lane;
            int code = code_of(__fdiv_rn(x[reg], scale), -LAST_INT8, LAST_INT8);
            if (channel < HEAD_DIM) codes[row * HEAD_DIM + channel] = u8(code);
        }
    }
    __syncthreads();
    u8* to = pool.part(job[0], blockIdx.y, is_v, head) + source * BLOCK_SIZE * HEAD_DIM;
    copy_tile(to, codes, BLOCK_SIZE * HEAD_DIM);
    if (source == 0 && !is_v) zero_rest(piece, INT8_SIDE_END, side_bytes);
}

// ---- to INT4 ------------------------------------------------------------------------------------

#if MAX_CODEC >= 2

template <int SOURCE> struct Int4Shared {
    uint4 tile[K_GROUP * HEAD_DIM / (SOURCE == NATIVE ? 8 : 16)];  // the sources' rows
    union {
        float ranges[2][NUM_WARPS][HEAD_DIM];     // first: least and largest by warp
        uint4 codes[K_GROUP * HEAD_DIM / 2 / 16];  // then, 16 bytes at least
    };
    float grids[2][HEAD_DIM];         // steps and zeros of the key channels
    float rows[NUM_WARPS][HEAD_DIM];  // one row of each warp
    float scales[K_GROUP];            // of INT8 rows
    float peaks[NUM_WARPS];
    int has_bad_zero;
};

// Two codes a byte: channel and channel + HEAD_DIM / 2 of the warp's row, 4 bytes a lane.
template <class Code>
__device__ __forceinline__ void pack_row(u8* codes, int row, const float* x, Code code) {
    for (int i = 4 * (threadIdx.x % 32); i < HEAD_DIM / 2; i += 128) {
        u32 word = 0;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            int low = i + byte, high = low + HEAD_DIM / 2;
            word |= u32(code(x[low], low) | code(x[high], high) << 4) << 8 * byte;
        }
        *reinterpret_cast<u32*>(codes + row * (HEAD_DIM / 2) + i) = word;
    }
}

// Puts the row of registers where all lanes see it; the row before it has been read by then.
__device__ __forceinline__ void share_row(float* to, const float (&x)[ROW_REGS]) {
    int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int reg = 0; reg < ROW_REGS; ++reg) {
        if (32 * reg + lane < HEAD_DIM) to[32 * reg + lane] = x[reg];
    }
    __syncwarp();
}

// Least and largest of every channel over the tile, into ranges[.][0].
template <int SOURCE>
__device__ __forceinline__ void find_ranges(Int4Shared<SOURCE>* shared, const float* signs) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float low[ROW_REGS], high[ROW_REGS];
#pragma unroll
    for (int reg = 0; reg < ROW_REGS; ++reg) {
        low[reg] = __uint_as_float(0x7f800000u);
        high[reg] = -low[reg];
    }
    for (int row = warp; row < K_GROUP; row += NUM_WARPS) {
        float x[ROW_REGS];
        load_row<SOURCE>(x, reinterpret_cast<u8*>(shared->tile), row, shared->scales, signs, false);
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) {
            low[reg] = nan_min(low[reg], x[reg]);
            high[reg] = nan_max(high[reg], x[reg]);
        }
    }
#pragma unroll
    for (int reg = 0; reg < ROW_REGS; ++reg) {
        int channel = 32 * reg + lane;
        if (channel >= HEAD_DIM) continue;
        shared->ranges[0][warp][channel] = low[reg];
        shared->ranges[1][warp][channel] = high[reg];
    }
    __syncthreads();
    for (int channel = threadIdx.x; channel < HEAD_DIM; channel += NUM_THREADS) {
        float least = shared->ranges[0][0][channel], largest = shared->ranges[1][0][channel];
        for (int other = 1; other < NUM_WARPS; ++other) {
            least = nan_min(least, shared->ranges[0][other][channel]);
            largest = nan_max(largest, shared->ranges[1][other][channel]);
        }
        shared->ranges[0][0][channel] = least;
        shared->ranges[1][0][channel] = largest;
    }
}

// A channel's zero and the step it needs, from its range; codecs._channel_grids.
__device__ __forceinline__ float2 first_grid(float low, float high) {
    float needed = __fdiv_rn(high - low, LAST_INT4);
    float zero = as_half(low);
    if (fabsf(zero - low) > 0.48f * needed) {
        zero = as_half(low - fabsf(low) * (1.0f / 2048));
        needed = __fdiv_rn(high - zero, LAST_INT4);
    }
    return make_float2(zero, needed);
}

// One super finer where the codes would fit it; codecs._take_smaller. Returns zero and scale.
__device__ __forceinline__ float2 take_smaller(float low, float high, float zero, float super,
                                               float scale) {
    float step = super * scale;
    float last_code = rintf(__fdiv_rn(high - zero, step));
    if (!(scale > 1.0f && last_code * scale <= LAST_INT4 * (scale - 1.0f))) {
        return make_float2(zero, scale);
    }
    step = step - super;
    float centred = as_half(low + (high - low - LAST_INT4 * step) / 2.0f);
    bool is_finer = low >= centred - step / 2.0f && high <= centred + (LAST_INT4 + 0.5f) * step;
    return is_finer ? make_float2(centred, scale - 1.0f) : make_float2(zero, scale);
}

// Fills grids from the ranges, and the side piece's keys of this group of 64 tokens.
template <int SOURCE>
__device__ __forceinline__ void make_grids(Int4Shared<SOURCE>* shared, u8* piece, int group) {
    float peak = 0.0f;
    for (int channel = threadIdx.x; channel < HEAD_DIM; channel += NUM_THREADS) {
        float2 grid = first_grid(shared->ranges[0][0][channel], shared->ranges[1][0][channel]);
        peak = nan_max(peak, grid.y);
        if (!is_finite(grid.x)) atomicOr(&shared->has_bad_zero, 1);
    }
    peak = warp_peak(peak);
    if (threadIdx.x % 32 == 0) shared->peaks[threadIdx.x / 32] = peak;
    __syncthreads();
    peak = shared->peaks[0];
    for (int warp = 1; warp < NUM_WARPS; ++warp) peak = nan_max(peak, shared->peaks[warp]);
    float super = at_least(as_half(__fdiv_rn(peak, MAX_STEPS)), MIN_SUPER);
    if (shared->has_bad_zero) super = not_a_number();
    if (threadIdx.x == 0) store_half(piece + INT4_SUPERS + 2 * group, super);
    for (int channel = threadIdx.x; channel < HEAD_DIM; channel += NUM_THREADS) {
        float low = shared->ranges[0][0][channel], high = shared->ranges[1][0][channel];
        float2 first = first_grid(low, high);
        float zero = is_finite(super) ? first.x : not_a_number();
        float scale = ceilf(__fdiv_rn(first.y * ALMOST_ONE, super));
        scale = scale > MAX_STEPS ? MAX_STEPS : at_least(scale, 1.0f);
        float2 grid = take_smaller(low, high, zero, super, scale);
        shared->grids[0][channel] = super * grid.y;
        shared->grids[1][channel] = grid.x;
        int i = group * HEAD_DIM + channel;
        store_half(piece + 2 * i, grid.x);
        piece[INT4_K_SCALES + i] = is_nan(grid.y) ? u8(0) : u8(grid.y);
    }
    __syncthreads();
}

template <int SOURCE>
__device__ __forceinline__ void encode_keys(Int4Shared<SOURCE>* shared, u8* piece, int group,
                                            const float* signs) {
    int warp = threadIdx.x / 32;
    find_ranges(shared, signs);  // a channel's range is its own thread's in both
    make_grids(shared, piece, group);
    for (int row = warp; row < K_GROUP; row += NUM_WARPS) {
        float x[ROW_REGS];
        load_row<SOURCE>(x, reinterpret_cast<u8*>(shared->tile), row, shared->scales, signs, false);
        share_row(shared->rows[warp], x);
        pack_row(reinterpret_cast<u8*>(shared->codes), row, shared->rows[warp],
                 [=](float value, int channel) {
                     float steps = value - shared->grids[1][channel];
                     return code_of(__fdiv_rn(steps, shared->grids[0][channel]), 0.0f, LAST_INT4);
                 });
    }
}

// The scale of one V group of a row; a whole warp comes.
__device__ __forceinline__ float v_scale(const float* x, int v_group) {
    float peak = 0.0f;
    for (int i = threadIdx.x % 32; i < V_GROUP; i += 32) {
        peak = nan_max(peak, fabsf(x[v_group * V_GROUP + i]));
    }
    peak = warp_peak(peak);
    float scale = at_least(as_half(__fdiv_rn(peak, INT4_MID)), MIN_V_SCALE);
    return peak == 0.0f ? 0.0f : scale;
}

template <int SOURCE>
__device__ __forceinline__ void encode_values(Int4Shared<SOURCE>* shared, u8* piece, int group,
                                              const float* signs) {
    int warp = threadIdx.x / 32;
    for (int row = warp; row < K_GROUP; row += NUM_WARPS) {
        float x[ROW_REGS], scales[NUM_V_GROUPS];
        load_row<SOURCE>(x, reinterpret_cast<u8*>(shared->tile), row, shared->scales, signs, true);
        share_row(shared->rows[warp], x);
        u8* to = piece + INT4_V_SCALES + 2 * (group * K_GROUP + row) * NUM_V_GROUPS;
#pragma unroll
        for (int i = 0; i < NUM_V_GROUPS; ++i) {
            scales[i] = v_scale(shared->rows[warp], i);
            if (threadIdx.x % 32 == 0) store_half(to + 2 * i, scales[i]);
        }
        pack_row(reinterpret_cast<u8*>(shared->codes), row, shared->rows[warp],
                 [&](float value, int channel) {
                     float scale = scales[0];
#pragma unroll
                     for (int i = 1; i < NUM_V_GROUPS; ++i) {
                         scale = channel / V_GROUP == i ? scales[i] : scale;
                     }
                     return code_of(__fdiv_rn(value, scale) + INT4_MID, 0.0f, LAST_INT4);
                 });
    }
}

template <int SOURCE> __device__ __forceinline__ void compress_int4(Pool pool, const int* jobs) {
    constexpr int SOURCE_TOKENS = SOURCE == NATIVE ? BLOCK_SIZE : INT8_TOKENS;  // of a block
    constexpr int NUM_SOURCES = INT4_TOKENS / SOURCE_TOKENS;
    constexpr int ROW_BYTES = SOURCE == NATIVE ? 2 * HEAD_DIM : HEAD_DIM;
    constexpr int TILE_TOKENS = SOURCE_TOKENS < K_GROUP ? SOURCE_TOKENS : K_GROUP;
    DYNAMIC_SHARED(Int4Shared<SOURCE>, shared);
    int group = blockIdx.x % INT4_GROUPS, head = blockIdx.z / 2, layer = blockIdx.y;
    bool is_v = blockIdx.z % 2;
    const int* job = jobs + blockIdx.x / INT4_GROUPS * (1 + NUM_SOURCES);
    u8* tile = reinterpret_cast<u8*>(shared->tile);
    for (int row = 0; row < K_GROUP; row += TILE_TOKENS) {
        int token = group * K_GROUP + row, source = job[1 + token / SOURCE_TOKENS];
        int offset = token % SOURCE_TOKENS;
        copy_tile(tile + row * ROW_BYTES, pool.part(source, layer, is_v, head) + offset * ROW_BYTES,
                  TILE_TOKENS * ROW_BYTES);
        const u8* scales = pool.piece(source, layer, head) + (is_v ? INT8_V_SCALES : 0);
        for (int i = threadIdx.x; SOURCE == INT8 && i < TILE_TOKENS; i += NUM_THREADS) {
            shared->scales[row + i] = load_half(scales + 2 * (offset + i));
        }
    }
    if (threadIdx.x == 0) shared->has_bad_zero = 0;
    __syncthreads();
    u8* piece = pool.piece(job[0], layer, head);
    if (is_v) {
        encode_values(shared, piece, group, pool.signs);
    } else {
        encode_keys(shared, piece, group, pool.signs);
    }
    __syncthreads();
    u8* to = pool.part(job[0], layer, is_v, head) + group * K_GROUP * (HEAD_DIM / 2);
    copy_tile(to, reinterpret_cast<u8*>(shared->codes), K_GROUP * HEAD_DIM / 2);
    if (group == 0 && !is_v) zero_rest(piece, INT4_SIDE_END, pool.side_bytes);
}

// grid: (num_jobs * BLOCK_SIZE / 16, num_layers, num_kv_heads * 2)
extern "C" __global__ void __launch_bounds__(128) compress_native_int4_kernel(
    u8* payload, long long payload_stride, u8* side, long long side_stride,  // as above
    const int* __restrict__ jobs,  // [num_jobs, 1 + 4]
    const float* __restrict__ signs, int num_kv_heads, int side_bytes)
{
    compress_int4<NATIVE>({payload, side, payload_stride, side_stride, num_kv_heads, side_bytes,
                           signs}, jobs);
}

// grid: the same
extern "C" __global__ void __launch_bounds__(128) compress_int8_int4_kernel(
    u8* payload, long long payload_stride, u8* side, long long side_stride,
    const int* __restrict__ jobs,  // [num_jobs, 1 + 2]
    const float* __restrict__ signs, int num_kv_heads, int side_bytes)
{
    compress_int4<INT8>({payload, side, payload_stride, side_stride, num_kv_heads, side_bytes,
                         signs}, jobs);
}

#endif
