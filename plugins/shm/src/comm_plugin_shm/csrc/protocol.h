// All-reduce over a segment of memory that the ranks' processes share.
//
// Every rank has a counter, `step`, and two slots; it alone writes them. A message is cut into chunks that fit a slot;
// consecutive chunks use the two slots in turn. For each chunk, a rank does this:
//
//   one-shot   Write the input to its slot and advance its step. Wait for every rank's step. Sum all slots, in rank
//              order.
//   two-shot   The chunk has one part for each rank. Write the other ranks' parts of the input to its slot and advance
//              its step. Wait for every rank's step. Sum its own part over the ranks, write the sum to its slot and
//              advance its step again. Wait for every rank's step again, and copy that rank's part.
//
// Two slots are enough, without a barrier: a rank advances its step for chunk k + 1 only after it has read all it needs
// of chunk k. Another rank overwrites chunk k, with chunk k + 2, only after it has seen every rank's step for chunk
// k + 1. By then no rank reads chunk k any more.
//
// Ranks that make different calls must not sum each other's data. With each chunk, a rank also publishes its message:
// the number of elements and the dtype. The others compare it with their own before they read the slot. Like the slots
// there are two words for it, one for each parity; the same argument shows that neither is overwritten while it may be
// read.
//
// Order of memory accesses. `step` is stored with release order and loaded with acquire order. A rank that sees a step
// therefore sees what was written to the slot before that step; and a rank that overwrites a slot does so after every
// rank whose step it saw has finished reading it. The messages are relaxed, since `step` orders them like the slots.
// Going to sleep needs a stronger order: `step` and `sleepers` are sequentially consistent. The rank that advances
// stores its step, then loads its sleepers; a rank that goes to sleep counts itself among the sleepers, then loads the
// step. In the single order of these four accesses at least one rank sees the other's store, so no wake-up is lost.
// `abort` is relaxed: nothing else is read by it.
#pragma once

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <vector>

#include "float_mode.h"
#include "reduce.h"

namespace comm_shm {

constexpr int kMaxRanks = 64;
// Two cache lines, since processors fetch them in pairs: one rank's stores must not slow another's loads.
constexpr size_t kLine = 128;
// Slots and parts begin at multiples of the widest vector, in bytes.
constexpr size_t kAlign = 64;

struct alignas(kLine) RankState {
    std::atomic<uint32_t> step;
    std::atomic<uint32_t> sleepers;  // ranks that sleep until `step` changes
    // The message of the last chunk of each parity: elements in the upper 56 bits, dtype in the lower 8.
    std::atomic<uint64_t> messages[2];
};

// The beginning of the segment; all zero at first.
struct Header {
    alignas(kLine) std::atomic<uint32_t> abort;  // 0, or an `abort_word`: every later call fails
    alignas(kLine) std::atomic<uint32_t> ping;   // for `round_trip_s` only
    alignas(kLine) std::atomic<uint32_t> pong;
    RankState ranks[kMaxRanks];
};
static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free,
              "the counters are shared between processes");

// Why calls fail. The same numbers as in session.py.
enum class Cause : uint32_t {
    kLate,     // the rank didn't come in time, or its process has ended
    kStopped,  // the rank makes no further calls, after a failure
    kDiffers,  // the rank found a message unlike its own
};

inline uint32_t abort_word(Cause cause, int rank) {
    return static_cast<uint32_t>(cause) << 8 | (static_cast<uint32_t>(rank) + 1);
}

struct Config {
    int rank;
    int world_size;
    size_t chunk_nbytes;      // of a slot; a multiple of kAlign times kMaxRanks
    size_t two_shot_nbytes;   // chunks from this size on go two-shot
    double timeout_s;         // of one wait
    int spins;                // looks at a peer's step before yielding the processor
    std::vector<int> pidfds;  // by rank; readable once that process has ended; -1: not watched
    // Called about ten times a second during long waits; false ends the wait, as after a signal.
    std::function<bool()> keep_waiting = [] { return true; };
};

inline size_t segment_nbytes(int world_size, size_t chunk_nbytes) {
    return sizeof(Header) + 2 * static_cast<size_t>(world_size) * chunk_nbytes;
}

// The waits of this rank for one peer. One thread writes them, any thread may read them.
struct Waits {
    std::atomic<int64_t> count{0};
    std::atomic<int64_t> total_ns{0};
    std::atomic<int64_t> longest_ns{0};

    void add(int64_t ns) {
        count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        total_ns.store(total_ns.load(std::memory_order_relaxed) + ns, std::memory_order_relaxed);
        if (ns > longest_ns.load(std::memory_order_relaxed)) longest_ns.store(ns, std::memory_order_relaxed);
    }
};

class AllReduce {
  public:
    // The result of a call. Other positive values are an `abort_word`; kDiffers - n: rank n has another message.
    static constexpr int kDone = 0;
    static constexpr int kInterrupted = -1;
    static constexpr int kDiffers = -2;

    AllReduce(void* segment, Config config)
        : header_(static_cast<Header*>(segment)),
          slots_(static_cast<char*>(segment) + sizeof(Header)),
          config_(std::move(config)) {}

    // Sums over the ranks, elementwise. `out` may be `input`; both are aligned to the element's size.
    int operator()(const void* input, void* out, size_t numel, int64_t dtype) {
        if (const uint32_t word = header_->abort.load(std::memory_order_relaxed)) return static_cast<int>(word);
        const DefaultFloatMode mode;
        message_ = static_cast<uint64_t>(numel) << 8 | static_cast<uint64_t>(dtype);
        const size_t item = item_nbytes(dtype);
        const size_t nbytes = numel * item;
        for (size_t start = 0; start < nbytes; start += config_.chunk_nbytes) {
            const size_t length = std::min(config_.chunk_nbytes, nbytes - start);
            const char* from = static_cast<const char*>(input) + start;
            char* to = static_cast<char*>(out) + start;
            const bool two_shot = config_.world_size > 2 && length >= config_.two_shot_nbytes;
            const int result = two_shot ? two_shot_chunk(from, to, length, item, dtype)
                                        : one_shot_chunk(from, to, length, item, dtype);
            if (result != kDone) return result;
            parity_ ^= 1;
        }
        return kDone;
    }

    // Makes every later call fail, and the peers' waits for this rank end.
    void abort() { publish(Cause::kStopped, config_.rank); }

    // The message of a rank, after a call has returned kDiffers - rank.
    uint64_t message(int rank) const { return header_->ranks[rank].messages[parity_].load(std::memory_order_relaxed); }

    // The waits for a rank so far that took longer than kExchangeLooks.
    const Waits& waits(int rank) const { return waits_[rank]; }

    // Measures how long a flag takes to the other rank and back, in seconds: no exchange between two ranks is faster.
    // Ranks 0 and 1 call it at the same time. Returns 0 on the other ranks, and if the peer times out.
    double round_trip_s(uint32_t rounds) {
        if (config_.rank > 1) return 0;
        std::atomic<uint32_t>& mine = config_.rank == 0 ? header_->ping : header_->pong;
        const std::atomic<uint32_t>& theirs = config_.rank == 0 ? header_->pong : header_->ping;
        const double deadline = now_s() + config_.timeout_s;
        double start = 0;
        for (uint32_t round = 0; round <= rounds; ++round) {
            if (round == 1) start = now_s();  // the first round only waits for the peer
            ++flag_;
            if (config_.rank == 0) mine.store(flag_, std::memory_order_release);
            while (theirs.load(std::memory_order_acquire) != flag_) {
                if (round == 0 && now_s() > deadline) return 0;
            }
            if (config_.rank == 1) mine.store(flag_, std::memory_order_release);
        }
        return (now_s() - start) / rounds;
    }

  private:
    int one_shot_chunk(const char* input, char* out, size_t length, size_t item, int64_t dtype) {
        std::memcpy(slot(config_.rank), input, length);
        advance();
        const void* inputs[kMaxRanks];
        for (int rank = 0; rank < config_.world_size; ++rank) {
            // This rank's input is still in its cache, so it is read there instead of from the slot.
            inputs[rank] = rank == config_.rank ? input : slot(rank);
            if (const int result = await(rank)) return result;
        }
        sum(out, inputs, config_.world_size, length / item, dtype);
        return kDone;
    }

    int two_shot_chunk(const char* input, char* out, size_t length, size_t item, int64_t dtype) {
        const size_t ranks = static_cast<size_t>(config_.world_size);
        const size_t part = ((length + ranks - 1) / ranks + kAlign - 1) / kAlign * kAlign;
        const auto begin = [&](int rank) { return std::min(static_cast<size_t>(rank) * part, length); };
        const size_t mine = begin(config_.rank);
        const size_t mine_end = begin(config_.rank + 1);
        char* my_slot = slot(config_.rank);
        std::memcpy(my_slot, input, mine);
        std::memcpy(my_slot + mine_end, input + mine_end, length - mine_end);
        advance();
        const void* inputs[kMaxRanks];
        for (int rank = 0; rank < config_.world_size; ++rank) {
            inputs[rank] = (rank == config_.rank ? input : slot(rank)) + mine;
            if (const int result = await(rank)) return result;
        }
        if (mine < mine_end) {
            sum(my_slot + mine, inputs, config_.world_size, (mine_end - mine) / item, dtype);
            std::memcpy(out + mine, my_slot + mine, mine_end - mine);
        }
        advance();
        // Each rank begins with a different peer's part, so that not all of them read from one rank at once.
        for (int offset = 1; offset < config_.world_size; ++offset) {
            const int rank = (config_.rank + offset) % config_.world_size;
            if (const int result = await(rank)) return result;
            std::memcpy(out + begin(rank), slot(rank) + begin(rank), begin(rank + 1) - begin(rank));
        }
        return kDone;
    }

    char* slot(int rank) const { return slots_ + (2 * static_cast<size_t>(rank) + parity_) * config_.chunk_nbytes; }

    // Publishes that this rank has come one step further, and wakes the ranks that sleep until then.
    void advance() {
        RankState& mine = header_->ranks[config_.rank];
        mine.messages[parity_].store(message_, std::memory_order_relaxed);
        mine.step.store(++step_, std::memory_order_seq_cst);
        if (mine.sleepers.load(std::memory_order_seq_cst) != 0) {
            syscall(SYS_futex, &mine.step, FUTEX_WAKE, kMaxRanks, nullptr, nullptr, 0);
        }
    }

    // Waits until `rank` has come as far as this rank, and compares its message. Returns the result of a call.
    int await(int rank) {
        if (rank == config_.rank) return kDone;
        if (const int result = await_step(rank)) return result;
        if (message(rank) == message_) return kDone;
        publish(Cause::kDiffers, config_.rank);
        return kDiffers - rank;
    }

    // Looks at a peer's step that are part of every exchange: about a microsecond. Only longer waits are timed, because
    // reading the clock takes as long as a few looks.
    static constexpr int kExchangeLooks = 32;

    int await_step(int rank) {
        const std::atomic<uint32_t>& step = header_->ranks[rank].step;
        for (int look = 0; look < kExchangeLooks && look < config_.spins; ++look) {
            if (reached(step.load(std::memory_order_acquire))) return kDone;
            pause();
        }
        const double begin = now_s();
        const int result = await_timed(rank);
        waits_[rank].add(static_cast<int64_t>((now_s() - begin) * 1e9));
        return result;
    }

    int await_timed(int rank) {
        const std::atomic<uint32_t>& step = header_->ranks[rank].step;
        for (int look = kExchangeLooks; look < config_.spins; ++look) {
            if (reached(step.load(std::memory_order_acquire))) return kDone;
            pause();
        }
        return await_long(rank);
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    bool reached(uint32_t step) const { return static_cast<int32_t>(step - step_) >= 0; }

    int await_long(int rank) {
        RankState& peer = header_->ranks[rank];
        // With more ranks than processors, the peer may be waiting for this processor.
        for (int look = 0; look < 64; ++look) {
            if (reached(peer.step.load(std::memory_order_acquire))) return kDone;
            sched_yield();
        }
        const double deadline = now_s() + config_.timeout_s;
        while (true) {
            peer.sleepers.fetch_add(1, std::memory_order_seq_cst);
            const uint32_t seen = peer.step.load(std::memory_order_seq_cst);
            if (!reached(seen)) sleep_while(peer.step, seen);
            peer.sleepers.fetch_sub(1, std::memory_order_relaxed);
            if (reached(peer.step.load(std::memory_order_acquire))) return kDone;
            if (const uint32_t word = header_->abort.load(std::memory_order_relaxed)) return static_cast<int>(word);
            const bool is_late = has_ended(rank) || now_s() >= deadline;
            if (is_late && !reached(peer.step.load(std::memory_order_acquire))) return publish(Cause::kLate, rank);
            if (!config_.keep_waiting()) {
                // This rank leaves the sequence of calls.
                abort();
                return kInterrupted;
            }
        }
    }

    // Publishes why calls fail, unless a rank has done so before. Returns the published `abort_word`.
    int publish(Cause cause, int rank) {
        uint32_t published = 0;
        const uint32_t mine = abort_word(cause, rank);
        const bool first = header_->abort.compare_exchange_strong(published, mine, std::memory_order_relaxed);
        return static_cast<int>(first ? mine : published);
    }

    // Sleeps until `word` changes from `seen`, for a tenth of a second at most: a long wait also checks the peer's
    // process, the deadline and signals.
    static void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) {
        const timespec slice = {0, 100'000'000};
        syscall(SYS_futex, &word, FUTEX_WAIT, seen, &slice, nullptr, 0);
    }

    // Returns whether a rank's process has ended; false if it isn't watched.
    bool has_ended(int rank) const {
        const int descriptor = config_.pidfds[static_cast<size_t>(rank)];
        if (descriptor < 0) return false;
        pollfd watched = {descriptor, POLLIN, 0};
        return poll(&watched, 1, 0) > 0;
    }

    static double now_s() {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
    }

    Header* header_;
    char* slots_;
    Config config_;
    uint64_t message_ = 0;  // of the running call
    uint32_t step_ = 0;     // equal to this rank's step in the header
    size_t parity_ = 0;     // which of the two slots the next chunk uses
    uint32_t flag_ = 0;     // of `round_trip_s`
    Waits waits_[kMaxRanks];
};

}  // namespace comm_shm
