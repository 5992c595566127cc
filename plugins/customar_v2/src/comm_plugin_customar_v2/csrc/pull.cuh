// Pulls: every rank reads what it sums from its peers' memory: their inputs themselves, where these are registered,
// else a staged copy.
//
// A thread works on the same places on every rank, and so depends on blocks of its own number alone: barriers are
// between those (comm_core/barrier.cuh), and the launch must have the same shape on all ranks. Staged copies take two
// phases in turn, so that nobody waits at the end (params.cuh); registered inputs may be overwritten as soon as the
// launch has ended, so there a barrier comes after the last read of them.
//
// In place with registered inputs: the one-shot pull would write over what its peers still read, so the host never
// launches it so (capture.py). The two-shot pull may: until its second barrier a rank writes only over its own part of
// its own input, which no peer reads, each thread where it alone has read; the rest it writes after that barrier, by
// which the peers' blocks of its number have read all that they read of these places.
#pragma once

#include "params.cuh"
#include "tail.cuh"

namespace comm_customar_v2 {

template <int W>
struct Sources {
    const char* at[W];

    // Where each rank's message is. May come before the wait for predecessors (comm_core/registered.cuh).
    __device__ __forceinline__ Sources(const Params& params, unsigned long long epoch) {
        if (registered(params)) {
            comm_core::find_inputs<W>(params.registered, params.input, params.bound, at);
            return;
        }
#pragma unroll
        for (int q = 0; q < W; ++q) at[q] = staging(params, q, epoch);
    }

    static __device__ __forceinline__ bool registered(const Params& params) { return params.registered.row != nullptr; }

    static __device__ __forceinline__ char* staging(const Params& params, int rank, unsigned long long epoch) {
        return params.buffers[rank] + params.staging_at + (epoch & 1) * params.staging_nbytes;
    }
};

// The sum of one vector of every rank. Relaxed loads at system scope bypass the first-level cache, which may hold what
// a peer's memory had before; the barrier before them orders them.
template <typename T, int W>
__device__ __forceinline__ Vec pulled_sum(const Vec (&vecs)[W]) {
    comm_core::Sum<T> sum(vecs[0]);
#pragma unroll
    for (int q = 1; q < W; ++q) sum.add(vecs[q]);
    return sum.rounded();
}

template <int W>
__device__ __forceinline__ void meet(const Params& params,
                                     uint32_t stage,
                                     unsigned long long epoch,
                                     comm_core::Patience& patience) {
    comm_core::barrier<W>(params.buffers, kFlagsAt, params.rank, stage, epoch, params.bound, patience);
}

template <typename T, int W, int V>
__global__ void __launch_bounds__(max_threads(W, V), 1) oneshot_pull(const __grid_constant__ Params params) {
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const uint32_t num_vecs = params.num_vecs, stride = threads_in_grid(), thread = thread_in_grid();
    comm_core::Patience patience;
    const Sources<W> sources(params, epoch);
    comm_core::wait_for_predecessors();
    if (!sources.registered(params)) {
        char* const copy = Sources<W>::staging(params, params.rank, epoch);
        for (uint32_t vec = thread; vec < num_vecs; vec += stride) {
            comm_core::store(copy + vec * 16, comm_core::load(params.input + vec * 16));
        }
    }
    meet<W>(params, 0, epoch, patience);
    for (uint32_t first = thread; first < num_vecs; first += V * stride) {
        Vec vecs[V][W];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t vec = first + j * stride;
            if (vec >= num_vecs) continue;
#pragma unroll
            for (int q = 0; q < W; ++q) vecs[j][q] = comm_core::load_relaxed_sys(sources.at[q] + vec * 16);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t vec = first + j * stride;
            if (vec < num_vecs) comm_core::store(params.output + vec * 16, pulled_sum<T, W>(vecs[j]));
        }
    }
    sum_tail<T, W>(params, epoch, patience);
    if (sources.registered(params)) meet<W>(params, 1, epoch, patience);
}

// Each rank sums its own part into its staging, from where all gather it.
template <typename T, int W, int V>
__global__ void __launch_bounds__(max_threads(W, V), 1) twoshot_pull(const __grid_constant__ Params params) {
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const uint32_t num_vecs = params.num_vecs, stride = threads_in_grid(), thread = thread_in_grid();
    const uint32_t part = (num_vecs + W - 1) / W, rank = params.rank;
    comm_core::Patience patience;
    const Sources<W> sources(params, epoch);
    comm_core::wait_for_predecessors();
    char* const mine = Sources<W>::staging(params, rank, epoch);
    // Sums are staged where the part was; where no input is staged, at the beginning, so that a part is all there must
    // be room for.
    const bool staged = !sources.registered(params);
    if (staged) {
        for (uint32_t place = thread; place < part; place += stride) {
#pragma unroll
            for (int q = 0; q < W; ++q) {
                const uint32_t vec = q * part + place;
                if (vec < num_vecs) comm_core::store(mine + vec * 16, comm_core::load(params.input + vec * 16));
            }
        }
    }
    meet<W>(params, 0, epoch, patience);
    {
        const uint32_t begin = rank * part, end = min(part, num_vecs - min(num_vecs, begin));
        for (uint32_t first = thread; first < end; first += V * stride) {
            Vec vecs[V][W];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t vec = first + j * stride;
                if (vec >= end) continue;
#pragma unroll
                for (int q = 0; q < W; ++q) {
                    vecs[j][q] = comm_core::load_relaxed_sys(sources.at[q] + (begin + vec) * 16);
                }
            }
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t vec = first + j * stride;
                if (vec >= end) continue;
                const Vec sum = pulled_sum<T, W>(vecs[j]);
                // Over my own share of my part, which nobody else reads.
                comm_core::store(mine + (staged ? begin + vec : vec) * 16, sum);
                comm_core::store(params.output + (begin + vec) * 16, sum);
            }
        }
    }
    // After it all peers have read what they sum of my input, too: nobody waits at the end.
    meet<W>(params, 1, epoch, patience);
#pragma unroll
    for (int d = 0; d < W - 1; ++d) {
        const uint32_t owner = Slots<W>::after(rank, d);
        const uint32_t begin = owner * part, end = min(part, num_vecs - min(num_vecs, begin));
        const char* theirs = Sources<W>::staging(params, owner, epoch) + (staged ? begin * 16 : 0);
        for (uint32_t first = thread; first < end; first += V * stride) {
            Vec vecs[V];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t vec = first + j * stride;
                if (vec < end) vecs[j] = comm_core::load_relaxed_sys(theirs + vec * 16);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t vec = first + j * stride;
                if (vec < end) comm_core::store(params.output + (begin + vec) * 16, vecs[j]);
            }
        }
    }
    sum_tail<T, W>(params, epoch, patience);
}

}  // namespace comm_customar_v2
