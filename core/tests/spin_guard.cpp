// comm_core/wait.cuh's SpinGuard against a clock, memory and peers of this process. Exits with the number of failures,
// each printed to stdout.

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#define __device__
#define __forceinline__ inline

namespace comm_core {

uint64_t now_ns = 0;

inline uint64_t globaltimer() {
    return now_ns;
}
inline uint32_t load_relaxed_sys(const uint32_t* address) {
    return *address;
}
inline void store_relaxed_sys(uint32_t* address, uint32_t word) {
    *address = word;
}
inline void add_relaxed_gpu(uint64_t* address, uint64_t number) {
    *address += number;
}
inline void max_relaxed_gpu(uint64_t* address, uint64_t number) {
    if (number > *address) *address = number;
}

}  // namespace comm_core

#include <comm_core/wait.cuh>

namespace {

using comm_core::SpinGuard;
using comm_core::WaitCounts;

constexpr uint32_t kShort = 16, kPollNs = 1000;
int failures = 0;

void expect(bool right, const std::string& what) {
    if (right) return;
    std::printf("%s\n", what.c_str());
    ++failures;
}

// A rank of three, whose kernel is given up after `timeout_ns`.
struct Rank {
    uint32_t error = 0;
    std::vector<WaitCounts> counts = std::vector<WaitCounts>(3);
    comm_core::Bound bound;

    explicit Rank(uint64_t timeout_ns = 60'000'000'000) : bound{&error, timeout_ns, counts.data()} {}

    // Waits for rank 1 until poll `first`, and then for rank 2 until poll `last`. Returns the polls that it took.
    uint32_t wait(SpinGuard& guard, uint32_t first, uint32_t last, bool is_counter = true) {
        uint32_t polls = 0;
        guard.wait(bound, is_counter, [&](uint32_t& rank) {
            ++polls;
            comm_core::now_ns += kPollNs;
            if (polls < last) rank = polls < first ? 1 : 2;
            return polls >= last;
        });
        return polls;
    }

    void expect_counts(uint32_t peer, WaitCounts due, const std::string& what) const {
        const WaitCounts& is = counts[peer];
        expect(is.waits == due.waits && is.total_ns == due.total_ns && is.longest_ns == due.longest_ns,
               what + ": " + std::to_string(is.waits) + " waits for rank " + std::to_string(peer) + ", of " +
                   std::to_string(is.total_ns) + " ns, the longest of " + std::to_string(is.longest_ns));
    }
};

void counts_long_waits() {
    Rank rank;
    SpinGuard guard;
    expect(rank.wait(guard, kShort + 1, kShort + 1) == kShort + 1, "a short wait");
    rank.expect_counts(1, {}, "a short wait");
    rank.wait(guard, kShort + 100, kShort + 100, false);
    rank.expect_counts(1, {}, "a wait of another thread");
    rank.wait(guard, kShort + 2, kShort + 2);
    rank.expect_counts(1, {1, 2 * kPollNs, 2 * kPollNs}, "a wait that is just long");
    rank.wait(guard, kShort + 100, kShort + 100);
    rank.wait(guard, kShort + 10, kShort + 10);
    rank.expect_counts(1, {3, 112 * kPollNs, 100 * kPollNs}, "three waits");
    rank.wait(guard, 30, kShort + 50);
    rank.expect_counts(2, {1, 50 * kPollNs, 50 * kPollNs}, "a wait for two, the last of whom is rank 2");
    rank.expect_counts(1, {3, 112 * kPollNs, 100 * kPollNs}, "the first of them");
    rank.bound.counts = nullptr;
    expect(rank.wait(guard, 9000, 9000) == 9000, "a wait that isn't counted");
    expect(rank.error == 0, "none of them timed out");
}

void times_out() {
    constexpr uint32_t kNever = 1u << 30;
    Rank rank(10'000 * kPollNs);
    SpinGuard guard;
    expect(rank.wait(guard, 9000, 9000) == 9000 && rank.error == 0, "a wait shorter than the timeout");
    const uint32_t polls = rank.wait(guard, kNever, kNever);
    expect(rank.error == 1 + 1, "the error word is " + std::to_string(rank.error));
    expect(polls > 10'000 && polls < 20'000, "a timeout after " + std::to_string(polls) + " polls");
    const uint64_t first = (9000 - kShort) * kPollNs, second = (polls - kShort) * kPollNs;
    expect(rank.wait(guard, kNever, kNever) <= kShort, "a wait after a timeout");
    rank.expect_counts(1, {2, first + second, second}, "a timeout, but not the wait after it");
    SpinGuard other;
    expect(rank.wait(other, kNever, kNever) < 5000, "another thread's wait after a timeout");
    expect(rank.error == 1 + 1, "the error word isn't set again");
}

void gives_up() {
    Rank rank;
    SpinGuard guard;
    guard.give_up(rank.bound, 2);
    expect(rank.error == 1 + 2 && rank.wait(guard, 9000, 9000) <= kShort, "a wait after another message");
}

}  // namespace

int main() {
    counts_long_waits();
    times_out();
    gives_up();
    std::printf("%d failures\n", failures);
    return failures;
}
