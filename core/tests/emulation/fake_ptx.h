// What stands for inline PTX and the GPU's registers where the kernels run on CPU threads; see emulate.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sched.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace fake {

// Two sets of a lane's numbers in turn: who writes to one again has met the others between.
struct Warp {
    std::barrier<> sync{32};
    float numbers[2][32];
};

struct Cluster;

// An mbarrier of one arrival a phase.
struct Gate {
    std::mutex mutex;
    bool expects = false;
    int64_t nbytes = 0;
    uint32_t openings = 0;

    void count(int64_t change, bool arrival) {
        const std::scoped_lock lock(mutex);
        if (arrival && expects) std::abort();
        expects = expects || arrival;
        nbytes += change;
        if (!expects || nbytes != 0) return;
        expects = false;
        ++openings;
    }
    uint32_t opened() {
        const std::scoped_lock lock(mutex);
        return openings;
    }
};

struct Block {
    std::unique_ptr<std::barrier<>> sync;
    unsigned long long epoch = 0;
    Cluster* cluster = nullptr;
    std::vector<std::unique_ptr<Warp>> warps;
    alignas(16) float numbers[1024];
    Gate gates[2];
};

struct Cluster {
    explicit Cluster(uint32_t threads) : sync(threads) {}

    std::barrier<> sync;
    std::vector<Block*> blocks;
};

struct Index {
    uint32_t x;
};

inline thread_local Block* block;
inline thread_local uint32_t warp_turn;
inline thread_local std::optional<std::barrier<>::arrival_token> arrival;

}  // namespace fake

inline thread_local fake::Index threadIdx, blockIdx, gridDim, blockDim;

inline void __syncthreads() {
    fake::block->sync->arrive_and_wait();
}
inline void __syncwarp() {
    fake::block->warps[threadIdx.x / 32]->sync.arrive_and_wait();
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

// Without optimisation, no compiler makes the product part of a fused multiply-add.
inline float __fmul_rn(float one, float other) {
    return one * other;
}
inline float rsqrtf(float number) {
    return 1.0f / std::sqrt(number);
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
inline uint32_t load_relaxed_sys(const uint32_t* address) {
    sched_yield();
    return load_word(address, std::memory_order_relaxed);
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

inline void launch_successor() {}
inline void wait_for_predecessors() {}
inline void prefetch(const void*) {}

inline uint32_t blocks_in_cluster() {
    return static_cast<uint32_t>(fake::block->cluster->blocks.size());
}
inline uint32_t block_in_cluster() {
    return blockIdx.x % blocks_in_cluster();
}
inline uint32_t cluster_in_grid() {
    return blockIdx.x / blocks_in_cluster();
}
inline uint32_t clusters_in_grid() {
    return gridDim.x / blocks_in_cluster();
}
// As the butterfly of shuffles, in its order.
inline float warp_sum(float number) {
    fake::Warp& warp = *fake::block->warps[threadIdx.x / 32];
    float* const numbers = warp.numbers[fake::warp_turn];
    fake::warp_turn ^= 1;
    numbers[threadIdx.x % 32] = number;
    warp.sync.arrive_and_wait();
    float sums[32];
    std::memcpy(sums, numbers, sizeof sums);
    for (int mask = 16; mask > 0; mask /= 2) {
        for (int lane = 0; lane < mask; ++lane) sums[lane] += sums[lane + mask];
    }
    return sums[0];
}
template <int kLanes = 32>
float warp_max(float number) {
    fake::Warp& warp = *fake::block->warps[threadIdx.x / 32];
    float* const numbers = warp.numbers[fake::warp_turn];
    fake::warp_turn ^= 1;
    numbers[threadIdx.x % 32] = number;
    warp.sync.arrive_and_wait();
    const uint32_t first = threadIdx.x % 32 / kLanes * kLanes;
    float largest = 0.0f;
    for (uint32_t lane = first; lane < first + kLanes; ++lane) largest = fmaxf(largest, numbers[lane]);
    return largest;
}
using Gate = fake::Gate;

template <uint32_t count>
Gate* shared_gates() {
    static_assert(count == 2);
    return fake::block->gates;
}
inline void set_up(Gate*) {}
inline void cluster_arrive() {
    fake::arrival = fake::block->cluster->sync.arrive();
}
inline void cluster_wait() {
    fake::block->cluster->sync.wait(std::move(*fake::arrival));
}
inline void expect(Gate* gate, uint32_t nbytes) {
    gate->count(nbytes, true);
}
inline void post(float* place, Gate* gate, uint32_t block, float number) {
    fake::Block& there = *fake::block->cluster->blocks[block];
    sched_yield();
    std::atomic_ref<float>(there.numbers[place - fake::block->numbers]).store(number);
    there.gates[gate - fake::block->gates].count(-4, false);
}
inline void pass(Gate* gate, uint32_t parity) {
    while (gate->opened() % 2 == parity) sched_yield();
}
template <uint32_t count>
float* shared_numbers() {
    static_assert(count <= sizeof fake::Block::numbers / sizeof(float));
    return fake::block->numbers;
}

template <typename T>
T ready(T value) {
    return value;
}

struct WaitCounts {
    uint64_t waits, total_ns, longest_ns;
};

struct Bound {
    uint32_t* error;
    uint64_t timeout_ns;
    WaitCounts* counts;
};

class SpinGuard {
  public:
    // Of a minute and more, as a thread sleeps between most of its polls.
    static constexpr uint32_t kMinute = 600'000;
    // The polls of a wait that isn't counted.
    static constexpr uint32_t kShortPolls = 16;
    // The limit of a thread's polls in one launch; small in tests with a peer that never comes.
    static inline uint32_t most_polls = kMinute;
    // How long a thread polls at least, however often: where a peer that comes must not be given up.
    static inline std::chrono::milliseconds least{0};
    // How many waits have become long so far, of all threads and ranks.
    static inline std::atomic<uint32_t> long_waits{0};

    template <typename Poll>
    void wait(const Bound& bound, bool is_counter, const Poll& poll) {
        const auto since = std::chrono::steady_clock::now();
        uint32_t rank = 0, polls = 0;
        while (!poll(rank)) {
            if (++polls == kShortPolls) ++long_waits;
            if (expired(bound, rank)) break;
        }
        if (polls < kShortPolls || !is_counter || bound.counts == nullptr) return;
        const std::chrono::nanoseconds elapsed = std::chrono::steady_clock::now() - since;
        const auto elapsed_ns = static_cast<uint64_t>(elapsed.count());
        WaitCounts& counts = bound.counts[rank];
        ++counts.waits;
        counts.total_ns += elapsed_ns;
        if (elapsed_ns > counts.longest_ns) counts.longest_ns = elapsed_ns;
    }

    void give_up(const Bound& bound, uint32_t rank) {
        uint32_t none = 0;  // who gave up first is who tells
        std::atomic_ref<uint32_t>(*bound.error).compare_exchange_strong(none, rank + 1);
        over_ = true;
    }

  private:
    bool expired(const Bound& bound, uint32_t rank) {
        // As in wait.cuh, the word ends every wait once it is set.
        if (++polls_ % 1024 == 0 && std::atomic_ref<uint32_t>(*bound.error).load() != 0) over_ = true;
        if (over_) return true;
        if (polls_ == 1) since_ = std::chrono::steady_clock::now();
        const bool often = polls_ >= most_polls;
        if (!often || std::chrono::steady_clock::now() - since_ < least) {
            // The others need the processors.
            if (often || polls_ > 64) std::this_thread::sleep_for(std::chrono::microseconds(often ? 5000 : 100));
            return false;
        }
        give_up(bound, rank);
        return true;
    }

    std::chrono::steady_clock::time_point since_;
    uint32_t polls_ = 0;
    bool over_ = false;
};

}  // namespace comm_core
