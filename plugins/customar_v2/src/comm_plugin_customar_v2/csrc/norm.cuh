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
// A kernel with `kQuantizes` also stores y in FP8 (quant.cuh), and y itself only if the call wants it. Both are
// computed from the y that is rounded to the dtype.
//
// Cells, slots, epochs and waits are those of the plain kernels, so that launches of both may follow each other.
//
// Lineage: a fused one-shot Lamport kernel with a cluster for each row is TensorRT-LLM's (allReduceFusionKernels.cu),
// which FlashInfer has as trtllm_allreduce_fusion.cuh.
#pragma once

#include <comm_core/cluster_reducer.cuh>

#include "cells.cuh"
#include "quant.cuh"

namespace comm_customar_v2 {

using comm_core::ClusterReducer;

enum class NormAlgorithm : int32_t {
    kOneShotPush = 0,  // oneshot_push_norm.cuh
    kTwoShotPush = 1,  // twoshot_push_norm.cuh
    kSeparate = 2,     // the plain table's algorithm, then add_norm.cuh
    kCount = 3,
};

struct NormParams {
    Params plain;  // its output is y, null if a call with `kQuantizes` doesn't want it; no tail
    const char* residual;
    const char* weight;
    char* sum;  // may be the residual
    uint32_t num_rows;
    uint32_t row_vecs;  // vectors of a row
    float inverse_hidden, eps, offset;
    QuantParams quant;  // of kernels with `kQuantizes`
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
__host__ __device__ constexpr int max_norm_threads(int world_size, NormAlgorithm algorithm, int vecs, bool quantizes) {
    if (world_size > 2) return 512;
    if (quantizes) return algorithm == NormAlgorithm::kOneShotPush && vecs == 1 ? 1024 : 512;
    return vecs <= (algorithm == NormAlgorithm::kOneShotPush ? 2 : 1) ? 1024 : 512;
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

    // Returns the index of vector j in the row.
    __device__ __forceinline__ uint32_t vec(int j) const { return first + j * step; }

    __device__ __forceinline__ bool has(int j) const { return vec(j) < row_vecs; }

    // Returns the offset of vector j from the row's beginning, in bytes.
    __device__ __forceinline__ uint32_t offset(int j) const { return vec(j) * 16; }
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

// Returns what a static scale multiplies with; 0 in kernels and forms without one.
template <bool kQuantizes>
__device__ __forceinline__ float factor_of(const NormParams& params) {
    if constexpr (kQuantizes) {
        if (params.quant.form == QuantForm::kStatic) return 1.0f / *params.quant.scale;
    }
    return 0.0f;
}

// Quantises N normed rows and stores them with their scales; `factor` comes from `factor_of`. All threads of the
// cluster call it.
template <typename T, int V, int N, uint32_t kSums>
__device__ __forceinline__ void quantize_rows(const QuantParams& quant,
                                              float factor,
                                              ClusterReducer<kSums>& reducer,
                                              const Place<V>& place,
                                              const Vec (&normed)[N][V],
                                              const uint32_t (&rows)[N],
                                              const bool (&present)[N]) {
    // A quantised element is a byte.
    constexpr uint32_t kVecElements = 4 * T::count, kGroupVecs = kGroupElements / kVecElements;
    const auto values_of = [&](int n, int j) {
        return quant.values + (static_cast<size_t>(rows[n]) * place.row_vecs + place.vec(j)) * kVecElements;
    };
    if (quant.form == QuantForm::kStatic) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                if (place.has(j) && present[n]) store_quantized<T, false>(values_of(n, j), normed[n][j], factor);
            }
        }
        return;
    }
    float largest[N][V], maxima[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < V; ++j) largest[n][j] = place.has(j) ? magnitude<T>(normed[n][j]) : 0.0f;
    }
    const bool per_token = quant.form == QuantForm::kPerToken;
    if (per_token) reducer.max(largest, maxima, (place.row_vecs + 31) / 32);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float* const scales = quant.scale + rows[n] * quant.row_stride;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            // A warp holds whole groups, because it holds 32 consecutive vectors.
            const float scale =
                per_token ? fmaxf(maxima[n] / kLargestFp8, kLeastTokenScale)
                          : fmaxf(comm_core::warp_max<kGroupVecs>(largest[n][j]), kLeastGroupMaximum) / kLargestFp8;
            if (!place.has(j) || !present[n]) continue;
            const uint32_t vec = place.vec(j);
            if (per_token ? vec == 0 : vec % kGroupVecs == 0)
                scales[per_token ? 0 : vec / kGroupVecs * quant.column_stride] = scale;
            store_quantized<T, true>(values_of(n, j), normed[n][j], scale);
        }
    }
}

// Normalises N rows and stores them. The cluster's threads hold the rows' sums, and all of them call it. Rows that
// aren't present are computed, but not stored.
template <typename T, bool kQuantizes, int V, int N, uint32_t kSums>
__device__ __forceinline__ void norm_rows(const NormParams& params,
                                          float factor,
                                          ClusterReducer<kSums>& reducer,
                                          const Place<V>& place,
                                          const Vec (&sums)[V][N],
                                          const Vec (&weight)[V],
                                          const uint32_t (&rows)[N],
                                          const bool (&present)[N]) {
    float terms[N][V], totals[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < V; ++j) terms[n][j] = place.has(j) ? squares<T>(sums[j][n]) : 0.0f;
    }
    reducer.sum(terms, totals, (place.row_vecs + 31) / 32);
    [[maybe_unused]] Vec kept[N][V];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const float scale = rsqrtf(fmaf(totals[n], params.inverse_hidden, params.eps));
        char* const output = params.plain.output + rows[n] * (place.row_vecs * 16);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (!place.has(j) || !present[n]) continue;
            const Vec vec{normed<T>(sums[j][n].x, weight[j].x, scale, params.offset),
                          normed<T>(sums[j][n].y, weight[j].y, scale, params.offset),
                          normed<T>(sums[j][n].z, weight[j].z, scale, params.offset),
                          normed<T>(sums[j][n].w, weight[j].w, scale, params.offset)};
            if constexpr (kQuantizes) kept[n][j] = vec;
            if (!kQuantizes || params.plain.output != nullptr) comm_core::store(output + place.offset(j), vec);
        }
    }
    if constexpr (kQuantizes) quantize_rows<T>(params.quant, factor, reducer, place, kept, rows, present);
}

template <typename T, bool kQuantizes, int V, uint32_t kSums>
__device__ __forceinline__ void norm_row(const NormParams& params,
                                         float factor,
                                         ClusterReducer<kSums>& reducer,
                                         const Place<V>& place,
                                         const Vec (&sums)[V],
                                         const Vec (&weight)[V],
                                         uint32_t row) {
    Vec each[V][1];
#pragma unroll
    for (int j = 0; j < V; ++j) each[j][0] = sums[j];
    const uint32_t rows[1] = {row};
    const bool present[1] = {true};
    norm_rows<T, kQuantizes>(params, factor, reducer, place, each, weight, rows, present);
}

}  // namespace comm_customar_v2
