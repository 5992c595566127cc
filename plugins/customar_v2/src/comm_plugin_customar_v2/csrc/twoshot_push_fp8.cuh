// Two-shot push over an FP8 wire: shares and sums travel as packets (packets.cuh), in half of their bytes. Rounds,
// parts and the two halves of a slot are those of twoshot_push.cuh; parts are whole chunks, so that every rank owns one
// if the message has two_shot_vecs() chunks.
//
// The owner of a part adds the other ranks' shares to its own, in fp32, and quantises the sum once. All ranks store
// what they dequantise of that, the owner too, so they get the same bits. The tail is exact.
//
// Lineage: ZeRO++'s quantised collectives and Flash Communication quantise what each of an all-reduce's two shots
// sends, as does TensorRT-LLM's low-precision all-reduce (customLowPrecisionAllReduceKernels.cu).
#pragma once

#include "packets.cuh"
#include "tail.cuh"

namespace comm_customar_v2 {

template <typename T, int W, int V>
__global__ void __launch_bounds__(max_threads(W, 2 * V), 1) twoshot_push_fp8(const __grid_constant__ Params params) {
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const Slots<W> slots(params, params.cells_at, params.cells_nbytes, epoch);
    const uint32_t chunks = (params.num_vecs + kChunkVecs - 1) / kChunkVecs, part = (chunks + W - 1) / W;
    const uint32_t rank = params.rank, stride = threads_in_grid(), thread = thread_in_grid();
    const uint32_t per_round = V * stride, rounds = (part * kChunkLanes + per_round - 1) / per_round;
    const uint32_t pipeline_depth = params.pipeline_depth, upper = static_cast<uint32_t>(params.cells_nbytes / 2);
    const uint32_t scales = static_cast<uint32_t>(scales_at(params.cells_nbytes / 2));
    // Returns the length of a rank's part, in cells: the last ones may be shorter.
    const auto end_of = [&](uint32_t owner) { return min(part, chunks - min(chunks, owner * part)) * kChunkLanes; };
    const auto owner_of = [&](int s) { return Slots<W>::source(rank, s); };
    comm_core::SpinGuard guard;
    comm_core::wait_for_predecessors();

    // All lanes of a warp take every step, since chunks are quantised by eight of them.
    for (uint32_t step = 0; step < rounds + 2 * pipeline_depth; ++step) {
        const auto at = [&](uint32_t round, int j) {
            return CellOfPart{thread + round * per_round + j * stride, scales};
        };
        if (step < rounds) {
            // Issue all loads before the first store, which waits for its load.
            Vec shares[W - 1][V][2];
#pragma unroll
            for (int d = 0; d < W - 1; ++d) {
                const uint32_t owner = Slots<W>::after(rank, d);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    shares[d][j][0] = shares[d][j][1] = Vec{};
                    if (at(step, j).cell < end_of(owner)) at(step, j).load(params, owner * part, shares[d][j]);
                }
            }
#pragma unroll
            for (int d = 0; d < W - 1; ++d) {
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    float values[kLaneElements];
                    unpack<T>(shares[d][j], values);
                    const Packet packet = quantized(values);
                    if (at(step, j).cell >= end_of(Slots<W>::after(rank, d))) continue;
                    at(step, j).send_values(slots.theirs(d), packet);
                    at(step, j).send_scale(slots.theirs(d), packet);
                }
            }
        }
        if (step >= pipeline_depth && step - pipeline_depth < rounds) {
            const uint32_t round = step - pipeline_depth, end = end_of(rank);
            Vec own[V][2];
            Packet arrived[V][W - 1];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                own[j][0] = own[j][1] = Vec{};
                if (at(round, j).cell < end) at(round, j).load(params, rank * part, own[j]);
#pragma unroll
                for (int s = 0; s < W - 1; ++s) {
                    arrived[j][s] = Packet{};
                    if (at(round, j).cell < end) arrived[j][s] = at(round, j).look(slots.mine(s));
                }
            }
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const CellOfPart place = at(round, j);
                const auto look_at = [&](int s) { return place.look(slots.mine(s)); };
                poll_packets(arrived[j], look_at, owner_of, params, guard);
                float values[kLaneElements];
                unpack<T>(own[j], values);
#pragma unroll
                for (int s = 0; s < W - 1; ++s) add(arrived[j][s], values);
                const Packet sum = quantized(values);  // the lanes meet here: all have read their scales
                if (place.cell >= end) continue;
#pragma unroll
                for (int d = 0; d < W - 1; ++d) {
                    place.send_values(slots.theirs(d) + upper, sum);
                    place.send_scale(slots.theirs(d) + upper, sum);
                }
                place.template store<T>(params, rank * part, sum);
#pragma unroll
                for (int s = 0; s < W - 1; ++s) place.clear(slots.mine(s));
            }
        }
        if (step < 2 * pipeline_depth) continue;
        const uint32_t round = step - 2 * pipeline_depth;
        Packet sums[V][W - 1];
#pragma unroll
        for (int j = 0; j < V; ++j) {
#pragma unroll
            for (int s = 0; s < W - 1; ++s) {
                sums[j][s] = Packet{};
                if (at(round, j).cell < end_of(owner_of(s))) sums[j][s] = at(round, j).look(slots.mine(s) + upper);
            }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const CellOfPart place = at(round, j);
            const auto look_at = [&](int s) { return place.look(slots.mine(s) + upper); };
            poll_packets(sums[j], look_at, owner_of, params, guard);
            __syncwarp();
#pragma unroll
            for (int s = 0; s < W - 1; ++s) {
                if (place.cell >= end_of(owner_of(s))) continue;
                place.template store<T>(params, owner_of(s) * part, sums[j][s]);
                place.clear(slots.mine(s) + upper);
            }
        }
    }
    sum_tail<T, W>(params, epoch, guard);
}

}  // namespace comm_customar_v2
