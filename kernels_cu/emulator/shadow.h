// Who touched each byte of a memory last, and whether that is ordered with who touches it now.
//
// In a block, two accesses of a byte, one of them a write, are ordered when one thread made both,
// when a __syncthreads lies between, or, in one warp, a __syncwarp of all lanes. Shuffles and votes
// order nothing. Atomics do not conflict with each other.
// Between blocks (global memory): no two may write a byte, and one may read what another wrote only
// when a __threadfence of the writer followed, by the same thread or after a __syncthreads. Whether
// the reader waited for that is not known here.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

namespace emulator {

struct Clock {
    uint32_t epoch = 0;                           // __syncthreads and block starts so far
    uint32_t block_start = 0;                     // epoch of this block's start
    uint32_t warp_time[1024];                     // per thread: __syncwarps of its warp
    std::vector<uint32_t> block_starts;           // of this launch
    std::set<std::pair<uint32_t, int>> fences;    // of this launch: (epoch, thread)

    // Whether a write of an earlier block was followed by a fence.
    bool is_published(uint32_t written, int writer) const {
        if (fences.count({written, writer})) return true;
        auto later = fences.lower_bound({written + 1, -1});
        auto end = std::upper_bound(block_starts.begin(), block_starts.end(), written);
        return later != fences.end() && (end == block_starts.end() || later->first < *end);
    }
};

struct Access {
    uint32_t epoch, warp_time;
    int thread;
    bool is_write, is_atomic;
};

struct Conflict {
    const char* text = nullptr;
    int other = -1;
};

class Shadow {
  public:
    // Memory that is never touched costs nothing.
    Shadow(bool is_global, size_t num_bytes)
        : is_global_(is_global),
          bytes_(static_cast<Byte*>(calloc(num_bytes ? num_bytes : 1, sizeof(Byte)))) {}
    ~Shadow() { free(bytes_); }
    Shadow(const Shadow&) = delete;

    void set_pending(size_t offset, int num_bytes, bool is_pending) {
        for (int idx = 0; idx < num_bytes; ++idx) bytes_[offset + idx].is_pending = is_pending;
    }

    // Records an access; the first conflict found, or none.
    Conflict note(size_t offset, int num_bytes, const Access& access, const Clock& clock) {
        for (int idx = 0; idx < num_bytes; ++idx) {
            Conflict conflict = note_byte(bytes_[offset + idx], access, clock);
            if (conflict.text) return conflict;
        }
        return {};
    }

  private:
    static constexpr int ONE_WARP = 1 << 11;  // + warp: several of its lanes have read
    static constexpr int MANY = 1 << 12;      // lanes of several warps have read

    struct Byte {  // zeros: never touched
        uint32_t write_epoch, write_time, read_epoch, read_time;
        int16_t writer, reader, last_reader;
        bool is_pending, is_atomic;
    };

    static bool is_ordered(int thread, uint32_t time, const Access& access) {
        if (thread == access.thread) return true;
        return thread / 32 == access.thread / 32 && time < access.warp_time;
    }

    static bool are_reads_ordered(const Byte& byte, const Access& access) {
        if (byte.reader & MANY) return false;
        if (!(byte.reader & ONE_WARP)) return is_ordered(byte.reader, byte.read_time, access);
        return (byte.reader & ~ONE_WARP) == access.thread / 32 && byte.read_time < access.warp_time;
    }

    Conflict note_byte(Byte& byte, const Access& access, const Clock& clock) const {
        bool is_written = byte.write_epoch >= clock.block_start;
        if (is_global_ && !is_written && byte.write_epoch && !byte.is_atomic) {
            if (access.is_write && !access.is_atomic) return {"two blocks write there", -1};
            if (!access.is_write && !clock.is_published(byte.write_epoch, byte.writer)) {
                return {"read of what another block wrote with no __threadfence after it", -1};
            }
        }
        if (byte.is_pending && is_written) return {"a cp.async is in flight there", byte.writer};
        bool is_recent = is_written && byte.write_epoch == access.epoch;
        bool is_race = is_recent && !is_ordered(byte.writer, byte.write_time, access) &&
                       !(byte.is_atomic && access.is_atomic);
        if (is_race) return {"data race with a write", byte.writer};
        if (access.is_write) return note_write(byte, access);
        if (!is_written && !is_global_) return {"read of what no thread has written", -1};
        note_read(byte, access);
        return {};
    }

    static Conflict note_write(Byte& byte, const Access& access) {
        if (byte.read_epoch == access.epoch && !are_reads_ordered(byte, access)) {
            return {"data race with a read", byte.last_reader};
        }
        byte.write_epoch = access.epoch;
        byte.write_time = access.warp_time;
        byte.writer = access.thread;
        byte.is_atomic = access.is_atomic;
        byte.is_pending = false;
        byte.read_epoch = 0;
        return {};
    }

    static void note_read(Byte& byte, const Access& access) {
        int reader = access.thread, warp = access.thread / 32;
        if (byte.read_epoch == access.epoch && byte.reader != reader) {
            bool is_one_warp = byte.reader & ONE_WARP ? (byte.reader & ~ONE_WARP) == warp
                                                      : byte.reader / 32 == warp;
            reader = byte.reader & MANY || !is_one_warp ? MANY : ONE_WARP | warp;
        }
        byte.reader = reader;
        byte.last_reader = access.thread;
        byte.read_epoch = access.epoch;
        byte.read_time = access.warp_time;
    }

    bool is_global_;
    Byte* bytes_;
};

}  // namespace emulator
