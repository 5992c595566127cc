// What the Python side calls; session.cuh for what it does.

#include <comm_core/operands.h>

#include <memory>
#include <string>

#include "norm_session.cuh"
#include "session.cuh"

namespace comm_customar_v2 {
namespace {

using comm_core::data_of;
using comm_core::element_of;
using comm_core::listed;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

// A table's rows, six numbers each, as in Shape.
std::vector<Shape> shapes_of(const Array<int64_t>& numbers) {
    std::vector<Shape> shapes;
    if (numbers.size() == 0 || numbers.size() % 6 != 0) TVM_FFI_THROW(ValueError) << "rows of six numbers are needed";
    for (size_t row = 0; row < numbers.size(); row += 6) {
        const auto at = [&](size_t column) { return static_cast<int64_t>(numbers[row + column]); };
        const Shape shape{at(0),
                          static_cast<Algorithm>(at(1)),
                          static_cast<int>(at(2)),
                          static_cast<uint32_t>(at(3)),
                          static_cast<uint32_t>(at(4)),
                          static_cast<uint32_t>(at(5))};
        if (at(1) < 0 || at(1) >= static_cast<int64_t>(Algorithm::kCount) || at(3) < 32 || at(3) > 1024 ||
            at(3) % 32 != 0 || at(4) < 1 || at(5) < 0) {
            TVM_FFI_THROW(ValueError) << "row " << row / 6 << " of the table can't be launched";
        }
        shapes.push_back(shape);
    }
    return shapes;
}

// Raises where a kernel gave up: the text is for a person, the caller reads `error()`.
void refuse_if_poisoned(const Session& session) {
    if (session.error() != 0) TVM_FFI_THROW(RuntimeError) << "a kernel gave up";
}

// A fused table's rows, six numbers each, as in NormShape.
std::vector<NormShape> norm_shapes_of(const Array<int64_t>& numbers) {
    std::vector<NormShape> shapes;
    if (numbers.size() == 0 || numbers.size() % 6 != 0) TVM_FFI_THROW(ValueError) << "rows of six numbers are needed";
    for (size_t row = 0; row < numbers.size(); row += 6) {
        const auto at = [&](size_t column) { return static_cast<int64_t>(numbers[row + column]); };
        const auto one_of = [](int64_t number) { return number == 1 || number == 2 || number == 4; };
        if (at(1) < 0 || at(1) >= static_cast<int64_t>(NormAlgorithm::kCount) || !one_of(at(2)) ||
            !(one_of(at(3)) || at(3) == 8) || at(4) < 1 || at(5) < 0) {
            TVM_FFI_THROW(ValueError) << "row " << row / 6 << " of the fused table can't be launched";
        }
        shapes.push_back({at(0),
                          static_cast<NormAlgorithm>(at(1)),
                          static_cast<int>(at(2)),
                          static_cast<uint32_t>(at(3)),
                          static_cast<uint32_t>(at(4)),
                          static_cast<uint32_t>(at(5))});
    }
    return shapes;
}

// A session, as functions by name; `Native` in session.py has them:
//   all_reduce(tensor)           sums into a tensor that the caller's allocator gives
//   all_reduce_out(tensor, out)  sums into `out`, which may be `tensor`
//   all_reduce_add_rms_norm_out(tensor, residual, weight, out, sum, eps, offset)
//                                `out` may be `tensor`, and `sum` the residual; false, and nothing is sent, where these
//                                aren't as kernels take them
//   set_shapes(numbers)          the table from now on
//   set_norm_shapes(numbers)     the fused table from now on
//   error()                      0, or 1 + the rank that didn't come in time
//   algorithm_of(nbytes)         the code of the algorithm that serves a size
//   abort()                      ends every wait of kernels in flight
//   set_early(early)             whether blocks may start while the kernel before still runs; at first they may
//   attach(buffers, count)       every rank's buffer and the multiprocessors to count on; once, before the first call
// The stream is the one that the binding found current for the tensors' device.
Map<String, Function> connect(
    int64_t rank, int64_t world_size, Array<int64_t> layout, double timeout_s, int64_t device) {
    const auto session = std::make_shared<Session>(rank, world_size, listed(layout), timeout_s, device);
    const auto norms = std::make_shared<Norms>(*session);
    const auto run = [session](const auto& tensor, char* out) {
        const DLDevice place = tensor.device();
        auto* const stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(place.device_type, place.device_id));
        const DLDataType dtype = tensor.dtype();
        session->run(data_of(tensor), out, tensor.numel() * dtype.bits / 8, element_of(dtype), stream);
    };
    const auto all_reduce = [session, run](TensorView tensor) -> Tensor {
        refuse_if_poisoned(*session);
        Tensor out = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, tensor.shape(), tensor.dtype(), tensor.device());
        run(tensor, data_of(out));
        return out;
    };
    const auto all_reduce_out = [session, run](TensorView tensor, TensorView out) {
        refuse_if_poisoned(*session);
        run(tensor, data_of(out));
    };
    const auto all_reduce_add_rms_norm_out = [session, norms](TensorView tensor,
                                                              TensorView residual,
                                                              TensorView weight,
                                                              TensorView out,
                                                              TensorView sum,
                                                              double eps,
                                                              double offset) {
        refuse_if_poisoned(*session);
        const DLDevice place{kDLCUDA, session->device()};
        if (!comm_core::are_operands(place, tensor, residual, weight, out, sum)) return false;
        const DLDataType dtype = tensor.dtype();
        norms->run({data_of(tensor),
                    data_of(out),
                    data_of(residual),
                    data_of(sum),
                    data_of(weight),
                    tensor.size(0),
                    tensor.size(1) * dtype.bits / 8,
                    static_cast<float>(eps),
                    static_cast<float>(offset),
                    element_of(dtype),
                    static_cast<cudaStream_t>(TVMFFIEnvGetStream(place.device_type, place.device_id))});
        return true;
    };
    const auto set_shapes = [session](Array<int64_t> numbers) { session->set_shapes(shapes_of(numbers)); };
    const auto set_norm_shapes = [session, norms](Array<int64_t> numbers) {
        norms->set_shapes(norm_shapes_of(numbers));
    };
    const auto error = [session]() -> int64_t { return session->error(); };
    const auto algorithm_of = [session](int64_t nbytes) -> int64_t {
        return static_cast<int64_t>(session->shape_of(nbytes).algorithm);
    };
    const auto abort = [session]() { session->abort(); };
    const auto set_early = [session](bool early) { session->set_early(early); };
    const auto attach = [session](Array<int64_t> buffers, int64_t multiprocessors) {
        session->attach(listed(buffers), multiprocessors);
    };
    return {{"all_reduce", Function::FromTyped(all_reduce)},
            {"all_reduce_out", Function::FromTyped(all_reduce_out)},
            {"all_reduce_add_rms_norm_out", Function::FromTyped(all_reduce_add_rms_norm_out)},
            {"set_shapes", Function::FromTyped(set_shapes)},
            {"set_norm_shapes", Function::FromTyped(set_norm_shapes)},
            {"error", Function::FromTyped(error)},
            {"algorithm_of", Function::FromTyped(algorithm_of)},
            {"abort", Function::FromTyped(abort)},
            {"set_early", Function::FromTyped(set_early)},
            {"attach", Function::FromTyped(attach)}};
}

// How many algorithms there are, plain and fused: what the Python side must agree with.
Array<int64_t> constants() {
    return {static_cast<int64_t>(Algorithm::kCount), static_cast<int64_t>(NormAlgorithm::kCount)};
}

}  // namespace
}  // namespace comm_customar_v2

TVM_FFI_DLL_EXPORT_TYPED_FUNC(connect, comm_customar_v2::connect);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(constants, comm_customar_v2::constants);
