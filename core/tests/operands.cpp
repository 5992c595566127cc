// `comm_core/operands.h` for tensors on the CPU, as a hook's native code would ask.
#include <comm_core/operands.h>

namespace {

using tvm::ffi::TensorView;

bool fit(TensorView tensor, TensorView residual, TensorView weight, TensorView out, TensorView sum) {
    return comm_core::are_operands({kDLCPU, 0}, tensor, residual, weight, out, sum);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fit, fit);
