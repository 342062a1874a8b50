// CUDA's vocabulary for a host compiler: what a .cu file needs to run on a CPU, thread by thread.
//
// Build a kernel file as C++ (-x c++ -fsanitize=thread, see README.md) and link it with
// emulator.cpp. Threads of a block are fibers; every load and store of the kernel is checked.
// Knows CUDA C++ only; the instructions of ptx.cuh are declared at the end.
#pragma once

#include <math.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "numbers.h"

typedef unsigned int emulated_u32;

struct alignas(8) uint2 { unsigned int x, y; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Index3 { unsigned x, y, z; };
struct ThreadState { Index3 thread_idx, block_idx, block_dim, grid_dim; };
extern ThreadState now;  // of the fiber that runs

// Where all lanes of a mask meet: the last to come computes for all.
enum Op : int {
    SYNC_WARP, SHUFFLE_IDX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, VOTE_BALLOT,
    MMA_16X8X16_F16, MMA_16X8X16_BF16, MMA_16X8X8_F16,
    LDMATRIX_X1, LDMATRIX_X2, LDMATRIX_X4,
    LDMATRIX_X1_TRANS, LDMATRIX_X2_TRANS, LDMATRIX_X4_TRANS,
    MOVMATRIX_TRANS,
};

struct Operands {
    emulated_u32 in[10];  // registers, or what an Op says
    emulated_u32 out[4];
    const void* address;  // ldmatrix: this lane's row
};

void collective(Op op, unsigned mask, Operands& operands);
void sync_threads();
int sync_threads_count(int predicate);
void sync_some(int barrier, int num_awaited);  // of the threads that name it
void* dynamic_shared();
[[noreturn]] void fail(const char* text);
void load(void* value, const void* address, int num_bytes);  // checked as one access
void store(void* address, const void* value, int num_bytes);
void note_atomic(void* address, int num_bytes);
void cp_async(void* dst, const void* src, int num_bytes, int src_bytes);
void cp_async_commit();
void cp_async_wait(int num_pending);
void fence();
int launch(void (*call)(void (*)(), void**), void (*kernel)(), void** args, const int* shape);

template <class T>
__attribute__((always_inline)) inline T shuffle(Op op, unsigned mask, T value, int argument,
                                                int width) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    T result;
    for (unsigned part = 0; part < sizeof(T) / 4; ++part) {
        Operands operands = {};
        memcpy(&operands.in[0], reinterpret_cast<const char*>(&value) + 4 * part, 4);
        operands.in[1] = argument;
        operands.in[2] = width;
        collective(op, mask, operands);
        memcpy(reinterpret_cast<char*>(&result) + 4 * part, &operands.out[0], 4);
    }
    return result;
}

__attribute__((always_inline)) inline unsigned ballot(unsigned mask, int predicate) {
    Operands operands = {};
    operands.in[0] = predicate != 0;
    collective(VOTE_BALLOT, mask, operands);
    return operands.out[0];
}

template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic(T* address, F change) {
    note_atomic(address, sizeof(T));
    T old = *address;
    *address = change(old);
    return old;
}

template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) void call_with(void (*kernel)(), void** args,
                                                      std::index_sequence<I...>) {
    reinterpret_cast<void (*)(A...)>(kernel)(*static_cast<A*>(args[I])...);
}

template <class... A>
void call(void (*kernel)(), void** args) {
    call_with<A...>(kernel, args, std::index_sequence_for<A...>());
}

template <class... A>
int launch_typed(void (*kernel)(A...), void** args, const int* shape) {
    return launch(&call<std::remove_cv_t<A>...>, reinterpret_cast<void (*)()>(kernel), args, shape);
}

}  // namespace emulator

// An entry for a kernel: shape is grid x, y, z, block x, y, z, dynamic shared bytes; args point at
// the arguments, as for cuLaunchKernel. 0, or the message is in emulator_error().
#define EMULATED_KERNEL(name)                                            \
    extern "C" int emulate_##name(void** args, const int* shape) {       \
        return ::emulator::launch_typed(&name, args, shape);             \
    }

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("emulated_shared")))

#define threadIdx (::emulator::now.thread_idx)
#define blockIdx (::emulator::now.block_idx)
#define blockDim (::emulator::now.block_dim)
#define gridDim (::emulator::now.grid_dim)

__forceinline__ void __syncthreads() { emulator::sync_threads(); }
__forceinline__ int __syncthreads_count(int predicate) {
    return emulator::sync_threads_count(predicate);
}
__forceinline__ int __syncthreads_or(int predicate) {
    return emulator::sync_threads_count(predicate) != 0;
}
__forceinline__ int __syncthreads_and(int predicate) {
    return emulator::sync_threads_count(!predicate) == 0;
}
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) {
    emulator::Operands operands = {};
    emulator::collective(emulator::SYNC_WARP, mask, operands);
}
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return emulator::shuffle(emulator::SHUFFLE_IDX, mask, value, lane, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emulator::shuffle(emulator::SHUFFLE_UP, mask, value, delta, width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emulator::shuffle(emulator::SHUFFLE_DOWN, mask, value, delta, width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    return emulator::shuffle(emulator::SHUFFLE_XOR, mask, value, lane_mask, width);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulator::ballot(mask, predicate);
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
    return emulator::ballot(mask, predicate) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
    return emulator::ballot(mask, !predicate) == 0;
}

template <class T> struct Same { typedef T type; };
template <class T> T atomicAdd(T* address, typename Same<T>::type value) {
    return emulator::atomic(address, [=](T old) { return T(old + value); });
}
template <class T> T atomicMax(T* address, typename Same<T>::type value) {
    return emulator::atomic(address, [=](T old) { return old > value ? old : value; });
}
template <class T> T atomicMin(T* address, typename Same<T>::type value) {
    return emulator::atomic(address, [=](T old) { return old < value ? old : value; });
}
template <class T> T atomicExch(T* address, typename Same<T>::type value) {
    return emulator::atomic(address, [=](T) { return value; });
}
template <class T> T atomicOr(T* address, typename Same<T>::type value) {
    return emulator::atomic(address, [=](T old) { return T(old | value); });
}
template <class T> T atomicCAS(T* address, typename Same<T>::type expected,
                               typename Same<T>::type value) {
    return emulator::atomic(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
    return emulator::atomic(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline int __float_as_int(float x) { int bits; memcpy(&bits, &x, 4); return bits; }
inline float __int_as_float(int bits) { float x; memcpy(&x, &bits, 4); return x; }
// Never contracted to fused multiply-adds; build with -ffp-contract=off for the rest.
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class T> T __ldg(const T* address) { return *address; }
template <class T> T min(T x, T y) { return y < x ? y : x; }
template <class T> T max(T x, T y) { return x < y ? y : x; }
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
