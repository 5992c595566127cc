// Where a recorded call finds every rank's input: a row of a table in this device's memory.
//
// A row is a tag and an address for each rank, 64 bits each. The host writes it when the capture ends, before the
// graph's first replay, and never while one runs; so a kernel may read it before it has waited for its predecessors.
// `comm_core.registration` is the host's side.
#pragma once

#include "memory.cuh"
#include "wait.cuh"

namespace comm_core {

// In the error word, which else names a rank: a call was replayed whose row isn't its own.
constexpr uint32_t kNotRegistered = 1u << 16;

// The bits of a tag that are its row's index; those above count the calls that took a row.
constexpr int64_t kRowMask = (1 << 20) - 1;

// One call's row; all zero where a call has none.
struct Registered {
    const unsigned long long* row;  // tag, then the addresses by rank
    unsigned long long tag;         // the row's, where it was written for this call
    uint64_t offset;                // of this launch's part in the message, in bytes
};

// Finds every rank's input. All threads call it.
//
// A row has another tag where the capture didn't end well, and nobody wrote it, or where a later capture has it now.
// The launch then goes on with `input`, this rank's own, for everybody's: it reads no stranger's memory and keeps no
// peer waiting, and the error word says that its sum is none. That costs a comparison.
template <int W>
__device__ __forceinline__ void find_inputs(const Registered& call,
                                            const char* input,
                                            const Bound& bound,
                                            const char* (&inputs)[W]) {
    const bool mine = call.row[0] == call.tag;
#pragma unroll
    for (int q = 0; q < W; ++q) {
        inputs[q] = mine ? reinterpret_cast<const char*>(call.row[1 + q]) + call.offset : input;
    }
    // Relaxed, and not over what may be there: either word ends the session.
    if (!mine && threadIdx.x == 0) store_relaxed_sys(bound.error, kNotRegistered);
}

}  // namespace comm_core
