// Two-shot push over an FP8 wire, for three ranks or more: shares and sums travel as packets (packets.cuh), in half of
// their bytes. Rounds, parts and the two halves of a slot are those of twoshot_push.cuh; parts are whole chunks, so
// that every rank owns one if the message has two_shot_vecs() chunks.
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

template <typename T, int W>
__global__ void __launch_bounds__(max_threads(W, 2), 1) twoshot_push_fp8(const __grid_constant__ Params params) {
    static_assert(W > 2, "two ranks send no fewer bytes by two shots");
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const Slots<W> slots(params, params.cells_at, params.cells_nbytes, epoch);
    const uint32_t chunks = (params.num_vecs + kChunkVecs - 1) / kChunkVecs, part = (chunks + W - 1) / W;
    const uint32_t rank = params.rank, stride = threads_in_grid(), thread = thread_in_grid();
    const uint32_t rounds = (part * kChunkLanes + stride - 1) / stride, pipeline_depth = params.pipeline_depth;
    const uint32_t upper = static_cast<uint32_t>(params.cells_nbytes / 2);
    const uint32_t scales = static_cast<uint32_t>(scales_at(params.cells_nbytes / 2));
    // Returns the length of a rank's part, in cells: the last ones may be shorter.
    const auto end_of = [&](uint32_t owner) { return min(part, chunks - min(chunks, owner * part)) * kChunkLanes; };
    const auto owner_of = [&](int s) { return Slots<W>::source(rank, s); };
    const auto at = [&](uint32_t round) { return CellOfPart{thread + round * stride, scales}; };
    comm_core::SpinGuard guard;
    comm_core::wait_for_predecessors();

    // All lanes of a warp take every step, since chunks are quantised by eight of them.
    for (uint32_t step = 0; step < rounds + 2 * pipeline_depth; ++step) {
        if (step < rounds) {
            const CellOfPart place = at(step);
            // Issue all loads before the first store, which waits for its load.
            Vec shares[W - 1][2];
#pragma unroll
            for (int d = 0; d < W - 1; ++d) {
                const uint32_t owner = Slots<W>::after(rank, d);
                shares[d][0] = shares[d][1] = Vec{};
                if (place.cell < end_of(owner)) place.load(params, owner * part, shares[d]);
            }
#pragma unroll
            for (int d = 0; d < W - 1; ++d) {
                float values[kLaneElements];
                unpack<T>(shares[d], values);
                const Packet packet = to_packet(values);
                if (place.cell >= end_of(Slots<W>::after(rank, d))) continue;
                place.send_values(slots.theirs(d), packet);
                place.send_scale(slots.theirs(d), packet);
            }
        }
        if (step >= pipeline_depth && step - pipeline_depth < rounds) {
            const CellOfPart place = at(step - pipeline_depth);
            const uint32_t end = end_of(rank);
            const auto look_at = [&](int s) { return place.look(slots.mine(s)); };
            Vec own[2] = {};
            Packet arrived[W - 1];
            if (place.cell < end) place.load(params, rank * part, own);
#pragma unroll
            for (int s = 0; s < W - 1; ++s) {
                arrived[s] = Packet{};
                if (place.cell < end) arrived[s] = look_at(s);
            }
            poll_packets(arrived, look_at, owner_of, params, guard);
            float values[kLaneElements];
            unpack<T>(own, values);
#pragma unroll
            for (int s = 0; s < W - 1; ++s) add(arrived[s], values);
            const Packet sum = to_packet(values);  // the lanes meet here: all have read their scales
            if (place.cell < end) {
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
        const CellOfPart place = at(step - 2 * pipeline_depth);
        const auto look_at = [&](int s) { return place.look(slots.mine(s) + upper); };
        Packet sums[W - 1];
#pragma unroll
        for (int s = 0; s < W - 1; ++s) {
            sums[s] = Packet{};
            if (place.cell < end_of(owner_of(s))) sums[s] = look_at(s);
        }
        poll_packets(sums, look_at, owner_of, params, guard);
        __syncwarp();  // all lanes have read the scales
#pragma unroll
        for (int s = 0; s < W - 1; ++s) {
            if (place.cell >= end_of(owner_of(s))) continue;
            place.template store<T>(params, owner_of(s) * part, sums[s]);
            place.clear(slots.mine(s) + upper);
        }
    }
    sum_tail<T, W>(params, epoch, guard);
}

}  // namespace comm_customar_v2
