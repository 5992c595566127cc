// One-shot push over an FP8 wire, for two ranks: each sends the whole message to the other as packets (packets.cuh),
// and adds what arrives to its own packets, in rounds in which pushes run `pipeline_depth` ahead of sums.
//
// With two ranks, two shots send no fewer bytes, and take a trip more and round a sum once more. A rank adds its own
// elements as they arrive at the other one, so both get the same bits. The tail is exact.
//
// Lineage: that of twoshot_push_fp8.cuh.
#pragma once

#include "packets.cuh"
#include "tail.cuh"

namespace comm_customar_v2 {

template <typename T, int W, int V>
__global__ void __launch_bounds__(max_threads(W, 2 * V), 1) oneshot_push_fp8(const __grid_constant__ Params params) {
    static_assert(W == 2, "more ranks send fewer bytes by two shots");
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const Slots<W> slots(params, params.cells_at, params.cells_nbytes, epoch);
    char* const mine = slots.mine(0);
    char* const theirs = slots.theirs(0);
    const uint32_t end = (params.num_vecs + kChunkVecs - 1) / kChunkVecs * kChunkLanes;
    const uint32_t stride = threads_in_grid(), thread = thread_in_grid(), per_round = V * stride;
    const uint32_t rounds = (end + per_round - 1) / per_round, pipeline_depth = params.pipeline_depth;
    const uint32_t scales = static_cast<uint32_t>(scales_at(params.cells_nbytes));
    // Eight lanes take consecutive chunks, so that the scales of four leave together: a packet on the link has some 16
    // bytes of its own, whatever it carries.
    const uint32_t first = thread / kChunkLanes * kChunkLanes * V + thread % kChunkLanes;
    const auto at = [&](uint32_t round, int j) {
        return CellOfPart{first + round * per_round + j * kChunkLanes, scales};
    };
    // Loads and quantises the elements of a round. All lanes of a warp call it.
    const auto quantize = [&](uint32_t round, Packet(&packets)[V]) {
        Vec vecs[V][2];
#pragma unroll
        for (int j = 0; j < V; ++j) at(round, j).load(params, 0, vecs[j]);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            float values[kLaneElements];
            unpack<T>(vecs[j], values);
            packets[j] = to_packet(values);
        }
    };
    comm_core::SpinGuard guard;
    comm_core::wait_for_predecessors();

    for (uint32_t step = 0; step < rounds + pipeline_depth; ++step) {
        Packet own[V];
        if (step < rounds) {
            quantize(step, own);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                if (at(step, j).cell < end) at(step, j).send_values(theirs, own[j]);
            }
            bool together = false;
            if constexpr (V == 4) {
                together = at(step, V - 1).cell < end;
                if (together) at(step, 0).send_scales(theirs, own);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) {
                if (!together && at(step, j).cell < end) at(step, j).send_scale(theirs, own[j]);
            }
        }
        if (step < pipeline_depth) continue;
        const uint32_t round = step - pipeline_depth;
        Packet arrived[V][W - 1];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            arrived[j][0] = Packet{};
            if (at(round, j).cell < end) arrived[j][0] = at(round, j).look(mine);
        }
        // In place, the sums may overwrite the input: this thread alone reads these vectors, and it has pushed them.
        if (pipeline_depth != 0) quantize(round, own);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const CellOfPart place = at(round, j);
            const auto look_at = [&](int) { return place.look(mine); };
            poll_packets(arrived[j], look_at, [&](int) { return 1 - params.rank; }, params, guard);
            float values[kLaneElements] = {};
            add(own[j], values);
            add(arrived[j][0], values);
            __syncwarp();  // all lanes have read the scales
            if (place.cell >= end) continue;
            place.template store<T>(params, 0, values);
            place.clear(mine);
        }
    }
    sum_tail<T, W>(params, epoch, guard);
}

}  // namespace comm_customar_v2
