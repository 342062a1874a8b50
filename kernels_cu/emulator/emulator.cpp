// The machine behind emulator.h: fibers, barriers, warp operations, and the checks of memory.
//
// A launch runs its blocks one after another, a block's threads as fibers of one OS thread. Every
// load and store of the kernel arrives here through the hooks that -fsanitize=thread inserts (the
// sanitizer's own library is not linked). What is checked is listed in README.md.
#include "emulator.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>

#include <vector>

#include "fiber.h"
#include "memory.h"
#include "warp_ops.h"

namespace emulator {

ThreadState now;

namespace {

constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 << 10;

enum class State { RUNNABLE, AT_BARRIER, AT_SOME_BARRIER, IN_WARP_OP, EXITED };

struct Copy {  // a cp.async that has not landed
    char* dst;
    const char* src;
    int num_bytes, src_bytes, group;
};

struct Thread {
    Fiber fiber;
    State state;
    Index3 idx;
    Op op;
    unsigned mask;
    Operands* operands;
    const void* pc;  // where it waits
    int barrier;     // of some threads
    std::vector<Copy> copies;
    int num_groups;  // cp.async groups committed
};

Thread threads[MAX_THREADS];
char* stacks;
Fiber host;
int current, num_threads, num_at_barrier, barrier_sum, num_exited;
struct SomeBarrier {  // of some threads
    int num_there, num_awaited;
};
SomeBarrier some_barriers[16];
bool has_synced_all, has_synced_some_by_0;  // in this block: on a GPU both are barrier 0
Memory memory;
Clock clock_now;  // its epoch goes on from block to block
char message[2048];
bool has_failed;
int block_order;
long long num_mma, num_barriers, counts[4];  // counts: as emulator_counts gives them
void (*call_kernel)(void (*)(), void**);
void (*kernel_entry)();
void** kernel_args;

int lane() { return current % 32; }

void resume(int idx) {
    Fiber& from = threads[current].fiber;
    current = idx;
    now.thread_idx = threads[idx].idx;
    if (&threads[idx].fiber != &from) switch_fiber(from, threads[idx].fiber);
}

[[noreturn]] void stop(const void* pc, const char* format, ...) {
    va_list list;
    va_start(list, format);
    int used = snprintf(message, sizeof message, "block (%u, %u, %u) thread (%u, %u, %u)",
                        now.block_idx.x, now.block_idx.y, now.block_idx.z, now.thread_idx.x,
                        now.thread_idx.y, now.thread_idx.z);
    if (pc) {
        long offset = static_cast<const char*>(pc) - &__ehdr_start;
        used += snprintf(message + used, sizeof message - used, " at +0x%lx", offset);
    }
    used += snprintf(message + used, sizeof message - used, ": ");
    vsnprintf(message + used, sizeof message - used, format, list);
    va_end(list);
    has_failed = true;
    leave_fiber(host);
}

const char* place_name(const Thread& thread) {
    switch (thread.state) {
        case State::AT_BARRIER: return "at __syncthreads";
        case State::AT_SOME_BARRIER: return "at a barrier of some threads";
        case State::IN_WARP_OP: return OP_NAMES[thread.op];
        case State::EXITED: return "at its end";
        default: return "running";
    }
}

// Nobody can go on: say who waits for whom.
[[noreturn]] void deadlock() {
    for (int idx = 0; idx < num_threads; ++idx) {
        const Thread& thread = threads[idx];
        if (thread.state != State::IN_WARP_OP) continue;
        int first = idx - idx % 32;
        for (int other = first; other < first + 32; ++other) {
            bool is_named = thread.mask >> (other - first) & 1;
            const Thread& peer = threads[other];
            if (!is_named) continue;
            bool is_there = peer.state == State::IN_WARP_OP && peer.op == thread.op &&
                            peer.mask == thread.mask;
            if (is_there) continue;
            now.thread_idx = thread.idx;
            stop(thread.pc, "divergence: lane %d waits in %s (mask %08x) for lane %d, which is "
                 "%s%s", idx % 32, OP_NAMES[thread.op], thread.mask, other % 32,
                 peer.state == State::IN_WARP_OP ? "in " : "", place_name(peer));
        }
    }
    for (int idx = 0; idx < num_threads; ++idx) {
        if (threads[idx].state != State::AT_BARRIER) continue;
        now.thread_idx = threads[idx].idx;
        stop(threads[idx].pc, "divergence: __syncthreads reached by %d of %d threads, %d returned",
             num_at_barrier, num_threads, num_exited);
    }
    for (int idx = 0; idx < num_threads; ++idx) {
        if (threads[idx].state != State::AT_SOME_BARRIER) continue;
        now.thread_idx = threads[idx].idx;
        int barrier = threads[idx].barrier;
        stop(threads[idx].pc, "divergence: barrier %d reached by %d of %d threads", barrier,
             some_barriers[barrier].num_there, some_barriers[barrier].num_awaited);
    }
    stop(nullptr, "deadlock");
}

void yield() {
    for (int step = 1; step <= num_threads; ++step) {
        int idx = (current + step) % num_threads;
        if (threads[idx].state == State::RUNNABLE) return resume(idx);
    }
    if (num_exited == num_threads) leave_fiber(host);
    deadlock();
}

void run_thread() {
    call_kernel(kernel_entry, kernel_args);
    threads[current].state = State::EXITED;
    ++num_exited;
    yield();
}

Access access_now(bool is_write, bool is_atomic) {
    return {clock_now.epoch, clock_now.warp_time[current], current, is_write, is_atomic};
}

void check(const void* pointer, int num_bytes, bool is_write, bool is_atomic, const void* pc,
           bool is_aligned = true) {
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    uintptr_t own_stack = reinterpret_cast<uintptr_t>(stacks + current * STACK_BYTES);
    if (address - own_stack < STACK_BYTES) return;
    if (is_aligned && num_bytes <= 16 && address & (num_bytes - 1)) {
        stop(pc, "misaligned %s of %d bytes", is_write ? "write" : "read", num_bytes);
    }
    const char* error =
        memory.check(pointer, num_bytes, access_now(is_write, is_atomic), clock_now);
    if (error) stop(pc, "%s", error);
}

// The shadow and the offset of a shared address; stops when it is not one.
Shadow& shared_at(const void* pointer, int num_bytes, size_t& offset, const void* pc) {
    const Region* region = memory.find_shared(pointer, num_bytes);
    if (!region) stop(pc, "%d bytes that are not in shared memory", num_bytes);
    offset = reinterpret_cast<uintptr_t>(pointer) - region->base;
    return *region->shadow;
}

// A row that ldmatrix reads by the address of this thread.
void check_row(const void* row, int thread, const void* pc) {
    size_t offset;
    shared_at(row, 16, offset, pc);
    if (offset % 16) stop(pc, "ldmatrix of a misaligned row (lane %d)", thread % 32);
    Access access = access_now(false, false);
    access.thread = thread;
    const char* error = memory.check(row, 16, access, clock_now);
    if (error) stop(pc, "%s", error);
}

void check_barrier_0(const void* pc) {
    if (!has_synced_all || !has_synced_some_by_0) return;
    stop(pc, "__syncthreads beside barrier 0, which is the same");
}

void release_barrier() {
    ++clock_now.epoch;
    ++num_barriers;
    num_at_barrier = 0;
    for (int idx = 0; idx < num_threads; ++idx) threads[idx].state = State::RUNNABLE;
}

void start_block() {
    ++clock_now.epoch;
    clock_now.block_start = clock_now.epoch;
    clock_now.block_starts.push_back(clock_now.epoch);
    num_at_barrier = num_exited = barrier_sum = current = 0;
    has_synced_all = has_synced_some_by_0 = false;
    for (SomeBarrier& barrier : some_barriers) barrier = {};
    for (Thread& thread : threads) thread.state = State::EXITED;  // lanes that do not exist, too
    memory.start_block();
    for (int idx = 0; idx < num_threads; ++idx) {
        Thread& thread = threads[idx];
        unsigned plane = now.block_dim.x * now.block_dim.y;
        thread.idx = {idx % now.block_dim.x, idx / now.block_dim.x % now.block_dim.y, idx / plane};
        thread.state = State::RUNNABLE;
        thread.copies.clear();
        thread.num_groups = 0;
        clock_now.warp_time[idx] = 0;
        prepare_fiber(thread.fiber, stacks + idx * STACK_BYTES, STACK_BYTES, run_thread);
    }
    now.thread_idx = {0, 0, 0};
    switch_fiber(host, threads[0].fiber);
}

}  // namespace

void fail(const char* text) { stop(__builtin_return_address(0), "%s", text); }

void sync_threads() {
    Thread& thread = threads[current];
    thread.pc = __builtin_return_address(0);
    has_synced_all = true;
    check_barrier_0(thread.pc);
    thread.state = State::AT_BARRIER;
    if (++num_at_barrier == num_threads) return release_barrier();
    yield();
}

void sync_some(int barrier, int num_awaited) {
    Thread& thread = threads[current];
    thread.pc = __builtin_return_address(0);
    if (barrier < 0 || barrier > 15) stop(thread.pc, "there is no barrier %d", barrier);
    has_synced_some_by_0 |= barrier == 0;
    check_barrier_0(thread.pc);
    SomeBarrier& here = some_barriers[barrier];
    if (here.num_there && here.num_awaited != num_awaited) {
        stop(thread.pc, "barrier %d is for %d threads here and for %d elsewhere", barrier,
             num_awaited, here.num_awaited);
    }
    here.num_awaited = num_awaited;
    thread.state = State::AT_SOME_BARRIER;
    thread.barrier = barrier;
    if (++here.num_there < num_awaited) return yield();
    auto is_here = [barrier](const Thread& other) {
        return other.state == State::AT_SOME_BARRIER && other.barrier == barrier;
    };
    for (int idx = 0; idx < num_threads; ++idx) {
        if (is_here(threads[idx]) != is_here(threads[idx - idx % 32])) {
            stop(thread.pc, "barrier %d reached by a part of a warp", barrier);
        }
    }
    ++clock_now.epoch;
    ++num_barriers;
    here.num_there = 0;
    for (int idx = 0; idx < num_threads; ++idx) {
        if (is_here(threads[idx])) threads[idx].state = State::RUNNABLE;
    }
}

int sync_threads_count(int predicate) {
    if (num_at_barrier == 0) barrier_sum = 0;
    barrier_sum += predicate != 0;
    sync_threads();
    int sum = barrier_sum;
    sync_threads();  // nobody starts the next sum before all have read this one
    return sum;
}

void* dynamic_shared() { return memory.dynamic(); }

void collective(Op op, unsigned mask, Operands& operands) {
    Thread& thread = threads[current];
    thread.pc = __builtin_return_address(0);
    if (!(mask >> lane() & 1)) {
        stop(thread.pc, "%s by a lane that its mask leaves out", OP_NAMES[op]);
    }
    thread.op = op;
    thread.mask = mask;
    thread.operands = &operands;
    thread.state = State::IN_WARP_OP;
    int first = current - lane();
    Operands* lanes[32] = {};
    for (int idx = 0; idx < 32; ++idx) {
        if (!(mask >> idx & 1)) continue;
        const Thread& peer = threads[first + idx];
        bool is_there =
            peer.state == State::IN_WARP_OP && peer.op == op && peer.mask == mask;
        if (!is_there) return yield();
        lanes[idx] = peer.operands;
    }
    if (op >= MMA_16X8X16_F16 && op <= MMA_16X8X8_F16) ++num_mma;
    bool is_whole = mask == 0xffffffffu;
    for (int idx = 0; idx < 32; ++idx) {
        if (!lanes[idx]) continue;
        if (op >= LDMATRIX_X1 && op <= LDMATRIX_X4_TRANS && idx < ldmatrix_rows(op)) {
            check_row(lanes[idx]->address, first + idx, thread.pc);
        }
        if (op == SYNC_WARP && is_whole) ++clock_now.warp_time[first + idx];
    }
    const char* error = run_warp_op(op, lanes);
    if (error) stop(thread.pc, "%s", error);
    for (int idx = 0; idx < 32; ++idx) {
        if (lanes[idx]) threads[first + idx].state = State::RUNNABLE;
    }
}

void load(void* value, const void* address, int num_bytes) {
    check(address, num_bytes, false, false, __builtin_return_address(0));
    memcpy(value, address, num_bytes);
}

void store(void* address, const void* value, int num_bytes) {
    check(address, num_bytes, true, false, __builtin_return_address(0));
    memcpy(address, value, num_bytes);
}

void note_atomic(void* address, int num_bytes) {
    check(address, num_bytes, true, true, __builtin_return_address(0));
}

void cp_async(void* dst, const void* src, int num_bytes, int src_bytes) {
    const void* pc = __builtin_return_address(0);
    size_t offset;
    Shadow& shadow = shared_at(dst, num_bytes, offset, pc);
    uintptr_t bits = offset | (src_bytes ? reinterpret_cast<uintptr_t>(src) : 0);
    if (bits & (num_bytes - 1)) stop(pc, "misaligned cp.async of %d bytes", num_bytes);
    if (src_bytes) check(src, src_bytes, false, false, pc);
    check(dst, num_bytes, true, false, pc);
    shadow.set_pending(offset, num_bytes, true);
    memset(dst, 0xff, num_bytes);
    Thread& thread = threads[current];
    thread.copies.push_back({static_cast<char*>(dst), static_cast<const char*>(src), num_bytes,
                             src_bytes, thread.num_groups});
}

void cp_async_commit() { ++threads[current].num_groups; }

void cp_async_wait(int num_pending) {
    Thread& thread = threads[current];
    std::vector<Copy> left;
    for (const Copy& copy : thread.copies) {
        if (copy.group >= thread.num_groups - num_pending) {
            left.push_back(copy);
            continue;
        }
        size_t offset;
        Shadow& shadow = shared_at(copy.dst, copy.num_bytes, offset, __builtin_return_address(0));
        shadow.set_pending(offset, copy.num_bytes, false);
        shadow.note(offset, copy.num_bytes, access_now(true, false), clock_now);
        memset(copy.dst, 0, copy.num_bytes);
        if (copy.src_bytes) memcpy(copy.dst, copy.src, copy.src_bytes);
    }
    thread.copies.swap(left);
}

void fence() { clock_now.fences.insert({clock_now.epoch, current}); }

int launch(void (*call)(void (*)(), void**), void (*kernel)(), void** args, const int* shape) {
    now.grid_dim = {unsigned(shape[0]), unsigned(shape[1]), unsigned(shape[2])};
    now.block_dim = {unsigned(shape[3]), unsigned(shape[4]), unsigned(shape[5])};
    num_threads = shape[3] * shape[4] * shape[5];
    has_failed = false;
    message[0] = 0;
    if (num_threads < 1 || num_threads > MAX_THREADS) {
        snprintf(message, sizeof message, "a block of %d threads", num_threads);
        return 1;
    }
    if (!stacks) {
        stacks = static_cast<char*>(mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    call_kernel = call;
    kernel_entry = kernel;
    kernel_args = args;
    memory.start_launch(shape[6]);
    clock_now.block_starts.clear();
    clock_now.fences.clear();
    int num_blocks = shape[0] * shape[1] * shape[2];
    for (int count = 0; count < num_blocks && !has_failed; ++count) {
        int idx = block_order ? num_blocks - 1 - count : count;
        now.block_idx = {unsigned(idx % shape[0]), unsigned(idx / shape[0] % shape[1]),
                         unsigned(idx / shape[0] / shape[1])};
        start_block();
    }
    return has_failed;
}

extern "C" {

// Memory that the next launch may touch; called once per pointer argument.
void emulator_add_array(void* base, unsigned long long num_bytes, int is_writable) {
    memory.add_argument(base, num_bytes, is_writable);
}
void emulator_reset() {
    memory.clear_arguments();
    num_mma = num_barriers = 0;
}
// Blocks from the first to the last (0), or from the last to the first (1).
void emulator_set_order(int order) { block_order = order; }
const char* emulator_error() { return message; }
// Bytes of arguments read and written, mma, barriers, of the launches since the reset.
const long long* emulator_counts() {
    counts[0] = memory.num_read, counts[1] = memory.num_written;
    counts[2] = num_mma, counts[3] = num_barriers;
    return counts;
}

// What the compiler calls before each access: (address), by kind and size.
#define HOOK(name, is_write, is_atomic, bytes, is_aligned)                                  \
    void __tsan_##name(void* p) {                                                           \
        check(p, bytes, is_write, is_atomic, __builtin_return_address(0), is_aligned);      \
    }
#define HOOKS(bytes)                                     \
    HOOK(read##bytes, false, false, bytes, true)         \
    HOOK(write##bytes, true, false, bytes, true)         \
    HOOK(unaligned_read##bytes, false, false, bytes, false) \
    HOOK(unaligned_write##bytes, true, false, bytes, false) \
    HOOK(volatile_read##bytes, false, true, bytes, true) \
    HOOK(volatile_write##bytes, true, true, bytes, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, unsigned long n) {
    check(p, int(n), false, false, __builtin_return_address(0), false);
}
void __tsan_write_range(void* p, unsigned long n) {
    check(p, int(n), true, false, __builtin_return_address(0), false);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}

}  // namespace emulator
