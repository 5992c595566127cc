// Programmatic dependent launch: a kernel's blocks start while its predecessor in the stream still runs.
//
// Nothing before `wait_for_predecessors` may touch what another kernel reads or writes. In particular it may not take
// for finished any kernel but those whose blocks had to start for this one's to start: each of our kernels lets its
// successor start early, so several may be resident at once, all but the first of them waiting here. They can't starve
// the first: a kernel's successor starts only after all of the kernel's blocks have.
//
// On devices before sm_90, and in launches without the attribute, both are nothing.
#pragma once

namespace comm_core {

// Lets the next kernel in the stream start once every block has come here.
__device__ __forceinline__ void launch_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when all predecessors have ended and what they wrote is visible. A predecessor that let this kernel start
// early has itself waited here before it ended, so everything before it in the stream has ended too.
__device__ __forceinline__ void wait_for_predecessors() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Has an address or a count computed here, before the wait that follows, where the compiler would leave it until it is
// used, and some twenty instructions would stand between the wait and the first load. A test whose outcome is known to
// us alone (no address is odd, no count that large) is the only thing that it doesn't move across the wait.
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
