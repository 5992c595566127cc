// `comm_core/operands.h` for tensors on the CPU, as a hook's native code would ask.
#include <comm_core/operands.h>

namespace {

using tvm::ffi::TensorView;

bool fit(TensorView tensor, TensorView residual, TensorView weight, TensorView out, TensorView sum) {
    return comm_core::are_operands({kDLCPU, 0}, tensor, residual, weight, out, sum);
}

bool fit_on(int64_t type,
            int64_t index,
            TensorView tensor,
            TensorView residual,
            TensorView weight,
            TensorView out,
            TensorView sum) {
    const DLDevice device{static_cast<DLDeviceType>(type), static_cast<int32_t>(index)};
    return comm_core::are_operands(device, tensor, residual, weight, out, sum);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fit, fit);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fit_on, fit_on);
