// Residual and RMSNorm of rows that a plain all-reduce has summed, for rows that no fused kernel takes, or if the table
// says so. It needs this device alone: no cells, no epoch, no waits.
#pragma once

#include "norm.cuh"

namespace comm_customar_v2 {

constexpr uint32_t kAddNormThreads = 512;

// Each block takes one row after another, of any number of vectors. At the start, the output holds the rows' sums over
// the ranks.
template <typename T>
__global__ void __launch_bounds__(kAddNormThreads) add_norm(const __grid_constant__ NormParams params) {
    ClusterReducer<> reducer;
    comm_core::launch_successor();
    reducer.open();
    comm_core::wait_for_predecessors();
    const uint32_t row_vecs = params.row_vecs;
    for (size_t row = blockIdx.x; row < params.num_rows; row += gridDim.x) {
        const size_t at = row * row_vecs * 16;
        float terms[1][1] = {{0.0f}}, totals[1];
        for (uint32_t vec = threadIdx.x; vec < row_vecs; vec += blockDim.x) {
            comm_core::Sum<T> sum(comm_core::load(params.plain.output + at + vec * 16));
            sum.add(comm_core::load(params.residual + at + vec * 16));
            const Vec rounded = sum.rounded();
            comm_core::store(params.sum + at + vec * 16, rounded);
            terms[0][0] += squares<T>(rounded);
        }
        reducer.sum(terms, totals, blockDim.x / 32);
        const float scale = rsqrtf(fmaf(totals[0], params.inverse_hidden, params.eps));
        for (uint32_t vec = threadIdx.x; vec < row_vecs; vec += blockDim.x) {
            const Vec sum = comm_core::load(params.sum + at + vec * 16);
            const Vec weight = comm_core::load(params.weight + vec * 16);
            comm_core::store(params.plain.output + at + vec * 16,
                             {normed<T>(sum.x, weight.x, scale, params.offset),
                              normed<T>(sum.y, weight.y, scale, params.offset),
                              normed<T>(sum.z, weight.z, scale, params.offset),
                              normed<T>(sum.w, weight.w, scale, params.offset)});
        }
    }
}

}  // namespace comm_customar_v2
