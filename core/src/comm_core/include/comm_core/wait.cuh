// Bounded waits: if a peer doesn't come, or comes with another message, the kernel ends anyway and reports the peer in
// a word of host memory.
#pragma once

#include <cstdint>

namespace comm_core {

// The bound of a kernel's waits, the same for all launches of a session.
struct Bound {
    // In host memory that is mapped on the device: 0, or 1 + the rank that didn't come in time with this rank's
    // message.
    uint32_t* error;
    uint64_t timeout_ns;  // of all waits of a thread in a launch, counted from its first long wait
};

// Bounds the polling of one thread. In a healthy wait it costs a register, and an addition and a test for each poll. It
// reads the clock and the error word every 2^12 polls, which take some milliseconds.
class SpinGuard {
  public:
    // Returns true if the wait must end. Call it after each unsuccessful poll; `rank` is the peer that is waited for.
    // After true, the thread's data isn't what the peer sent. The session is then over: the host raises at the next
    // call.
    __device__ __forceinline__ bool expired(const Bound& bound, uint32_t rank) {
        if (++polls_ & kMask) return over_;
        return check_deadline(bound, rank);
    }

    // Ends this and every later wait of the thread, as a timeout does: `rank` came with another message.
    __device__ __forceinline__ void give_up(const Bound& bound, uint32_t rank) {
        asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(bound.error), "r"(rank + 1));
        over_ = true;
    }

  private:
    static constexpr uint32_t kMask = (1u << 12) - 1;

    __device__ __forceinline__ bool check_deadline(const Bound& bound, uint32_t rank) {
        uint64_t now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        // Relaxed, since the word publishes no other data. Once it is set it ends every wait, so that after a peer's
        // death a replay of a hundred calls doesn't wait for a hundred deadlines.
        uint32_t set;
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(set) : "l"(bound.error));
        if (since_ == 0) since_ = now;
        if (set == 0 && now - since_ >= bound.timeout_ns) {
            give_up(bound, rank);
        } else {
            over_ = set != 0;
        }
        return over_;
    }

    uint64_t since_ = 0;  // the time of the first check, from which the deadline counts
    uint32_t polls_ = 0;
    bool over_ = false;
};

}  // namespace comm_core
