// Loads, stores and reductions of memory that processors share, each named after its PTX instruction.
//
// The accesses at system scope bypass the first-level cache, which isn't coherent with other processors. All are
// `volatile`: the compiler doesn't remove or merge them, or move one across another. "memory" is clobbered only if
// ordinary accesses, too, mustn't move across.
#pragma once

#include "vec.cuh"

namespace comm_core {

// Relaxed: these order no other accesses. PTX guarantees only that each 32-bit word arrives whole, so a poll checks
// such a vector word by word.
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

__device__ __forceinline__ void store_relaxed_sys(uint32_t* address, uint32_t word) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(word));
}

__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* address) {
    uint32_t word;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(address));
    return word;
}

// Reductions: they return nothing, so the thread doesn't wait for them. Atomic among this device's threads.
__device__ __forceinline__ void add_relaxed_gpu(uint64_t* address, uint64_t number) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(number));
}

__device__ __forceinline__ void max_relaxed_gpu(uint64_t* address, uint64_t number) {
    asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(address), "l"(number));
}

// Release: earlier writes of this thread, and writes of other threads that it has observed (through a barrier, say),
// are visible to a thread that reads this word with acquire order.
__device__ __forceinline__ void store_release_sys(uint64_t* address, uint64_t word) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(word) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* address) {
    uint64_t word;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
    return word;
}

// An ordinary load of 16 bytes, for data that an earlier launch wrote or a barrier ordered. Inline assembly keeps a
// loop's loads together before the stores that follow.
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

// Prefetches the line into the second-level cache, which is coherent: it returns no data, so it needs no order.
__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace comm_core
