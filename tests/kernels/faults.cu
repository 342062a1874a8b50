// One fault each, for the emulator to find; fault 0 has none. The line of a fault is marked.
//
// grid: 2 blocks of 64 threads, the second for faults between blocks only; 64 dynamic floats.
#include "ptx.cuh"

extern "C" __global__ void faults_kernel(
    float* __restrict__ out,      // [64]
    const float* __restrict__ x,  // [64]
    int fault)
{
    __shared__ float values[64];
    __shared__ uint4 vectors[64];
    DYNAMIC_SHARED(float, dynamic);
    int i = threadIdx.x;
    if (fault >= 50) {
        if (blockIdx.x == 0 && fault != 50) {
            out[i] = x[i];
            if (fault == 51 && i) __threadfence();                    // not the first thread
            if (fault >= 52) __syncthreads();
            if (fault == 52 && i == 0) __threadfence();               // right: after a barrier
            if (fault == 53 && i == 5) out[6] = 0.0f;                 // right: a barrier between
        } else if (fault == 50) {
            out[i] = x[i];                                            // both blocks write
        } else if (i) {
            if (fault == 51) values[i] = out[0];                      // perhaps not there yet
            if (fault == 52) values[i] = out[63 - i];
        }
        if (fault == 54) out[i] = out[63 - i];                        // no barrier
        return;
    }
    if (blockIdx.x) return;
    if (fault == 1) out[i + 60] = x[i];                               // out of bounds
    if (fault == 2) const_cast<float*>(x)[i] = 0.0f;                  // a const argument
    if (fault == 3) out[i] = load16(x + i).x > 0;                     // misaligned
    if (fault == 4) out[i] = values[i];                               // nobody wrote it
    if (fault == 5) values[i] = x[i], out[i] = values[i ^ 32];        // no barrier before the read
    if (fault == 6) values[i] = x[i], out[i] = values[i ^ 1];         // the same within a warp
    if (fault == 7) values[i] = x[i], __syncthreads(), out[i] = values[63 - i], values[i] = 0.0f;
    if (fault == 8) values[0] = x[i];                                 // all write one place
    if (fault == 9 && i < 40) __syncthreads();                        // not all come
    if (fault == 16 && i < 32) sync_some<64>(3);                      // so few do not make it
    if (fault == 18) sync_some<64>(1 + i / 32);                       // nor do those of another
    if (fault == 19 && i % 32 < 16) sync_some<32>(3);                 // half warps
    if (fault == 34) {
        if (i < 32) sync_some<64>(3);
        else sync_some<32>(3);                                        // for how many?
    }
    if (fault == 35) {
        if (i < 32) sync_some<32>(0);                                 // the barrier of all
        __syncthreads();
    }
    if (fault == 36) sync_some<64>(16);                               // there are 16
    if (fault == 17) {                                                // right: each warp its own
        values[i] = x[i];
        sync_some<32>(i / 32);
        out[i] = values[i ^ 31];
    }
    if (fault == 10 && i < 8) out[i] = __shfl_sync(FULL_MASK, x[i], 0);      // not all lanes come
    if (fault == 11 && i < 8) out[i] = __shfl_sync(0xffu, x[i], 9);          // from a lane left out
    if (fault == 12) out[i] = __shfl_sync(0xffu, x[i], 0);                   // by a lane left out
    if (fault == 13 && i % 32 < 16) out[i] = movmatrix_trans(i);             // half a warp
    if (fault == 14) dynamic[i + 1] = 0.0f;                           // beyond dynamic memory
    if (fault == 15) out[i] = x[i] + *(i == 5 ? static_cast<const float*>(nullptr) : x);
    if (fault >= 20 && fault < 30) {
        cp_async16(&vectors[i], x + 4 * (i % 16));
        cp_async_commit();
        if (fault == 20) out[i] = vectors[i].x;                       // no wait
        if (fault == 21) cp_async16(&vectors[i ^ 1], x);              // into what is in flight
    }
    if (fault >= 30 && fault < 40) {
        cp_async16(&vectors[i], x + 4 * (i % 16));
        cp_async_commit();
        cp_async_wait<1>();                                           // one group may be in flight
        if (fault == 30) out[i] = vectors[i].x;
        cp_async_wait<0>();
        if (fault == 31) out[i] = vectors[63 - i].x;                  // no barrier after the wait
        __syncthreads();
        if (fault == 32) vectors[i ^ 1] = vectors[i];                 // read and write, no barrier
        if (fault == 33) cp_async16(values + 2, x);                   // misaligned in shared memory
    }
    if (fault == 40) {
        u32 r[4];
        vectors[i] = make_uint4(i, i, i, i);
        ldmatrix_x4(r, &vectors[i / 32 * 32 + (i + 1) % 32]);         // another lane's row, no sync
        out[i] = r[0];
    }
    if (fault == 41) {
        if (i % 32 < 16) out[i] = __shfl_sync(FULL_MASK, x[i], 0);    // two instructions
        else out[i] = __shfl_xor_sync(FULL_MASK, x[i], 1);
    }
    if (fault == 0) {
        values[i] = x[i];
        __syncwarp();
        float other = values[i ^ 1];
        __syncthreads();
        values[63 - i] = other;
        if (i == 0) dynamic[0] = 0.0f;
        __syncthreads();
        atomicAdd(&dynamic[0], 1.0f);  // atomics do not race with each other
        __syncthreads();
        out[i] = values[i] + dynamic[0];
    }
}
