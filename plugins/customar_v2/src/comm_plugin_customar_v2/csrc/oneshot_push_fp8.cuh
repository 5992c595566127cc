// One-shot push over an FP8 wire, for two ranks: each sends the whole message to the other as packets (packets.cuh),
// and adds what arrives to its own packets, round after round.
//
// With two ranks, two shots send no fewer bytes, and take a trip more and round a sum once more. A rank adds its own
// elements as they arrive at the other one, so both get the same bits. The tail is exact.
//
// Measured on two H200: more vectors a thread, or pushes that run rounds ahead of the sums, gain nothing. Enough is in
// flight without them.
//
// Lineage: that of twoshot_push_fp8.cuh.
#pragma once

#include "packets.cuh"
#include "tail.cuh"

namespace comm_customar_v2 {

template <typename T, int W>
__global__ void __launch_bounds__(max_threads(W, 2), 1) oneshot_push_fp8(const __grid_constant__ Params params) {
    static_assert(W == 2, "more ranks send fewer bytes by two shots");
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const Slots<W> slots(params, params.cells_at, params.cells_nbytes, epoch);
    char* const mine = slots.mine(0);
    char* const theirs = slots.theirs(0);
    const uint32_t end = (params.num_vecs + kChunkVecs - 1) / kChunkVecs * kChunkLanes;
    const uint32_t stride = threads_in_grid(), rounds = (end + stride - 1) / stride;
    const uint32_t scales = static_cast<uint32_t>(scales_at(params.cells_nbytes));
    comm_core::SpinGuard guard;
    comm_core::wait_for_predecessors();

    // All lanes of a warp take every round, since chunks are quantised by eight of them.
    for (uint32_t round = 0; round < rounds; ++round) {
        const CellOfPart place{thread_in_grid() + round * stride, scales};
        const bool has_cell = place.cell < end;
        Vec vecs[2];
        place.load(params, 0, vecs);
        float values[kLaneElements];
        unpack<T>(vecs, values);
        const Packet own = to_packet(values);
        Packet arrived[W - 1] = {};
        const auto look_at = [&](int) { return place.look(mine); };
        if (has_cell) {
            place.send_values(theirs, own);
            place.send_scale(theirs, own);
            arrived[0] = look_at(0);
        }
        poll_packets(arrived, look_at, [&](int) { return 1 - params.rank; }, params, guard);
        float sums[kLaneElements] = {};
        add(own, sums);
        add(arrived[0], sums);
        __syncwarp();  // all lanes have read the scales
        if (!has_cell) continue;
        // In place, the sums overwrite the input: this thread alone reads these vectors, and it has pushed them.
        place.template store<T>(params, 0, sums);
        place.clear(mine);
    }
    sum_tail<T, W>(params, epoch, guard);
}

}  // namespace comm_customar_v2
