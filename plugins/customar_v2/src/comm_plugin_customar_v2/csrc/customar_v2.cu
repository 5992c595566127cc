// The functions that Python calls; session.cuh and norm_session.cuh implement them.

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
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

// Parses the rows of a table: six numbers each, in the order of Shape's fields.
std::vector<Shape> shapes_of(const Array<int64_t>& numbers) {
    std::vector<Shape> shapes;
    if (numbers.size() == 0 || numbers.size() % 6 != 0)
        TVM_FFI_THROW(ValueError) << "the table has " << numbers.size() << " numbers, which aren't rows of six";
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

// Raises if a kernel timed out. The text is for a person: the caller reads `error()`.
void refuse_if_poisoned(const Session& session) {
    if (session.error() != 0) TVM_FFI_THROW(RuntimeError) << "a kernel timed out waiting for a peer";
}

// Parses the rows of a fused table: six numbers each, in the order of NormShape's fields.
std::vector<NormShape> norm_shapes_of(const Array<int64_t>& numbers) {
    std::vector<NormShape> shapes;
    if (numbers.size() == 0 || numbers.size() % 6 != 0)
        TVM_FFI_THROW(ValueError) << "the fused table has " << numbers.size() << " numbers, which aren't rows of six";
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

// Returns the functions of the hot path by name:
//   all_reduce(tensor)           sums into a new tensor from torch's allocator
//   all_reduce_out(tensor, out)  sums into `out`, which may be `tensor`
//   all_reduce_add_rms_norm_out(tensor, residual, weight, out, sum, eps, offset)
//                                sums, adds the residual and normalises; `out` may be `tensor`, and `sum` may be
//                                `residual`. Returns false, and does nothing, if an operand breaks a precondition
//   all_reduce_add_rms_norm_quant(tensor, residual, weight, values, scale, sum, norm, wants_norm, eps, offset, form)
//                                likewise, and quantises the norm into `values`, bytes, by the `QuantForm` with that
//                                code; stores the norm only if `wants_norm`. The operands meet the hook's
//                                preconditions. Returns false, and does nothing, if no fused kernel takes the rows
// Launches are on the stream that is current for the tensors' device. If `num_tokens` isn't null, it is the address, on
// the device, of the number of real rows, and the other rows may be left out.
Map<String, Function> hot_path(const std::shared_ptr<Session>& session,
                               const std::shared_ptr<Norms>& norms,
                               const int32_t* num_tokens) {
    const auto run = [session, num_tokens](const auto& tensor, char* out) {
        const DLDevice device = tensor.device();
        auto* const stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
        const DLDataType dtype = tensor.dtype();
        const bool one_row = num_tokens == nullptr || tensor.ndim() < 2;
        const int64_t num_rows = one_row ? 1 : tensor.numel() / tensor.size(tensor.ndim() - 1);
        const int64_t nbytes = tensor.numel() * dtype.bits / 8;
        session->run(data_of(tensor), out, nbytes, element_of(dtype), stream, num_tokens, num_rows);
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
    const auto all_reduce_add_rms_norm_out = [session, norms, num_tokens](TensorView tensor,
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
                    static_cast<cudaStream_t>(TVMFFIEnvGetStream(place.device_type, place.device_id)),
                    false,
                    {},
                    num_tokens});
        return true;
    };
    const auto all_reduce_add_rms_norm_quant = [session, norms, num_tokens](TensorView tensor,
                                                                            TensorView residual,
                                                                            TensorView weight,
                                                                            TensorView values,
                                                                            TensorView scale,
                                                                            TensorView sum,
                                                                            TensorView norm,
                                                                            bool wants_norm,
                                                                            double eps,
                                                                            double offset,
                                                                            int64_t form) {
        refuse_if_poisoned(*session);
        if (form < 0 || form >= static_cast<int64_t>(QuantForm::kCount))
            TVM_FFI_THROW(ValueError) << "there is no form " << form;
        const DLDevice place{kDLCUDA, session->device()};
        const bool has_strides = scale.ndim() == 2;
        const NormCall call{data_of(tensor),
                            wants_norm ? data_of(norm) : nullptr,
                            data_of(residual),
                            data_of(sum),
                            data_of(weight),
                            tensor.size(0),
                            tensor.size(1) * tensor.dtype().bits / 8,
                            static_cast<float>(eps),
                            static_cast<float>(offset),
                            element_of(tensor.dtype()),
                            static_cast<cudaStream_t>(TVMFFIEnvGetStream(place.device_type, place.device_id)),
                            true,
                            {data_of(values),
                             reinterpret_cast<float*>(data_of(scale)),
                             has_strides ? scale.stride(0) : 0,
                             has_strides ? scale.stride(1) : 0,
                             static_cast<QuantForm>(form)},
                            num_tokens};
        if (!norms->takes(call)) return false;
        norms->run(call);
        return true;
    };
    return {{"all_reduce", Function::FromTyped(all_reduce)},
            {"all_reduce_out", Function::FromTyped(all_reduce_out)},
            {"all_reduce_add_rms_norm_out", Function::FromTyped(all_reduce_add_rms_norm_out)},
            {"all_reduce_add_rms_norm_quant", Function::FromTyped(all_reduce_add_rms_norm_quant)}};
}

// Returns the functions of a session by name, as `Native` in session.py lists them: those of the hot path, and
//   set_shapes(numbers)          sets the table
//   set_wire_shapes(from_nbytes, numbers)
//                                sets the table of plain sums of half-precision elements from that size on; at
//                                first these are served as all others
//   set_norm_shapes(numbers)     sets the fused table
//   error()                      returns 0, or 1 + the rank that didn't come in time
//   waits()                      returns for each rank how many waits for it were long, their sum and the longest, in
//                                nanoseconds
//   algorithm_of(nbytes)         returns the code of the algorithm that serves a size
//   abort()                      ends every wait of kernels in flight
//   attach(buffers, count)       takes the addresses of all ranks' buffers, and the fewest multiprocessors of any
//                                rank's device; called once, before the first sum
//   padded(address)              returns the functions of the hot path for padded batches: the number of real rows is
//                                an int32 at this address on the device; null if the group has no kernels for them
Map<String, Function> connect(
    int64_t rank, int64_t world_size, Array<int64_t> layout, double timeout_s, int64_t device) {
    const auto session = std::make_shared<Session>(rank, world_size, listed(layout), timeout_s, device);
    const auto norms = std::make_shared<Norms>(*session);
    const auto set_shapes = [session](Array<int64_t> numbers) { session->set_shapes(shapes_of(numbers)); };
    const auto set_wire_shapes = [session](int64_t from_nbytes, Array<int64_t> numbers) {
        session->set_wire_shapes(from_nbytes, shapes_of(numbers));
    };
    const auto set_norm_shapes = [session, norms](Array<int64_t> numbers) {
        norms->set_shapes(norm_shapes_of(numbers));
    };
    const auto error = [session]() -> int64_t { return session->error(); };
    const auto waits = [session]() -> Array<int64_t> {
        const std::vector<int64_t> numbers = session->waits();
        return Array<int64_t>(numbers.begin(), numbers.end());
    };
    const auto algorithm_of = [session](int64_t nbytes) -> int64_t {
        return static_cast<int64_t>(session->shape_of(nbytes).algorithm);
    };
    const auto abort = [session]() { session->abort(); };
    const auto attach = [session](Array<int64_t> buffers, int64_t multiprocessors) {
        session->attach(listed(buffers), multiprocessors);
    };
    const auto padded = [session, norms](int64_t address) -> Optional<Map<String, Function>> {
        if (!has_padded(session->world_size())) return std::nullopt;
        return hot_path(session, norms, reinterpret_cast<const int32_t*>(address));
    };
    Map<String, Function> functions = hot_path(session, norms, nullptr);
    const std::pair<const char*, Function> others[] = {{"set_shapes", Function::FromTyped(set_shapes)},
                                                       {"set_wire_shapes", Function::FromTyped(set_wire_shapes)},
                                                       {"set_norm_shapes", Function::FromTyped(set_norm_shapes)},
                                                       {"error", Function::FromTyped(error)},
                                                       {"waits", Function::FromTyped(waits)},
                                                       {"algorithm_of", Function::FromTyped(algorithm_of)},
                                                       {"abort", Function::FromTyped(abort)},
                                                       {"attach", Function::FromTyped(attach)},
                                                       {"padded", Function::FromTyped(padded)}};
    for (const auto& [name, function] : others) functions.Set(name, function);
    return functions;
}

// Returns the numbers of algorithms, plain and fused, which must equal Python's.
Array<int64_t> constants() {
    return {static_cast<int64_t>(Algorithm::kCount), static_cast<int64_t>(NormAlgorithm::kCount)};
}

}  // namespace
}  // namespace comm_customar_v2

TVM_FFI_DLL_EXPORT_TYPED_FUNC(connect, comm_customar_v2::connect);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(constants, comm_customar_v2::constants);
