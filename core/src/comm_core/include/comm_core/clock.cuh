// The device's clock.
#pragma once

#include <cstdint>

namespace comm_core {

// Returns a time in nanoseconds, the same clock for all threads of a device. It may advance in steps of a microsecond.
__device__ __forceinline__ uint64_t globaltimer() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

}  // namespace comm_core
