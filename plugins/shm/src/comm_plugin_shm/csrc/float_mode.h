// The calling thread's floating-point mode, set to the default for the duration of a call.
//
// A thread may flush subnormals to zero (`torch.set_flush_denormal`) or round in another direction. The ranks' sums
// would then differ in their bits.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace comm_shm {

class DefaultFloatMode {
  public:
    DefaultFloatMode() : saved_(get()) {
        if ((saved_ & kMask) != kDefault) set((saved_ & ~kMask) | kDefault);
    }
    DefaultFloatMode(const DefaultFloatMode&) = delete;
    DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;
    ~DefaultFloatMode() {
        if ((saved_ & kMask) != kDefault) set(saved_);
    }

  private:
#if defined(__x86_64__)
    using Word = uint32_t;
    // All of MXCSR but the exceptions' flags, in bits 0 to 5. By default every exception is masked (bits 7 to 12).
    static constexpr Word kMask = 0xffc0;
    static constexpr Word kDefault = 0x1f80;
    static Word get() { return _mm_getcsr(); }
    static void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
    using Word = uint64_t;
    static constexpr Word kMask = ~Word{0};  // FPCR has no flags
    static constexpr Word kDefault = 0;
    static Word get() {
        Word word;
        asm volatile("mrs %0, fpcr" : "=r"(word));
        return word;
    }
    static void set(Word word) { asm volatile("msr fpcr, %0" ::"r"(word)); }
#else
    using Word = uint32_t;
    static constexpr Word kMask = 0;
    static constexpr Word kDefault = 0;
    static Word get() { return 0; }
    static void set(Word) {}
#endif

    Word saved_;
};

}  // namespace comm_shm
