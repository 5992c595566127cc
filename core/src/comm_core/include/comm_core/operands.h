// Whether a fused call's tensors are as kernels take them, for hooks that look at their operands themselves
// (`all_reduce_add_rms_norm` in hookspecs.py): a few comparisons here, a microsecond in Python.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>

namespace comm_core {

// Where a tensor's elements are. Only of contiguous ones.
struct Span {
    explicit Span(const tvm::ffi::TensorView& tensor)
        : begin(reinterpret_cast<uint64_t>(tensor.data_ptr()) + tensor.byte_offset()),
          end(begin + static_cast<uint64_t>(tensor.numel()) * tensor.dtype().bits / 8) {}

    bool apart_from(const Span& other) const { return end <= other.begin || other.end <= begin; }

    uint64_t begin, end;
};

// As hookspecs.py has the operands of `all_reduce_add_rms_norm`, on `device`: `tensor`, `residual`, `out` and `sum` of
// one shape [num_tokens, hidden_size], `weight` [hidden_size]; one dtype; contiguous, aligned to 16 bytes; `out` is
// `tensor` or apart from all others, `sum` is `residual` or apart from all others. Tensors at address 0 have no memory.
inline bool are_operands(DLDevice device,
                         const tvm::ffi::TensorView& tensor,
                         const tvm::ffi::TensorView& residual,
                         const tvm::ffi::TensorView& weight,
                         const tvm::ffi::TensorView& out,
                         const tvm::ffi::TensorView& sum) {
    constexpr uint64_t kAlignment = 16;
    const DLDataType dtype = tensor.dtype();
    const auto plain = [&](const tvm::ffi::TensorView& each) {
        const DLDataType its = each.dtype();
        const uint64_t begin = Span(each).begin;
        return each.device().device_type == device.device_type && each.device().device_id == device.device_id &&
               its.code == dtype.code && its.bits == dtype.bits && its.lanes == dtype.lanes && begin != 0 &&
               begin % kAlignment == 0 && each.IsContiguous();
    };
    const auto alike = [&](const tvm::ffi::TensorView& each) {
        return each.ndim() == 2 && each.size(0) == tensor.size(0) && each.size(1) == tensor.size(1) && plain(each);
    };
    if (tensor.ndim() != 2 || !plain(tensor) || !alike(residual) || !alike(out) || !alike(sum)) return false;
    if (weight.ndim() != 1 || weight.size(0) != tensor.size(1) || !plain(weight)) return false;
    const Span x(tensor), r(residual), w(weight), y(out), s(sum);
    return (y.begin == x.begin || y.apart_from(x)) && y.apart_from(r) && y.apart_from(w) && y.apart_from(s) &&
           (s.begin == r.begin || s.apart_from(r)) && s.apart_from(x) && s.apart_from(w);
}

}  // namespace comm_core
