// y = x W^T (+ bias) (+ residual) for 1 to 8 * TOKEN_TILES rows of x: weights stream past once.
//
// Sixteen rows of W are the A operand of mma.m16n8k16, eight rows of x are B; both come straight
// from global memory in 16-byte loads, with k permuted alike. The warps of a block share out K in
// pieces of 128 bytes, and their sums are added in the order of the warps: K is summed in one order
// whatever the number of rows, so that a row's result is the same bits beside any others.
// grid: any; blocks take tiles of 16 rows of W in turn. block: 32 * WARPS.
// Static shared memory: two times the warps' 16 x 8 sums.
// -D: SCALAR_BF16, WARPS, DEPTH (pieces in flight a warp), TOKEN_TILES (1, 2), MIN_BLOCKS,
// INT8_WEIGHTS (by the file: W is int8 with a scale for each row), GATED (W is gate rows then up rows, N of each:
// y = silu(gate) * up).
#pragma once

constexpr int THREADS = 32 * WARPS;
constexpr int PIECE = INT8_WEIGHTS ? 128 : 64;   // elements of K: 128 bytes of a row of W
constexpr int STEPS = PIECE / 16;                // k steps of a piece
constexpr int LOADS = PIECE / 32;                // 16-byte loads of x a lane, row and piece
constexpr int X_WORDS = LOADS * 4;
constexpr int TILE_OUT = GATED ? 8 : 16;         // rows of y^T a tile

#if INT8_WEIGHTS
typedef signed char weight_t;
#else
typedef scalar_t weight_t;
#endif

// One lane's share of a piece of two rows of W.
struct Weights {
    u32 of[2][8];
};

// One lane's share of the same piece of x.
struct Tokens {
    u32 of[TOKEN_TILES][X_WORDS];
};

// Where a warp's loads are: turn `turn` of a tile is piece warp + WARPS * turn. Every warp and tile
// has the same number of turns, a multiple of DEPTH; those past the end of K are empty.
struct Walk {
    int tile, turn;
    __device__ __forceinline__ int piece() const { return int(threadIdx.x) / 32 + WARPS * turn; }
    __device__ __forceinline__ void advance(int num_turns) {
        if (++turn < num_turns) return;
        turn = 0;
        tile += gridDim.x;
    }
};

// The row of W that is row `idx` (0 .. 15) of a tile; rows past the end are the last one again.
__device__ __forceinline__ int weight_row(int tile, int idx, int num_out) {
    int row = min(tile * TILE_OUT + idx % TILE_OUT, num_out - 1);
    return GATED && idx >= 8 ? num_out + row : row;
}

__device__ __forceinline__ void load_weights(Weights& weights, const weight_t* w, const Walk& walk,
                                             int num_out, int dim, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int idx = weight_row(walk.tile, lane / 4 + 8 * half, num_out);
        const weight_t* from =
            w + (long long)idx * dim + walk.piece() * PIECE + lane % 4 * (PIECE / 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint4 v = load16_stream(from + i * (PIECE / 2));
            weights.of[half][4 * i] = v.x, weights.of[half][4 * i + 1] = v.y;
            weights.of[half][4 * i + 2] = v.z, weights.of[half][4 * i + 3] = v.w;
        }
    }
}

// Through L1, where the other blocks of the multiprocessor find the same.
__device__ __forceinline__ void load_tokens(Tokens& tokens, const scalar_t* x, long long x_stride,
                                            int piece, int num_rows, int lane) {
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        int token = 8 * tile + lane / 4;
        const scalar_t* from = x + token * x_stride + piece * PIECE + lane % 4 * (PIECE / 8);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            uint4 v = make_uint4(0, 0, 0, 0);
            int offset = INT8_WEIGHTS ? i / 2 * (PIECE / 2) + i % 2 * 8 : i * (PIECE / 2);
            if (token < num_rows) v = load16(from + offset);
            tokens.of[tile][4 * i] = v.x, tokens.of[tile][4 * i + 1] = v.y;
            tokens.of[tile][4 * i + 2] = v.z, tokens.of[tile][4 * i + 3] = v.w;
        }
    }
}

__device__ __forceinline__ void multiply(float (&sums)[TOKEN_TILES][4], const Weights& weights,
                                         const Tokens& tokens) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        u32 a[4];
#if INT8_WEIGHTS
        u32 top[2], low[2];
#if SCALAR_BF16
        int8_to_bfloat16(weights.of[0][step], top);
        int8_to_bfloat16(weights.of[1][step], low);
#else
        int8_to_half(weights.of[0][step], top);
        int8_to_half(weights.of[1][step], low);
#endif
        a[0] = top[0], a[1] = low[0], a[2] = top[1], a[3] = low[1];
#else
        a[0] = weights.of[0][2 * step], a[1] = weights.of[1][2 * step];
        a[2] = weights.of[0][2 * step + 1], a[3] = weights.of[1][2 * step + 1];
#endif
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
            u32 b[2] = {tokens.of[tile][2 * step], tokens.of[tile][2 * step + 1]};
            mma_16x8x16<scalar_t>(sums[tile], a, b);
        }
    }
}

// ---- results ------------------------------------------------------------------------------------

struct Sums {
    float of[WARPS][TOKEN_TILES][16][9];  // 9: rows stand in different banks
};

__device__ __forceinline__ void store_sums(Sums& shared, float (&sums)[TOKEN_TILES][4], int warp,
                                           int lane) {
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            shared.of[warp][tile][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = sums[tile][i];
            sums[tile][i] = 0.0f;
        }
    }
}

__device__ __forceinline__ float total(const Sums& shared, int token, int idx) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += shared.of[warp][token / 8][idx][token % 8];
    return sum;
}

__device__ __forceinline__ void write_tile(scalar_t* y, const Sums& shared, const float* scales,
                                           const scalar_t* bias, const scalar_t* residual, int tile,
                                           int num_rows, int num_out) {
    for (int idx = threadIdx.x; idx < num_rows * TILE_OUT; idx += THREADS) {
        int token = idx / TILE_OUT, here = idx % TILE_OUT, row = tile * TILE_OUT + here;
        if (row >= num_out) continue;
        float sum = total(shared, token, here);
        if (INT8_WEIGHTS) sum *= scales[row];
        if (bias) sum += to_float(bias[row]);
        if (GATED) {
            float up = total(shared, token, here + 8);
            if (INT8_WEIGHTS) up *= scales[num_out + row];
            if (bias) up += to_float(bias[num_out + row]);
            sum = sum / (1.0f + exp2_approx(-1.44269504f * sum)) * up;
        }
        long long at = (long long)token * num_out + row;
        if (residual) sum += to_float(residual[at]);
        y[at] = from_float<scalar_t>(sum);
    }
}

// ---- the walk -----------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_all(scalar_t* y, const scalar_t* x, long long x_stride,
                                             const weight_t* w, const float* scales,
                                             const scalar_t* bias, const scalar_t* residual,
                                             int num_rows, int num_out, int dim) {
    __shared__ Sums shared[2];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int pieces = dim / PIECE, tiles = (num_out + TILE_OUT - 1) / TILE_OUT;
    int num_turns = (pieces + WARPS * DEPTH - 1) / (WARPS * DEPTH) * DEPTH;
    Walk ahead = {int(blockIdx.x), 0};
    Weights ring[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i, ahead.advance(num_turns)) {
        if (ahead.tile >= tiles || ahead.piece() >= pieces) continue;
        load_weights(ring[i], w, ahead, num_out, dim, lane);
    }
    float sums[TOKEN_TILES][4] = {};
    int parity = 0;
    for (Walk walk = {int(blockIdx.x), 0}; walk.tile < tiles;) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i, ahead.advance(num_turns)) {
            int piece = walk.piece() + WARPS * i;
            if (piece < pieces) {
                Tokens tokens;
                load_tokens(tokens, x, x_stride, piece, num_rows, lane);
                multiply(sums, ring[i], tokens);
            }
            if (ahead.tile >= tiles || ahead.piece() >= pieces) continue;
            load_weights(ring[i], w, ahead, num_out, dim, lane);
        }
        walk.turn += DEPTH;
        if (walk.turn < num_turns) continue;
        store_sums(shared[parity], sums, warp, lane);
        __syncthreads();
        write_tile(y, shared[parity], scales, bias, residual, walk.tile, num_rows, num_out);
        parity ^= 1;
        walk = {walk.tile + int(gridDim.x), 0};
    }
}
