// Every PTX instruction of the kernels, each with its twin for the emulator. Knows no kernel.
//
// How to write a kernel against this header
//   #include "ptx.cuh" first; nothing else of CUDA is needed (no cuda_fp16.h), so that NVRTC
//   compiles without a toolkit. kvchat/attention/kernels.py inlines the text of the .cuh files.
//   Constants of a shape are macros, given as -D by the host: SCALAR_BF16 (0: scalar_t is half_t,
//   1: bfloat16_t), HEAD_DIM, BLOCK_SIZE, ... each kernel file names those it needs at its top.
//   Sizes and strides that may differ from call to call are arguments: int, or long long for
//   offsets into the pool; float. No other scalar types. Pointers: scalar_t, half_t, unsigned char,
//   int, long long, unsigned int, float, double, with const for what is only read.
//     extern "C" __global__ void __launch_bounds__(128) name_kernel(scalar_t* __restrict__ out,
//   A tensor argument `x` may be strided in its first dimension only when the kernel has an
//   argument `x_stride` (long long, elements); otherwise it must be contiguous.
//   Static shared memory: __shared__ arrays of plain types; dynamic: DYNAMIC_SHARED(type, name).
//   16-byte accesses go through load16/store16, which the emulator checks for alignment.
//   Nothing is contracted to fused multiply-adds, here and on the emulator: write fmaf for one.
//   Stay convergent: mma, ldmatrix, movmatrix and shuffles need all 32 lanes.
// How a test launches one, on the emulator: tests/emulator.py
//     kernel = emulated("name", HEAD_DIM=64, SCALAR_BF16=0)     (-DARCH: 800, or ARCH=750)
//     kernel(grid, block, [out, x, 3, x.stride(0)], shared_bytes)     torch CPU tensors
//   and on a GPU: kvchat/attention/kernels.py, load_kernel("name.cu", "name_kernel", defines), then
//     .launch(grid, block, args, shared_bytes); tests/machines.py runs one test on both.
#pragma once

#ifdef KVCHAT_EMULATOR
#include "emulator/emulator.h"
#else
#define INFINITY __int_as_float(0x7f800000)
#endif

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

struct __align__(2) half_t { u16 bits; };
struct __align__(2) bfloat16_t { u16 bits; };

#if SCALAR_BF16
typedef bfloat16_t scalar_t;
#else
typedef half_t scalar_t;
#endif

constexpr u32 FULL_MASK = 0xffffffffu;

// ---- shared memory and 16-byte accesses ---------------------------------------------------------

#ifdef KVCHAT_EMULATOR
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::emulator::dynamic_shared())
#else
extern __shared__ __align__(128) uint4 dynamic_shared_memory[];  // lines of it are 128 bytes
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(dynamic_shared_memory)
#endif

__device__ __forceinline__ uint4 load16(const void* address) {
#ifdef KVCHAT_EMULATOR
    uint4 v;
    ::emulator::load(&v, address, 16);
    return v;
#else
    return *static_cast<const uint4*>(address);
#endif
}

__device__ __forceinline__ void store16(void* address, uint4 value) {
#ifdef KVCHAT_EMULATOR
    ::emulator::store(address, &value, 16);
#else
    *static_cast<uint4*>(address) = value;
#endif
}

// Global memory that is read once and by nobody who writes it. (That it need not stay in L1 is better
// not said: with L1::no_allocate an H200 read a GB of blocks 6 to 12 % slower.)
#ifndef STREAM_HINT
#define STREAM_HINT ""
#endif
__device__ __forceinline__ uint4 load16_stream(const void* address) {
#ifdef KVCHAT_EMULATOR
    return load16(address);
#else
    uint4 v;
    asm volatile("ld.global.nc" STREAM_HINT ".v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
#endif
}

__device__ __forceinline__ uint2 load8_stream(const void* address) {
#ifdef KVCHAT_EMULATOR
    uint2 v;
    ::emulator::load(&v, address, 8);
    return v;
#else
    uint2 v;
    asm volatile("ld.global.nc" STREAM_HINT ".v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
#endif
}

// As __syncthreads, for NUM_THREADS threads, whole warps, that name the same barrier, 0 to 15; 0 is
// that of __syncthreads.
template <int NUM_THREADS> __device__ __forceinline__ void sync_some(int barrier) {
#ifdef KVCHAT_EMULATOR
    ::emulator::sync_some(barrier, NUM_THREADS);
#else
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "n"(NUM_THREADS) : "memory");
#endif
}

// x, of which the compiler knows nothing: what is computed from it is not computed ahead of a loop
// and kept in registers that the loop needs.
__device__ __forceinline__ int opaque(int x) {
#ifndef KVCHAT_EMULATOR
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// Release and acquire for the whole device: what is written before is seen by whoever fences after
// seeing something written after. Cheaper than __threadfence, which also orders fences in one order.
__device__ __forceinline__ void fence_device() {
#ifdef KVCHAT_EMULATOR
    __threadfence();
#else
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// Adds x to *address, in global memory; what it was. As with fence_device before and after it, but
// sooner done: what other threads wrote before a barrier is released too.
__device__ __forceinline__ u32 add_and_fence(u32* address, u32 x) {
#ifdef KVCHAT_EMULATOR
    __threadfence();
    u32 old = atomicAdd(address, x);
    __threadfence();
    return old;
#else
    u32 old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(old) : "l"(address), "r"(x) : "memory");
    return old;
#endif
}

// The sum over the warp's lanes, in all of them.
__device__ __forceinline__ u32 warp_sum(u32 x) {
#if defined(KVCHAT_EMULATOR) || __CUDA_ARCH__ < 800
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
#else
    u32 sum;
    asm volatile("redux.sync.add.u32 %0, %1, 0xffffffff;" : "=r"(sum) : "r"(x));
    return sum;
#endif
}

// ---- numbers ------------------------------------------------------------------------------------
// Names end in the type where an argument cannot tell it; a pair is two scalars in a u32, the first
// in its low half.

__device__ __forceinline__ float to_float(half_t x) {
#ifdef KVCHAT_EMULATOR
    return ::emulator::half_to_float(x.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

__device__ __forceinline__ float to_float(bfloat16_t x) {
    return __uint_as_float(u32(x.bits) << 16);
}

template <class T> __device__ T from_float(float x);

template <> __device__ __forceinline__ half_t from_float<half_t>(float x) {
    half_t y;
#ifdef KVCHAT_EMULATOR
    y.bits = ::emulator::double_to_half(x);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
    return y;
}

template <> __device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float x) {
    bfloat16_t y;
#if defined(KVCHAT_EMULATOR)
    y.bits = ::emulator::float_to_bfloat16(x);
#elif __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    u32 bits = __float_as_uint(x);
    y.bits = x != x ? 0x7fff : u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
    return y;
}

template <class T> __device__ __forceinline__ u32 pack2(float low, float high) {
    return from_float<T>(low).bits | u32(from_float<T>(high).bits) << 16;
}

#if !defined(KVCHAT_EMULATOR) && __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ u32 pack2<half_t>(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <> __device__ __forceinline__ u32 pack2<bfloat16_t>(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

template <class T> __device__ __forceinline__ float2 unpack2(u32 pair) {
    return make_float2(to_float(T{u16(pair)}), to_float(T{u16(pair >> 16)}));
}

// a * b + c of pairs, rounded once (bf16 below sm_80: in float, then rounded).
template <class T> __device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    float2 x = unpack2<T>(a), y = unpack2<T>(b), z = unpack2<T>(c);
    return pack2<T>(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
}

#ifndef KVCHAT_EMULATOR
template <> __device__ __forceinline__ u32 fma2<half_t>(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
#if __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ u32 fma2<bfloat16_t>(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
#endif
#endif

// -a of pairs; an fma takes it for nothing.
__device__ __forceinline__ u32 neg2(u32 a) {
#ifdef KVCHAT_EMULATOR
    return a ^ 0x80008000u;
#else
    u32 d;
    asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
#endif
}

// a * b of pairs: fma with -0, which keeps the sign of a zero.
template <class T> __device__ __forceinline__ u32 mul2(u32 a, u32 b) {
    return fma2<T>(a, b, 0x80008000u);
}

// 2^x, off by 2 units of the last place at most; subnormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef KVCHAT_EMULATOR
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / x to a unit in the last place or two; x no subnormal.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef KVCHAT_EMULATOR
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// ---- bytes: codes to halves ---------------------------------------------------------------------

// Byte i of the result is byte (selector >> 4 i & 7) of a (0-3) and b (4-7).
template <u32 SELECTOR> __device__ __forceinline__ u32 prmt(u32 a, u32 b) {
#ifdef KVCHAT_EMULATOR
    u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= u32(bytes >> 8 * (SELECTOR >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return result;
#else
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "n"(SELECTOR));
    return d;
#endif
}

// Bitwise a function of three: TABLE is what it gives for (0xf0, 0xcc, 0xaa).
template <u32 TABLE> __device__ __forceinline__ u32 lop3(u32 a, u32 b, u32 c) {
#ifdef KVCHAT_EMULATOR
    u32 result = 0;
    for (int row = 0; row < 8; ++row) {
        u32 where = (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
        result |= TABLE >> row & 1 ? where : 0;
    }
    return result;
#else
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return d;
#endif
}

constexpr u32 AND_OR = (0xf0 & 0xcc) | 0xaa;  // lop3: (a & b) | c

// Four int8 (bytes 0-3 of `codes`) to two pairs of halves, exactly: 1024 + (c + 128) - 1152.
__device__ __forceinline__ void int8_to_half(u32 codes, u32 (&pairs)[2]) {
    u32 biased = codes ^ 0x80808080u;
    pairs[0] = fma2<half_t>(prmt<0x4140>(biased, 0x64u), 0x3c003c00u, 0xe480e480u);
    pairs[1] = fma2<half_t>(prmt<0x4342>(biased, 0x64u), 0x3c003c00u, 0xe480e480u);
}

// The same to pairs of bf16, exactly: with u the low 7 bits, 128 + u - 128 or, below 0, - 256.
__device__ __forceinline__ void int8_to_bfloat16(u32 codes, u32 (&pairs)[2]) {
    u32 spread[2] = {prmt<0x4140>(codes, 0u), prmt<0x4342>(codes, 0u)};
    for (int i = 0; i < 2; ++i) {
        u32 biased = lop3<AND_OR>(spread[i], 0x007f007fu, 0x43004300u);
        u32 bias = lop3<AND_OR>(spread[i], 0x00800080u, 0xc300c300u);
        pairs[i] = fma2<bfloat16_t>(biased, 0x3f803f80u, bias);
    }
}

// Two rows of INT4 values, bytes x0 x1 (low half of `codes`) of one and y0 y1 of the other, to pairs
// (x, y) less 7.5, exactly: of the low four bits of byte 0, of byte 1, then of the high four bits.
__device__ __forceinline__ void int4_to_centred_half(u32 codes, u32 (&low)[2], u32 (&high)[2]) {
    u32 shifted[4] = {codes << 4, codes >> 4, codes, codes >> 8};
    for (int i = 0; i < 4; ++i) {
        u32 biased = lop3<AND_OR>(shifted[i], 0x00f000f0u, 0x54005400u);  // 64 + c
        (i < 2 ? low[i] : high[i - 2]) = fma2<half_t>(biased, 0x3c003c00u, 0xd478d478u);
    }
}

// ---- tensor cores -------------------------------------------------------------------------------
// lane = 4 * group + pair. a: 16 x 16, registers (row group | group + 8) x (k 2 pair | 2 pair + 8);
// b: 16 x 8, column group, (k 2 pair | 2 pair + 8); d: 16 x 8, row group (0, 1) and group + 8
// (2, 3), columns 2 pair and 2 pair + 1.

#ifdef KVCHAT_EMULATOR
inline void emulated_mma(::emulator::Op op, float (&d)[4], const u32* a, int num_a, const u32* b,
                         int num_b) {
    ::emulator::Operands operands = {};
    for (int i = 0; i < num_a; ++i) operands.in[i] = a[i];
    for (int i = 0; i < num_b; ++i) operands.in[4 + i] = b[i];
    for (int i = 0; i < 4; ++i) operands.in[6 + i] = __float_as_uint(d[i]);
    ::emulator::collective(op, FULL_MASK, operands);
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(operands.out[i]);
}
#endif

#if __CUDA_ARCH__ < 800
// Below sm_80 tensor cores know no bf16: each lane fetches its row and columns, 80 shuffles.
__device__ inline void mma_by_shuffles(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    int lane = threadIdx.x % 32, group = lane & ~3, column = lane % 4 * 8;
    for (int part = 0; part < 4; ++part) {
        for (int reg = 0; reg < 2; ++reg) {
            float2 top = unpack2<bfloat16_t>(__shfl_sync(FULL_MASK, a[2 * reg], group + part));
            float2 low = unpack2<bfloat16_t>(__shfl_sync(FULL_MASK, a[2 * reg + 1], group + part));
            for (int i = 0; i < 2; ++i) {
                u32 pair = __shfl_sync(FULL_MASK, b[reg], column + 4 * i + part);
                float2 weights = unpack2<bfloat16_t>(pair);
                d[i] += top.x * weights.x + top.y * weights.y;
                d[2 + i] += low.x * weights.x + low.y * weights.y;
            }
        }
    }
}

__device__ __forceinline__ void mma_16x8x8(float (&d)[4], u32 a0, u32 a1, u32 b0) {
#ifdef KVCHAT_EMULATOR
    u32 a[2] = {a0, a1};
    emulated_mma(::emulator::MMA_16X8X8_F16, d, a, 2, &b0, 1);
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
#endif
}
#endif

template <class T>
__device__ void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

// d += a b, fp32 sums.
template <>
__device__ __forceinline__ void mma_16x8x16<half_t>(float (&d)[4], const u32 (&a)[4],
                                                    const u32 (&b)[2]) {
#if __CUDA_ARCH__ < 800
    mma_16x8x8(d, a[0], a[1], b[0]);
    mma_16x8x8(d, a[2], a[3], b[1]);
#elif defined(KVCHAT_EMULATOR)
    emulated_mma(::emulator::MMA_16X8X16_F16, d, a, 4, b, 2);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <>
__device__ __forceinline__ void mma_16x8x16<bfloat16_t>(float (&d)[4], const u32 (&a)[4],
                                                        const u32 (&b)[2]) {
#if __CUDA_ARCH__ < 800
    mma_by_shuffles(d, a, b);
#elif defined(KVCHAT_EMULATOR)
    emulated_mma(::emulator::MMA_16X8X16_BF16, d, a, 4, b, 2);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#ifdef KVCHAT_EMULATOR
template <int N> void emulated_ldmatrix(::emulator::Op op, u32 (&r)[N], const void* row) {
    ::emulator::Operands operands = {};
    operands.address = row;
    ::emulator::collective(op, FULL_MASK, operands);
    for (int i = 0; i < N; ++i) r[i] = operands.out[i];
}
#else
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return u32(__cvta_generic_to_shared(pointer));
}
#endif

// 8 x 8 matrices of 16 bits from shared memory, `row` the 16 bytes of one row: of matrix i from
// lanes 8 i .. 8 i + 7. Register i: row group, columns 2 pair and 2 pair + 1 of matrix i; _trans:
// column group, rows 2 pair and 2 pair + 1.
#ifdef KVCHAT_EMULATOR
#define LDMATRIX(name, n, op)                                                      \
    inline void name(u32 (&r)[n], const void* row) { emulated_ldmatrix(::emulator::op, r, row); }
LDMATRIX(ldmatrix_x1, 1, LDMATRIX_X1)
LDMATRIX(ldmatrix_x2, 2, LDMATRIX_X2)
LDMATRIX(ldmatrix_x4, 4, LDMATRIX_X4)
LDMATRIX(ldmatrix_x1_trans, 1, LDMATRIX_X1_TRANS)
LDMATRIX(ldmatrix_x2_trans, 2, LDMATRIX_X2_TRANS)
LDMATRIX(ldmatrix_x4_trans, 4, LDMATRIX_X4_TRANS)
#else
#define LDMATRIX(suffix, trans)                                                                  \
    __device__ __forceinline__ void ldmatrix_x1##suffix(u32 (&r)[1], const void* row) {          \
        asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];"             \
                     : "=r"(r[0]) : "r"(shared_address(row)) : "memory");                        \
    }                                                                                            \
    __device__ __forceinline__ void ldmatrix_x2##suffix(u32 (&r)[2], const void* row) {          \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"         \
                     : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");            \
    }                                                                                            \
    __device__ __forceinline__ void ldmatrix_x4##suffix(u32 (&r)[4], const void* row) {          \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
                     : "r"(shared_address(row)) : "memory");                                     \
    }
LDMATRIX(, "")
LDMATRIX(_trans, ".trans")
#endif
#undef LDMATRIX

// The transpose of an 8 x 8 matrix that lies over the warp as ldmatrix leaves it.
__device__ __forceinline__ u32 movmatrix_trans(u32 pair) {
#ifdef KVCHAT_EMULATOR
    ::emulator::Operands operands = {};
    operands.in[0] = pair;
    ::emulator::collective(::emulator::MOVMATRIX_TRANS, FULL_MASK, operands);
    return operands.out[0];
#else
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
    return d;
#endif
}

// ---- asynchronous copies to shared memory -------------------------------------------------------
// Below sm_80 they are plain copies, done at once. What has been copied is there for this thread
// after cp_async_wait, and for others after a barrier that follows it.

// Global to shared, 16 bytes through L2 only; where !is_valid, zeros, and nothing is read.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, bool is_valid = true) {
#if __CUDA_ARCH__ < 800
    store16(dst, is_valid ? load16(src) : make_uint4(0, 0, 0, 0));
#elif defined(KVCHAT_EMULATOR)
    ::emulator::cp_async(dst, src, 16, is_valid ? 16 : 0);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(dst)), "l"(src), "r"(is_valid ? 16 : 0) : "memory");
#endif
}

// The same from and to so many bytes further on: parts of the instruction, not sums in registers.
template <int TO, int FROM>
__device__ __forceinline__ void cp_async16_at(void* dst, const void* src) {
#if !defined(KVCHAT_EMULATOR) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;"
                 :: "r"(shared_address(dst)), "l"(src), "n"(TO), "n"(FROM) : "memory");
#else
    cp_async16(static_cast<u8*>(dst) + TO, static_cast<const u8*>(src) + FROM);
#endif
}

// The same for 4 bytes (scales), through L1.
__device__ __forceinline__ void cp_async4(void* dst, const void* src, bool is_valid = true) {
#if __CUDA_ARCH__ < 800
    *static_cast<u32*>(dst) = is_valid ? *static_cast<const u32*>(src) : 0;
#elif defined(KVCHAT_EMULATOR)
    ::emulator::cp_async(dst, src, 4, is_valid ? 4 : 0);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(dst)), "l"(src), "r"(is_valid ? 4 : 0) : "memory");
#endif
}

// This thread's copies since the last commit become a group.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ < 800
#elif defined(KVCHAT_EMULATOR)
    ::emulator::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most NUM_PENDING of this thread's latest groups are in flight.
template <int NUM_PENDING> __device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ < 800
#elif defined(KVCHAT_EMULATOR)
    ::emulator::cp_async_wait(NUM_PENDING);
#else
    asm volatile("cp.async.wait_group %0;" :: "n"(NUM_PENDING) : "memory");
#endif
}
