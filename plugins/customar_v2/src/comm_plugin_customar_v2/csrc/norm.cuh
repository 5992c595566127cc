// The common parts of the fused kernels: all-reduce, residual and RMSNorm of rows, each row by one cluster of blocks.
//
// Let s be the sum of the ranks' rows in rank order, plus the residual, in fp32 and rounded once. The output is
//
//   y = s * rsqrt(mean(s^2) + eps) * (weight + offset)
//
// the RMSNorm of Zhang and Sennrich, 2019. y is computed from the rounded s, because two-shot sends nothing else. So
// all ranks hold the same bits, and a row's bits depend neither on the algorithm, nor on the launch shape, nor on the
// other rows (comm_core/cluster_reducer.cuh).
//
// Cells, slots, epochs and waits are those of the plain kernels, so that launches of both may follow each other.
//
// Lineage: a fused one-shot Lamport kernel with a cluster for each row is TensorRT-LLM's (allReduceFusionKernels.cu),
// which FlashInfer has as trtllm_allreduce_fusion.cuh.
#pragma once

#include <comm_core/cluster_reducer.cuh>

#include "cells.cuh"

namespace comm_customar_v2 {

using comm_core::ClusterReducer;

enum class NormAlgorithm : int32_t {
    kOneShotPush = 0,  // oneshot_push_norm.cuh
    kTwoShotPush = 1,  // twoshot_push_norm.cuh
    kSeparate = 2,     // the plain table's algorithm, then add_norm.cuh
    kCount = 3,
};

struct NormParams {
    Params plain;  // its output is y; no tail
    const char* residual;
    const char* weight;
    char* sum;  // may be the residual
    uint32_t num_rows;
    uint32_t row_vecs;  // vectors of a row
    float inverse_hidden, eps, offset;
};

// The longest row of the fused kernels, in vectors: every 32 vectors give the reducer one number.
constexpr uint32_t kMaxRowVecs = 32 * comm_core::kMaxReducerNumbers;

// The most blocks that share a row: the largest cluster that every device with clusters can launch.
constexpr uint32_t kMaxCluster = 8;

// How many vectors of a row a thread may hold, a power of two, and the most threads of a block for each: the limits
// come from registers. With more than two ranks a thread holds two, and larger clusters spread a row more thinly.
__host__ __device__ constexpr int min_norm_vecs(int world_size) {
    return world_size == 2 ? 1 : 2;
}
__host__ __device__ constexpr int max_norm_vecs(int world_size, NormAlgorithm algorithm) {
    return world_size == 2 && algorithm == NormAlgorithm::kOneShotPush ? 4 : 2;
}
__host__ __device__ constexpr int max_norm_threads(int world_size, NormAlgorithm algorithm, int vecs) {
    return world_size == 2 && vecs <= (algorithm == NormAlgorithm::kOneShotPush ? 2 : 1) ? 1024 : 512;
}

// The V vectors of a row that a thread holds. They are as far apart as the cluster has threads, so that a warp holds 32
// consecutive vectors, for which it gives the reducer one number.
template <int V>
struct Place {
    uint32_t first, step, row_vecs;

    __device__ __forceinline__ explicit Place(const NormParams& params)
        : first(comm_core::ready(comm_core::block_in_cluster() * blockDim.x + threadIdx.x)),
          step(comm_core::ready(comm_core::blocks_in_cluster() * blockDim.x)),
          row_vecs(comm_core::ready(params.row_vecs)) {}

    __device__ __forceinline__ bool has(int j) const { return first + j * step < row_vecs; }

    // Returns the offset of vector j from the row's beginning, in bytes.
    __device__ __forceinline__ uint32_t offset(int j) const { return (first + j * step) * 16; }
};

// Prefetches the weight and the first row's residual into the second-level cache while the kernel before may still run.
// A prefetch returns no data, so it is safe although that kernel may still write there.
template <int V>
__device__ __forceinline__ void prefetch(const NormParams& params, const Place<V>& place, uint32_t row) {
    const char* const residual = params.residual + static_cast<size_t>(row) * place.row_vecs * 16;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        // Eight threads share a line of 128 bytes.
        if (threadIdx.x % 8 != 0 || !place.has(j)) continue;
        comm_core::prefetch(params.weight + place.offset(j));
        if (row < params.num_rows) comm_core::prefetch(residual + place.offset(j));
    }
}

template <int V>
__device__ __forceinline__ void load_row(Vec (&vecs)[V], const char* row, const Place<V>& place) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
        if (place.has(j)) vecs[j] = comm_core::load(row + place.offset(j));
    }
}

// Reconverges a warp, so that all its threads have issued their stores or loads before any of them waits for a peer.
// All threads of the warp call it. Otherwise, if a row ends within the warp, the compiler may split the code that
// follows into two paths, one for the threads with one vector more. The other threads' stores and loads would then be
// issued only after those threads' waits, which is a trip over the links later.
__device__ __forceinline__ void reconverge() {
    __syncwarp();
}

// Sums a vector's squares, in a fixed order.
template <typename T>
__device__ __forceinline__ float squares(const Vec& vec) {
    const uint32_t words[4] = {vec.x, vec.y, vec.z, vec.w};
    float sums[T::count] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float values[T::count];
        T::unpack(words[i], values);
#pragma unroll
        for (int k = 0; k < T::count; ++k) sums[k] = fmaf(values[k], values[k], sums[k]);
    }
    return T::count == 2 ? sums[0] + sums[T::count - 1] : sums[0];
}

template <typename T>
__device__ __forceinline__ uint32_t normed(uint32_t sum, uint32_t weight, float scale, float offset) {
    float values[T::count], weights[T::count];
    T::unpack(sum, values);
    T::unpack(weight, weights);
#pragma unroll
    for (int k = 0; k < T::count; ++k) values[k] = values[k] * scale * (weights[k] + offset);
    return T::pack(values);
}

// Normalises N rows and stores them. The cluster's threads hold the rows' sums, and all of them call it. Rows that
// aren't present are computed, but not stored.
template <typename T, int V, int N, uint32_t kSums>
__device__ __forceinline__ void norm_rows(const NormParams& params,
                                          ClusterReducer<kSums>& reducer,
                                          const Place<V>& place,
                                          const Vec (&sums)[V][N],
                                          const Vec (&weight)[V],
                                          char* const (&outputs)[N],
                                          const bool (&present)[N]) {
    float terms[N][V], totals[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < V; ++j) terms[n][j] = place.has(j) ? squares<T>(sums[j][n]) : 0.0f;
    }
    reducer.sum(terms, totals, (place.row_vecs + 31) / 32);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const float scale = rsqrtf(fmaf(totals[n], params.inverse_hidden, params.eps));
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (!place.has(j) || !present[n]) continue;
            comm_core::store(outputs[n] + place.offset(j),
                             {normed<T>(sums[j][n].x, weight[j].x, scale, params.offset),
                              normed<T>(sums[j][n].y, weight[j].y, scale, params.offset),
                              normed<T>(sums[j][n].z, weight[j].z, scale, params.offset),
                              normed<T>(sums[j][n].w, weight[j].w, scale, params.offset)});
        }
    }
}

template <typename T, int V, uint32_t kSums>
__device__ __forceinline__ void norm_row(const NormParams& params,
                                         ClusterReducer<kSums>& reducer,
                                         const Place<V>& place,
                                         const Vec (&sums)[V],
                                         const Vec (&weight)[V],
                                         char* output) {
    Vec rows[V][1];
#pragma unroll
    for (int j = 0; j < V; ++j) rows[j][0] = sums[j];
    char* const outputs[1] = {output};
    const bool present[1] = {true};
    norm_rows<T>(params, reducer, place, rows, weight, outputs, present);
}

}  // namespace comm_customar_v2
