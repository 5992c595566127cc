// The protocol with threads as ranks, so that ThreadSanitizer sees every access.
//
//     threads [CALLS]     calls for each world size
//
// Exits 1 if a sum is wrong. If two accesses aren't ordered, ThreadSanitizer prints them and exits 66.

#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "protocol.h"

namespace {

using comm_shm::AllReduce;

// Small, so that messages of a few KiB take several chunks.
constexpr size_t kChunk = comm_shm::kAlign * comm_shm::kMaxRanks;

float value(int rank, int call, size_t i) {
    return static_cast<float>((i * 7 + static_cast<size_t>(rank + call) * 13) % 64);
}

bool run_rank(void* segment, int rank, int world_size, int calls) {
    comm_shm::Config config{};
    config.rank = rank;
    config.world_size = world_size;
    config.chunk_nbytes = kChunk;
    config.two_shot_nbytes = 1024;
    config.timeout_s = 60;
    config.spins = rank % 2 ? 10 : 200;  // some ranks sleep, some spin until the step comes
    config.pidfds.assign(static_cast<size_t>(world_size), -1);
    AllReduce all_reduce(segment, std::move(config));
    std::vector<float> input, out;
    for (int call = 0; call < calls; ++call) {
        const size_t numel = 1 + static_cast<size_t>(call) * 97 % 3000;
        input.resize(numel);
        out.assign(numel, -1);
        for (size_t i = 0; i < numel; ++i) input[i] = value(rank, call, i);
        const bool in_place = call % 3 == 0;
        if (call % 50 == 7 * rank) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        float* target = in_place ? input.data() : out.data();
        if (all_reduce(input.data(), target, numel, comm_shm::kFloat32) != AllReduce::kDone) return false;
        for (size_t i = 0; i < numel; ++i) {
            float total = 0;
            for (int r = 0; r < world_size; ++r) total += value(r, call, i);
            if (target[i] != total) {
                std::fprintf(stderr,
                             "rank %d of %d, call %d, element %zu: %g, not %g\n",
                             rank,
                             world_size,
                             call,
                             i,
                             static_cast<double>(target[i]),
                             static_cast<double>(total));
                return false;
            }
        }
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const int calls = argc > 1 ? std::atoi(argv[1]) : 1000;
    for (const int world_size : {2, 3, 4, 7}) {
        const size_t nbytes = comm_shm::segment_nbytes(world_size, kChunk);
        void* segment = ::operator new(nbytes, std::align_val_t{4096});
        std::memset(segment, 0, nbytes);
        std::atomic<bool> good{true};
        std::vector<std::thread> threads;
        for (int rank = 0; rank < world_size; ++rank) {
            threads.emplace_back([&, rank] {
                if (!run_rank(segment, rank, world_size, calls)) good = false;
            });
        }
        for (std::thread& thread : threads) thread.join();
        ::operator delete(segment, std::align_val_t{4096});
        if (!good) return 1;
    }
    std::puts("every sum is right");
    return 0;
}
