// Bounded waits: a kernel whose peer doesn't come ends all the same, and says so in a word of the host's memory.
#pragma once

#include <cstdint>

namespace comm_core {

// What bounds a wait; the same for all of a session's launches.
struct Bound {
    // In host memory that the device sees: 0, or 1 + the rank that didn't come in time.
    uint32_t* error;
    uint64_t timeout_ns;  // of one thread's waits in a launch, from the first that is long
};

// Bounds the polling of one thread. A healthy wait pays a register, an addition and a test a poll; the clock and the
// error word are looked at every 2^12 polls, some milliseconds.
class SpinGuard {
  public:
    // Call it after each poll that found nothing; true: give up. `rank` is the peer that is waited for. What the thread
    // then has isn't what the peer sent, and the session is over: the host raises at the next call.
    __device__ __forceinline__ bool expired(const Bound& bound, uint32_t rank) {
        if (++polls_ & kMask) return over_;
        return look(bound, rank);
    }

  private:
    static constexpr uint32_t kMask = (1u << 12) - 1;

    __device__ __forceinline__ bool look(const Bound& bound, uint32_t rank) {
        uint64_t now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        // Relaxed: the word carries nothing but itself. One that is set ends every wait, so that a replay of a hundred
        // calls after a peer's death isn't a hundred deadlines.
        uint32_t set;
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(set) : "l"(bound.error));
        if (since_ == 0) since_ = now;
        if (set == 0 && now - since_ >= bound.timeout_ns) {
            asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(bound.error), "r"(rank + 1));
            set = rank + 1;
        }
        over_ = set != 0;
        return over_;
    }

    uint64_t since_ = 0;  // the first look: the deadline counts from there
    uint32_t polls_ = 0;
    bool over_ = false;
};

}  // namespace comm_core
