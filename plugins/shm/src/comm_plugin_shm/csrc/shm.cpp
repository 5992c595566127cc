// The functions that session.py calls; protocol.h has the algorithm.

#include <fcntl.h>
#include <sys/mman.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cerrno>
#include <memory>
#include <string>

#include "protocol.h"

namespace comm_shm {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;

std::string reason(const char* call) {
    return std::string(call) + ": " + std::strerror(errno);
}

// This process's mapping of the segment, and the descriptors by which it notices that a peer has ended.
class Mapping {
  public:
    Mapping(int descriptor, size_t nbytes) : nbytes_(nbytes) {
        address_ = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
        if (address_ == MAP_FAILED) TVM_FFI_THROW(RuntimeError) << reason("mmap");
    }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    ~Mapping() {
        munmap(address_, nbytes_);
        for (const int descriptor : pidfds) {
            if (descriptor >= 0) close(descriptor);
        }
    }

    void* address() const { return address_; }

    std::vector<int> pidfds;

  private:
    void* address_;
    size_t nbytes_;
};

// Maps the segment behind `descriptor`, and returns the functions of a session by name:
//   all_reduce(input, out, numel, dtype)   sums; takes addresses; returns the result of a call (protocol.h)
//   message(rank)                          returns a rank's message, after all_reduce has found that it differs
//   abort()                                makes every later call fail, on all ranks
//   waits()                                returns by rank, one after the other, the number of waits for it, their
//                                          total time and the longest, in nanoseconds
//   round_trip_s(rounds)                   measures a flag's round trip, in seconds
//
// `pids`: the ranks' process ids, by rank; 0 for a process that isn't watched.
Map<String, Function> connect(int64_t descriptor,
                              int64_t rank,
                              Array<int64_t> pids,
                              int64_t chunk_nbytes,
                              int64_t two_shot_nbytes,
                              double timeout_s,
                              int64_t spins) {
    const int world_size = static_cast<int>(pids.size());
    if (world_size < 2 || world_size > kMaxRanks || rank < 0 || rank >= world_size || chunk_nbytes <= 0 ||
        chunk_nbytes % (kAlign * kMaxRanks) != 0) {
        TVM_FFI_THROW(ValueError) << "rank " << rank << " of " << world_size << ", chunks of " << chunk_nbytes
                                  << " bytes";
    }
    const size_t chunk = static_cast<size_t>(chunk_nbytes);
    auto mapping = std::make_shared<Mapping>(static_cast<int>(descriptor), segment_nbytes(world_size, chunk));
    // Each rank touches its own slots first, so that their pages are on that rank's memory node.
    char* slots = static_cast<char*>(mapping->address()) + sizeof(Header);
    std::memset(slots + 2 * static_cast<size_t>(rank) * chunk, 0, 2 * chunk);

    Config config{};
    config.rank = static_cast<int>(rank);
    config.world_size = world_size;
    config.chunk_nbytes = chunk;
    config.two_shot_nbytes = static_cast<size_t>(two_shot_nbytes);
    config.timeout_s = timeout_s;
    config.spins = static_cast<int>(spins);
    for (int peer = 0; peer < world_size; ++peer) {
        // Without pidfd (Linux before 5.3), a peer's end is noticed only when it times out.
        const auto pid = static_cast<pid_t>(pids[peer]);
        mapping->pidfds.push_back(peer == rank || pid == 0 ? -1 : static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
    }
    config.pidfds = mapping->pidfds;
    config.keep_waiting = [] { return TVMFFIEnvCheckSignals() == 0; };
    auto all_reduce = std::make_shared<AllReduce>(mapping->address(), std::move(config));
    const auto run = [mapping, all_reduce](int64_t input, int64_t out, int64_t numel, int64_t dtype) -> int64_t {
        const int result = (*all_reduce)(
            reinterpret_cast<const void*>(input), reinterpret_cast<void*>(out), static_cast<size_t>(numel), dtype);
        // The signal's handler has set a Python exception; this makes the call raise it.
        if (result == AllReduce::kInterrupted) throw tvm::ffi::EnvErrorAlreadySet();
        return result;
    };
    const auto round_trip_s = [mapping, all_reduce](int64_t rounds) -> double {
        return all_reduce->round_trip_s(static_cast<uint32_t>(rounds));
    };
    const auto message = [mapping, all_reduce](int64_t rank) -> int64_t {
        return static_cast<int64_t>(all_reduce->message(static_cast<int>(rank)));
    };
    const auto abort = [mapping, all_reduce] { all_reduce->abort(); };
    const auto waits = [mapping, all_reduce, world_size]() -> Array<int64_t> {
        Array<int64_t> numbers;
        for (int peer = 0; peer < world_size; ++peer) {
            const Waits& of_peer = all_reduce->waits(peer);
            for (const auto* number : {&of_peer.count, &of_peer.total_ns, &of_peer.longest_ns}) {
                numbers.push_back(number->load(std::memory_order_relaxed));
            }
        }
        return numbers;
    };
    return {{"all_reduce", Function::FromTyped(run)},
            {"message", Function::FromTyped(message)},
            {"abort", Function::FromTyped(abort)},
            {"waits", Function::FromTyped(waits)},
            {"round_trip_s", Function::FromTyped(round_trip_s)}};
}

int64_t nbytes_of_segment(int64_t world_size, int64_t chunk_nbytes) {
    return static_cast<int64_t>(segment_nbytes(static_cast<int>(world_size), static_cast<size_t>(chunk_nbytes)));
}

}  // namespace
}  // namespace comm_shm

TVM_FFI_DLL_EXPORT_TYPED_FUNC(connect, comm_shm::connect);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(segment_nbytes, comm_shm::nbytes_of_segment);
