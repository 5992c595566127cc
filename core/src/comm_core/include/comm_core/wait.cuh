// Bounded waits: if a peer doesn't come, or comes with another message, the kernel ends anyway and reports the peer in
// a word of host memory. Long waits are counted there too, by peer.
#pragma once

#include <cstdint>

#include "clock.cuh"
#include "memory.cuh"

namespace comm_core {

// The long waits of a rank for one peer.
struct WaitCounts {
    uint64_t waits, total_ns, longest_ns;
};

// The bound of a kernel's waits, the same for all launches of a session. Its pointers are into host memory that is
// mapped on the device; host.h allocates it.
struct Bound {
    uint32_t* error;      // 0, or 1 + the rank that didn't come in time with this rank's message
    uint64_t timeout_ns;  // of a wait
    WaitCounts* counts;   // one for each rank; null: waits aren't counted
};

// Bounds and counts the waits of one thread. A short wait costs an addition and a test a poll.
class SpinGuard {
  public:
    // Polls until the awaited data is there, or the wait must end. `poll(rank)` loads it and returns true if it is
    // there, else sets `rank` to a peer that is missing. If the wait ends early, the data isn't what the peers sent;
    // the session is then over, and the host raises at the next call.
    //
    // If `is_counter`, the wait is counted for the peer that was missing last, without its first 2^4 polls, which take
    // less than 100 µs. A shorter wait is part of every exchange, and isn't counted. Of the threads that wait for one
    // peer, one in a launch should be a counter.
    template <typename Poll>
    __device__ __forceinline__ void wait(const Bound& bound, bool is_counter, const Poll& poll) {
        uint32_t rank = 0;
        // Most waits end here.
#pragma unroll 1
        for (uint32_t polls = 0; polls < kShortPolls; ++polls) {
            if (poll(rank)) return;
        }
        const uint64_t since = globaltimer();
        uint32_t polls = 0;
        while (!over_ && !poll(rank)) {
            if (++polls % kCheckPolls == 0) check_deadline(bound, rank, since);
        }
        if (polls != 0 && is_counter && bound.counts != nullptr) count(bound.counts[rank], globaltimer() - since);
    }

    // Ends this and every later wait of the thread, and reports `rank`: it didn't come in time, or came with another
    // message.
    __device__ __forceinline__ void give_up(const Bound& bound, uint32_t rank) {
        store_relaxed_sys(bound.error, rank + 1);
        over_ = true;
    }

  private:
    static constexpr uint32_t kShortPolls = 1u << 4;
    static constexpr uint32_t kCheckPolls = 1u << 12;  // they take some milliseconds

    __device__ __forceinline__ void check_deadline(const Bound& bound, uint32_t rank, uint64_t since) {
        // Relaxed, since the word publishes no other data. Once it is set it ends every wait, so that after a peer's
        // death a replay of a hundred calls doesn't wait for a hundred deadlines.
        if (load_relaxed_sys(bound.error) != 0) {
            over_ = true;
        } else if (globaltimer() - since >= bound.timeout_ns) {
            give_up(bound, rank);
        }
    }

    // Doesn't wait for the link to the host: the reductions return nothing. They are relaxed, as a reader may see
    // numbers of different waits. Device scope is enough, because the host only reads.
    static __device__ __forceinline__ void count(WaitCounts& counts, uint64_t elapsed_ns) {
        add_relaxed_gpu(&counts.waits, 1);
        add_relaxed_gpu(&counts.total_ns, elapsed_ns);
        max_relaxed_gpu(&counts.longest_ns, elapsed_ns);
    }

    bool over_ = false;
};

}  // namespace comm_core
