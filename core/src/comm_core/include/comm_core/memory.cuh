// Loads and stores that other GPUs take part in, each named by what PTX calls it.
//
// All of them bypass the first-level cache, which isn't coherent with other processors, and are `volatile`: none is
// left out, merged or moved across another. "memory" is clobbered only where ordinary accesses must stay on their side
// as well.
#pragma once

#include "vec.cuh"

namespace comm_core {

// Relaxed: carries its own data and orders nothing else. PTX promises that each 32-bit word arrives whole, no more;
// what polls such a vector judges it word by word.
__device__ __forceinline__ void store_relaxed_sys(void* address, const Vec& vec) {
    asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "r"(vec.x),
                 "r"(vec.y),
                 "r"(vec.z),
                 "r"(vec.w));
}

__device__ __forceinline__ Vec load_relaxed_sys(const void* address) {
    Vec vec;
    asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(vec.x), "=r"(vec.y), "=r"(vec.z), "=r"(vec.w)
                 : "l"(address));
    return vec;
}

// Release: whatever this thread did before, and what it saw of others' doing (a barrier's threads, say), is visible to
// who reads this word with acquire order.
__device__ __forceinline__ void store_release_sys(uint64_t* address, uint64_t word) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(word) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* address) {
    uint64_t word;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
    return word;
}

// An ordinary load of 16 bytes: of what this launch's predecessors wrote, or a barrier ordered. Asm, so that a loop's
// loads stay together in front of the stores that follow.
__device__ __forceinline__ Vec load(const void* address) {
    Vec vec;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(vec.x), "=r"(vec.y), "=r"(vec.z), "=r"(vec.w)
                 : "l"(address));
    return vec;
}

__device__ __forceinline__ void store(void* address, const Vec& vec) {
    asm volatile(
        "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(vec.x), "r"(vec.y), "r"(vec.z), "r"(vec.w));
}

// Has the line brought to the second-level cache, which is coherent: nothing is read, and nothing has to be ordered.
__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace comm_core
