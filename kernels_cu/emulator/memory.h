// The memory a kernel may touch: its arguments, its shared memory, its own module. Knows no threads.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <vector>

#include "shadow.h"

extern "C" char __ehdr_start __attribute__((visibility("hidden")));
extern "C" char _end __attribute__((visibility("hidden")));
extern "C" char __start_emulated_shared __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulated_shared __attribute__((weak, visibility("hidden")));

namespace emulator {

struct Region {
    const char* name;
    uintptr_t base;
    size_t num_bytes;
    std::unique_ptr<Shadow> shadow;  // null: a const argument

    bool holds(uintptr_t address) const { return address - base < num_bytes; }
    bool holds(uintptr_t address, int size) const {
        return holds(address) && address + size <= base + num_bytes;
    }
};

inline Region make_region(const char* name, const void* base, size_t num_bytes, bool is_shared) {
    Region region = {name, reinterpret_cast<uintptr_t>(base), num_bytes, nullptr};
    region.shadow = std::make_unique<Shadow>(!is_shared, num_bytes);
    return region;
}

class Memory {
  public:
    long long num_read = 0, num_written = 0;  // bytes of arguments

    void add_argument(void* base, size_t num_bytes, bool is_writable) {
        arguments_.push_back(make_region("an argument", base, num_bytes, false));
        if (!is_writable) arguments_.back().shadow = nullptr;
    }

    void clear_arguments() {
        arguments_.clear();
        last_ = 0;
        num_read = num_written = 0;
    }

    void start_launch(size_t dynamic_bytes) {
        shared_.clear();
        dynamic_.resize(dynamic_bytes + ALIGNMENT);  // an empty one has an address too
        size_t static_bytes = &__stop_emulated_shared - &__start_emulated_shared;
        shared_.push_back(
            make_region("dynamic shared memory", dynamic(), dynamic_bytes, true));
        shared_.push_back(
            make_region("static shared memory", &__start_emulated_shared, static_bytes, true));
    }

    void start_block() {
        for (const Region& region : shared_) {
            memset(reinterpret_cast<void*>(region.base), 0xff, region.num_bytes);
        }
    }

    void* dynamic() {
        uintptr_t address = reinterpret_cast<uintptr_t>(dynamic_.data()) + ALIGNMENT - 1;
        return reinterpret_cast<void*>(address - address % ALIGNMENT);
    }

    // The shared memory that holds all these bytes, or null.
    Region* find_shared(const void* pointer, int num_bytes) {
        for (Region& region : shared_) {
            if (region.holds(reinterpret_cast<uintptr_t>(pointer), num_bytes)) return &region;
        }
        return nullptr;
    }

    // Records an access; what is wrong with it, or null.
    const char* check(const void* pointer, int num_bytes, const Access& access,
                      const Clock& clock) {
        uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
        Region* region = find_shared(pointer, num_bytes);
        if (region) return check_order(*region, address, num_bytes, access, clock);
        region = find_argument(address, num_bytes);
        if (!region) return is_own(address) ? nullptr : outside(address, num_bytes, access);
        if (access.is_write && !region->shadow) return "write to a const argument";
        (access.is_write ? num_written : num_read) += num_bytes;
        return region->shadow ? check_order(*region, address, num_bytes, access, clock) : nullptr;
    }

  private:
    Region* find_argument(uintptr_t address, int num_bytes) {
        for (size_t tried = 0; tried < arguments_.size(); ++tried) {
            size_t idx = (last_ + tried) % arguments_.size();
            if (!arguments_[idx].holds(address, num_bytes)) continue;
            last_ = idx;
            return &arguments_[idx];
        }
        return nullptr;
    }

    // Constants and the emulator's own variables.
    static bool is_own(uintptr_t address) {
        return address >= reinterpret_cast<uintptr_t>(&__ehdr_start) &&
               address < reinterpret_cast<uintptr_t>(&_end);
    }

    const char* outside(uintptr_t address, int num_bytes, const Access& access) {
        snprintf(text_, sizeof text_, "%s of %d bytes outside every argument and shared memory%s",
                 access.is_write ? "write" : "read", num_bytes,
                 address < 4096 ? " (null pointer)" : "");
        return text_;
    }

    const char* check_order(Region& region, uintptr_t address, int num_bytes,
                            const Access& access, const Clock& clock) {
        size_t offset = address - region.base;
        Conflict conflict = region.shadow->note(offset, num_bytes, access, clock);
        if (!conflict.text) return nullptr;
        int used = snprintf(text_, sizeof text_, "%s (%s of %d bytes at byte %zu of %s",
                            conflict.text, access.is_write ? "write" : "read", num_bytes, offset,
                            region.name);
        if (conflict.other >= 0) {
            used += snprintf(text_ + used, sizeof text_ - used, ", by thread %d of the block",
                             conflict.other);
        }
        snprintf(text_ + used, sizeof text_ - used, ")");
        return text_;
    }

    std::vector<Region> arguments_, shared_;
    static constexpr size_t ALIGNMENT = 128;  // of dynamic shared memory
    std::vector<char> dynamic_;
    size_t last_ = 0;  // argument that was hit last
    char text_[512];
};

}  // namespace emulator
