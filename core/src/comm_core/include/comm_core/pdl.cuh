// Programmatic dependent launch: a kernel's blocks start while its predecessor in the stream still runs.
//
// Before `wait_for_predecessors`, a kernel may access nothing that another kernel reads or writes, and may assume of no
// earlier kernel that it has ended. Each kernel here lets its successor start early, so several kernels may be resident
// at once, and all but the first of them wait. They can't starve the first: a kernel's successor starts only after all
// of the kernel's blocks have started.
//
// On devices before sm_90, and in launches without the attribute, both functions do nothing.
#pragma once

namespace comm_core {

// Lets the next kernel in the stream start once every block has called it or ended.
__device__ __forceinline__ void launch_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when all predecessors have ended and their writes are visible. A predecessor that let this kernel start early
// has itself called this function before it ended, so everything before it in the stream has ended too.
__device__ __forceinline__ void wait_for_predecessors() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Makes the compiler compute an address or a count here, before the wait that follows. Otherwise it computes the value
// after the wait, which puts some twenty instructions between the wait and the first load. It doesn't move a
// conditional trap across the wait; this one never fires, since no address is 1 and no count is 2^32 - 1.
template <typename T>
__device__ __forceinline__ T* ready(T* address) {
    asm volatile("{ .reg .pred never; setp.eq.u64 never, %0, 1; @never trap; }" : "+l"(address));
    return address;
}

__device__ __forceinline__ unsigned int ready(unsigned int count) {
    asm volatile("{ .reg .pred never; setp.eq.u32 never, %0, -1; @never trap; }" : "+r"(count));
    return count;
}

}  // namespace comm_core
