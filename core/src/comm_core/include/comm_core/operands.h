// A check of a fused call's operands, for hooks that declare `checks_operands` (`all_reduce_add_rms_norm` in
// hookspecs.py): a few comparisons here, a microsecond in Python.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>

namespace comm_core {

// The addresses of a contiguous tensor's elements.
struct Span {
    explicit Span(const tvm::ffi::TensorView& tensor)
        : begin(reinterpret_cast<uint64_t>(tensor.data_ptr()) + tensor.byte_offset()),
          end(begin + static_cast<uint64_t>(tensor.numel()) * tensor.dtype().bits / 8) {}

    bool disjoint_from(const Span& other) const { return end <= other.begin || other.end <= begin; }

    uint64_t begin, end;
};

// Returns whether the operands keep the preconditions of `all_reduce_add_rms_norm`: on `device`; `tensor`, `residual`,
// `out` and `sum` of one shape [num_tokens, hidden_size], `weight` [hidden_size]; one dtype; contiguous, aligned to 16
// bytes; `out` is `tensor` or overlaps no other operand, `sum` is `residual` or overlaps no other operand. A tensor at
// address 0 has no memory, and is refused.
inline bool are_operands(DLDevice device,
                         const tvm::ffi::TensorView& tensor,
                         const tvm::ffi::TensorView& residual,
                         const tvm::ffi::TensorView& weight,
                         const tvm::ffi::TensorView& out,
                         const tvm::ffi::TensorView& sum) {
    constexpr uint64_t kAlignment = 16;
    const DLDataType dtype = tensor.dtype();
    const auto fits = [&](const tvm::ffi::TensorView& each) {
        const DLDataType other = each.dtype();
        const uint64_t begin = Span(each).begin;
        return each.device().device_type == device.device_type && each.device().device_id == device.device_id &&
               other.code == dtype.code && other.bits == dtype.bits && other.lanes == dtype.lanes && begin != 0 &&
               begin % kAlignment == 0 && each.IsContiguous();
    };
    const auto matches = [&](const tvm::ffi::TensorView& each) {
        return each.ndim() == 2 && each.size(0) == tensor.size(0) && each.size(1) == tensor.size(1) && fits(each);
    };
    if (tensor.ndim() != 2 || !fits(tensor) || !matches(residual) || !matches(out) || !matches(sum)) return false;
    if (weight.ndim() != 1 || weight.size(0) != tensor.size(1) || !fits(weight)) return false;
    const Span x(tensor), r(residual), w(weight), y(out), s(sum);
    return (y.begin == x.begin || y.disjoint_from(x)) && y.disjoint_from(r) && y.disjoint_from(w) &&
           y.disjoint_from(s) && (s.begin == r.begin || s.disjoint_from(r)) && s.disjoint_from(x) && s.disjoint_from(w);
}

}  // namespace comm_core
