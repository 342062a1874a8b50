// fp16 and bf16 as a GPU's cvt instructions read and write them: round to nearest even, NaN 0x7fff.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace emulator {

inline float bfloat16_to_float(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

inline uint16_t float_to_bfloat16(float x) {
    if (x != x) return 0x7fff;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest < 0x400) {  // zero or subnormal: a multiple of 2^-24
        float x = float(rest) * 0x1p-24f;
        return sign ? -x : x;
    }
    uint32_t exponent = rest >= 0x7c00 ? 0x7f800000 : ((rest >> 10) + 112) << 23;
    uint32_t wide = sign | exponent | (rest & 0x3ff) << 13;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

// From double, so that sums of products of halves are rounded once.
inline uint16_t double_to_half(double x) {
    if (x != x) return 0x7fff;
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    double size = fabs(x);
    if (size >= 65520.0) return sign | 0x7c00;
    int exponent;
    frexp(size, &exponent);  // size = [0.5, 1) * 2^exponent
    exponent = size < 0x1p-14 ? -13 : exponent;
    double steps = nearbyint(ldexp(size, 11 - exponent));  // units of the last place, ties to even
    return sign | uint16_t(steps + (exponent + 13) * 1024);
}

}  // namespace emulator
