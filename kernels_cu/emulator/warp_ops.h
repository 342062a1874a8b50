// What a warp does together, on the operands of its 32 lanes (null: the lane takes no part).
//
// Fragment layouts as in the PTX ISA, "Matrix Fragments for mma.m16n8k8 / m16n8k16", "ldmatrix"
// and "movmatrix"; lane = 4 * group + pair.
#pragma once

#include <stdint.h>
#include <string.h>

#include "emulator.h"
#include "numbers.h"

namespace emulator {

constexpr const char* OP_NAMES[] = {
    "__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
    "a vote", "mma.m16n8k16.f16", "mma.m16n8k16.bf16", "mma.m16n8k8.f16",
    "ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4", "ldmatrix.x1.trans", "ldmatrix.x2.trans",
    "ldmatrix.x4.trans", "movmatrix.trans",
};

typedef Operands* const Lanes[32];

// The lane a shuffle reads from; out of its segment: itself.
inline int source_lane(Op op, int lane, int argument, int width) {
    int first = lane & ~(width - 1), last = first + width - 1;
    switch (op) {
        case SHUFFLE_IDX: return first | (argument & (width - 1));
        case SHUFFLE_UP: return lane - argument < first ? lane : lane - argument;
        case SHUFFLE_DOWN: return lane + argument > last ? lane : lane + argument;
        default: return (lane ^ argument) > last ? lane : lane ^ argument;
    }
}

inline const char* run_shuffle(Op op, Lanes& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        if (!lanes[lane]) continue;
        int source = source_lane(op, lane, int(lanes[lane]->in[1]), int(lanes[lane]->in[2]));
        if (!lanes[source & 31]) return "a shuffle reads from a lane that its mask leaves out";
        lanes[lane]->out[0] = lanes[source & 31]->in[0];
    }
    return nullptr;
}

inline void run_ballot(Lanes& lanes) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= lanes[lane] ? lanes[lane]->in[0] << lane : 0;
    for (int lane = 0; lane < 32; ++lane) {
        if (lanes[lane]) lanes[lane]->out[0] = votes;
    }
}

inline float element(uint32_t pair, int idx, bool is_bf16) {
    uint16_t bits = uint16_t(pair >> (16 * idx));
    return is_bf16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

// d = a b + c. in: a in 0-3 (k = 16) or 0-1 (k = 8), b in 4-5 or 4, c in 6-9. Products and sums are
// kept in double and rounded once, where a tensor core rounds in an order of its own.
inline void run_mma(Lanes& lanes, int num_k, bool is_bf16) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        int group = lane / 4, pair = lane % 4;
        for (int reg = 0; reg < num_k / 4; ++reg) {
            for (int idx = 0; idx < 2; ++idx) {
                int row = group + reg % 2 * 8, k = pair * 2 + reg / 2 * 8 + idx;
                a[row][k] = element(lanes[lane]->in[reg], idx, is_bf16);
            }
        }
        for (int reg = 0; reg < num_k / 8; ++reg) {
            for (int idx = 0; idx < 2; ++idx) {
                int k = pair * 2 + reg * 8 + idx;
                b[k][group] = element(lanes[lane]->in[4 + reg], idx, is_bf16);
            }
        }
    }
    double d[16][8] = {};
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < num_k; ++k) {
            for (int col = 0; col < 8; ++col) d[row][col] += a[row][k] * b[k][col];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int reg = 0; reg < 4; ++reg) {
            float c;
            memcpy(&c, &lanes[lane]->in[6 + reg], 4);
            float sum = float(d[lane / 4 + reg / 2 * 8][lane % 4 * 2 + reg % 2] + c);
            memcpy(&lanes[lane]->out[reg], &sum, 4);
        }
    }
}

// Hand out 8x8 matrix number `reg`: lane gets two neighbours of its row, or of its column.
inline void hand_out(Lanes& lanes, const uint16_t (&matrix)[8][8], int reg, bool is_trans) {
    for (int lane = 0; lane < 32; ++lane) {
        int group = lane / 4, pair = lane % 4 * 2;
        uint32_t low = is_trans ? matrix[pair][group] : matrix[group][pair];
        uint32_t high = is_trans ? matrix[pair + 1][group] : matrix[group][pair + 1];
        lanes[lane]->out[reg] = low | high << 16;
    }
}

inline int ldmatrix_rows(Op op) {
    int idx = (op - LDMATRIX_X1) % 3;
    return 8 << idx;
}

inline void run_ldmatrix(Op op, Lanes& lanes) {
    for (int reg = 0; reg < ldmatrix_rows(op) / 8; ++reg) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row) memcpy(matrix[row], lanes[8 * reg + row]->address, 16);
        hand_out(lanes, matrix, reg, op >= LDMATRIX_X1_TRANS);
    }
}

inline void run_movmatrix(Lanes& lanes) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        memcpy(&matrix[lane / 4][lane % 4 * 2], lanes[lane]->in, 4);
    }
    hand_out(lanes, matrix, 0, true);
}

// Fills the lanes' `out`; an error, or null.
inline const char* run_warp_op(Op op, Lanes& lanes) {
    for (int lane = 0; op >= MMA_16X8X16_F16 && lane < 32; ++lane) {
        if (!lanes[lane]) return "a matrix operation needs all 32 lanes";
    }
    switch (op) {
        case SYNC_WARP: break;
        case VOTE_BALLOT: run_ballot(lanes); break;
        case MMA_16X8X16_F16: run_mma(lanes, 16, false); break;
        case MMA_16X8X16_BF16: run_mma(lanes, 16, true); break;
        case MMA_16X8X8_F16: run_mma(lanes, 8, false); break;
        case MOVMATRIX_TRANS: run_movmatrix(lanes); break;
        case SHUFFLE_IDX:
        case SHUFFLE_UP:
        case SHUFFLE_DOWN:
        case SHUFFLE_XOR: return run_shuffle(op, lanes);
        default: run_ldmatrix(op, lanes);
    }
    return nullptr;
}

}  // namespace emulator
