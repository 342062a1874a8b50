// RoPE on q and k, the slot write of k and v, and q in the forms that decoding needs.
//
// A warp takes HEADS heads of one token, of q, k and v alike; a lane two vectors of VEC channels,
// one in each half of the head, which RoPE turns together. float32 inside, k rounded once.
// The rotated q for INT8 keys (rotate() of kv/codecs.py) comes from the unrounded q and is always
// fp16: codes meet it in fp16 products, and bf16's 8 bits would cost more than the codes do.
// block: 128 threads. Static shared memory: HEADS rows of floats a warp. Called once a layer.
#include "ptx.cuh"
#include "block_codec.cuh"

constexpr int HALF_DIM = HEAD_DIM / 2;
constexpr int VEC = HALF_DIM % 8 == 0 ? 8 : 4;
constexpr int LANES = HALF_DIM / VEC < 32 ? HALF_DIM / VEC : 32;  // of a head
constexpr int HEADS = 32 / LANES;
constexpr int NUM_WARPS = 4;
static_assert(HEAD_DIM % 8 == 0 && HALF_DIM / VEC <= 32, "head dim");

__device__ __forceinline__ void load_vector(float (&x)[VEC], const scalar_t* from) {
    u32 pairs[VEC / 2];
#if HEAD_DIM % 16 == 0
    uint4 v = load16(from);
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
#else
    uint2 v = *reinterpret_cast<const uint2*>(from);
    pairs[0] = v.x, pairs[1] = v.y;
#endif
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
        float2 pair = unpack2<scalar_t>(pairs[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}

template <class T> __device__ __forceinline__ void store_vector(T* to, const float (&x)[VEC]) {
#if HEAD_DIM % 16 == 0
    store16(to, make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                           pack2<T>(x[6], x[7])));
#else
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]));
#endif
}

// Both halves of a head by one position's angles.
__device__ __forceinline__ void rope(float (&low)[VEC], float (&high)[VEC], const float* cos,
                                     const float* sin) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        float a = low[i], b = high[i];
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}

// rotate() of HEADS rows in shared memory; the whole warp comes here.
__device__ __forceinline__ void rotate_rows(float* rows, const float* signs) {
    int lane = threadIdx.x % 32;
    __syncwarp();
    for (int head = 0; head < HEADS; ++head) {
        float x[ROW_REGS];
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) {
            int channel = 32 * reg + lane;
            x[reg] = channel < HEAD_DIM ? rows[head * HEAD_DIM + channel] : 0.0f;
        }
        rotate(x, signs);
#pragma unroll
        for (int reg = 0; reg < ROW_REGS; ++reg) {
            int channel = 32 * reg + lane;
            if (channel < HEAD_DIM) rows[head * HEAD_DIM + channel] = x[reg];
        }
    }
    __syncwarp();
}

// grid: (num_tokens, ceil((num_heads + 2 num_kv_heads) / HEADS / NUM_WARPS))
extern "C" __global__ void __launch_bounds__(128) rope_write_kv_kernel(
    scalar_t* __restrict__ q_out,      // [num_tokens, num_heads, HEAD_DIM]
    half_t* __restrict__ q_rotated,    // the same shape, or null: not wanted
    u8* __restrict__ payload,          // [num_blocks, 2, num_kv_heads, PART_BYTES] of this layer
    long long payload_stride,          // bytes from block to block
    const scalar_t* __restrict__ q,    // [num_tokens, num_heads, HEAD_DIM]
    long long q_stride,                // elements from token to token
    const scalar_t* __restrict__ k,    // [num_tokens, num_kv_heads, HEAD_DIM]
    long long k_stride,
    const scalar_t* __restrict__ v,    // the same shape
    long long v_stride,
    const float* __restrict__ cos,     // [max_len, HEAD_DIM / 2]
    const float* __restrict__ sin,
    const float* __restrict__ signs,   // [HEAD_DIM]; null where q_rotated is
    const int* __restrict__ positions, // [num_tokens]
    const int* __restrict__ slots,     // [num_tokens]; -1 or one of the null block: k, v not stored
    int num_heads, int num_kv_heads)
{
    __shared__ float shared_rows[NUM_WARPS][HEADS * HEAD_DIM];
    int token = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = (blockIdx.y * NUM_WARPS + warp) * HEADS;  // this warp's first head of q, k, v
    int head = first + lane / LANES, channel = lane % LANES * VEC;
    bool is_active = lane < HEADS * LANES && head < num_heads + 2 * num_kv_heads;
    bool is_q = head < num_heads;
    int kv_head = (head - num_heads) % num_kv_heads;
    bool is_v = head >= num_heads + num_kv_heads;
    float low[VEC], high[VEC];
    if (is_active) {
        const scalar_t* from = is_q   ? q + token * q_stride + head * HEAD_DIM
                               : is_v ? v + token * v_stride + kv_head * HEAD_DIM
                                      : k + token * k_stride + kv_head * HEAD_DIM;
        load_vector(low, from + channel);
        load_vector(high, from + HALF_DIM + channel);
        if (!is_v) {
            long long angle = (long long)positions[token] * HALF_DIM + channel;
            rope(low, high, cos + angle, sin + angle);
        }
    }
    if (is_active && !is_q && slots[token] >= BLOCK_SIZE) {
        int block = slots[token] / BLOCK_SIZE, offset = slots[token] % BLOCK_SIZE;
        u8* part = payload + block * payload_stride + part_offset(0, is_v, kv_head, num_kv_heads);
        scalar_t* to = reinterpret_cast<scalar_t*>(part) + offset * HEAD_DIM;
        store_vector(to + channel, low);
        store_vector(to + HALF_DIM + channel, high);
    }
    long long q_row = ((long long)token * num_heads + head) * HEAD_DIM;
    if (is_active && is_q) {
        store_vector(q_out + q_row + channel, low);
        store_vector(q_out + q_row + HALF_DIM + channel, high);
    }
    if (!q_rotated || first >= num_heads) return;  // whole warps
    float* rows = shared_rows[warp];
    float* own = rows + lane / LANES * HEAD_DIM + channel;
    if (lane < HEADS * LANES) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            own[i] = is_active ? low[i] : 0.0f;
            own[HALF_DIM + i] = is_active ? high[i] : 0.0f;
        }
    }
    rotate_rows(rows, signs);
    if (!is_active || !is_q) return;
#pragma unroll
    for (int i = 0; i < VEC; ++i) low[i] = own[i], high[i] = own[HALF_DIM + i];
    store_vector(q_rotated + q_row + channel, low);
    store_vector(q_rotated + q_row + HALF_DIM + channel, high);
}
