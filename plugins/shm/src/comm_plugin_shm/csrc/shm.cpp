// What the Python side calls; see protocol.h for what it does.

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

std::string reason(const char* call) {
    return std::string(call) + ": " + std::strerror(errno);
}

// The segment as this process has it mapped, and the descriptors by which it watches its peers.
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

// A session, as two functions: (input address, output address, elements, dtype) -> 0, or 1 + the rank that didn't come;
// and (rounds) -> the seconds of a flag's round trip.
//
// `pids` are the ranks' process ids, in order; 0 for one that isn't to be watched.
Array<Function> connect(int64_t descriptor,
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
    // Touched by its owner first, so that the pages of a slot are on the owner's memory node.
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
        // Without pidfd (Linux before 5.3), a peer's end is noticed at the deadline.
        const auto pid = static_cast<pid_t>(pids[peer]);
        mapping->pidfds.push_back(peer == rank || pid == 0 ? -1 : static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
    }
    config.pidfds = mapping->pidfds;
    config.go_on = [] { return TVMFFIEnvCheckSignals() == 0; };
    auto all_reduce = std::make_shared<AllReduce>(mapping->address(), std::move(config));
    const auto run = [mapping, all_reduce](int64_t input, int64_t out, int64_t numel, int64_t dtype) -> int64_t {
        const int ended = (*all_reduce)(
            reinterpret_cast<const void*>(input), reinterpret_cast<void*>(out), static_cast<size_t>(numel), dtype);
        // The signal's exception is set already; this makes the call raise it.
        if (ended == AllReduce::kInterrupted) throw tvm::ffi::EnvErrorAlreadySet();
        return ended;
    };
    const auto round_trip = [mapping, all_reduce](int64_t rounds) -> double {
        return all_reduce->round_trip_s(static_cast<uint32_t>(rounds));
    };
    return {Function::FromTyped(run), Function::FromTyped(round_trip)};
}

int64_t needed_nbytes(int64_t world_size, int64_t chunk_nbytes) {
    return static_cast<int64_t>(segment_nbytes(static_cast<int>(world_size), static_cast<size_t>(chunk_nbytes)));
}

}  // namespace
}  // namespace comm_shm

TVM_FFI_DLL_EXPORT_TYPED_FUNC(connect, comm_shm::connect);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(needed_nbytes, comm_shm::needed_nbytes);
