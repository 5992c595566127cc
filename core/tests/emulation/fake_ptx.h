// What stands for inline PTX and the GPU's registers where the kernels run on CPU threads; see emulate.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sched.h>

#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace fake {

struct Block {
    std::unique_ptr<std::barrier<>> sync;
    unsigned long long epoch = 0;
};

struct Index {
    uint32_t x;
};

inline thread_local Block* block;

}  // namespace fake

inline thread_local fake::Index threadIdx, blockIdx, gridDim, blockDim;

inline void __syncthreads() {
    fake::block->sync->arrive_and_wait();
}
inline float __uint_as_float(uint32_t word) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return word;
}
inline uint32_t min(uint32_t one, uint32_t other) {
    return one < other ? one : other;
}
inline uint32_t max(uint32_t one, uint32_t other) {
    return one > other ? one : other;
}

namespace comm_core {

using Vec = uint4;

inline uint32_t load_word(const void* address, std::memory_order order) {
    return std::atomic_ref<uint32_t>(*static_cast<uint32_t*>(const_cast<void*>(address))).load(order);
}
inline void store_word(void* address, uint32_t word, std::memory_order order) {
    std::atomic_ref<uint32_t>(*static_cast<uint32_t*>(address)).store(word, order);
}
// Word by word, with a pause between now and then: what PTX promises of a vector, and no more.
inline Vec load(const void* address) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i)
        words[i] = load_word(static_cast<const char*>(address) + 4 * i, std::memory_order_relaxed);
    return {words[0], words[1], words[2], words[3]};
}
inline Vec load_relaxed_sys(const void* address) {
    sched_yield();
    return load(address);
}
inline void store(void* address, const Vec& vec) {
    const uint32_t words[4] = {vec.x, vec.y, vec.z, vec.w};
    for (int i = 0; i < 4; ++i) store_word(static_cast<char*>(address) + 4 * i, words[i], std::memory_order_relaxed);
}
inline void store_relaxed_sys(void* address, const Vec& vec) {
    store(address, vec);
}
inline void store_relaxed_sys(uint32_t* address, uint32_t word) {
    store_word(address, word, std::memory_order_relaxed);
}
inline void store_release_sys(uint32_t* address, uint32_t word) {
    store_word(address, word, std::memory_order_release);
}
inline uint32_t load_acquire_sys(const uint32_t* address) {
    sched_yield();
    return load_word(address, std::memory_order_acquire);
}
inline void store_release_sys(uint64_t* address, uint64_t word) {
    std::atomic_ref<uint64_t>(*address).store(word, std::memory_order_release);
}
inline uint64_t load_acquire_sys(const uint64_t* address) {
    sched_yield();
    return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(address)).load(std::memory_order_acquire);
}

constexpr int kEpochShift = 20;
constexpr unsigned long long kOneEpoch = 1ull << kEpochShift;

inline unsigned long long next_epoch(unsigned long long* counter) {
    if (threadIdx.x == 0) {
        const unsigned long long share = blockIdx.x == 0 ? kOneEpoch - (gridDim.x - 1) : 1ull;
        fake::block->epoch = std::atomic_ref<unsigned long long>(*counter).fetch_add(share) >> kEpochShift;
    }
    __syncthreads();
    return fake::block->epoch;
}

inline void wait_for_predecessors() {}

template <typename T>
T ready(T value) {
    return value;
}

struct Bound {
    uint32_t* error;
    uint64_t timeout_ns;
};

class Patience {
  public:
    bool ends(const Bound& bound, uint32_t rank) {
        if (++polls_ < 30'000'000) return false;
        *bound.error = rank + 1;
        return true;
    }

  private:
    uint32_t polls_ = 0;
};

}  // namespace comm_core
