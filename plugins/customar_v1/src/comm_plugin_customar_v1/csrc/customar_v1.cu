// What the Python side calls; session.cuh for what it does.

#include <memory>
#include <string>

#include "session.cuh"

namespace comm_customar_v1 {
namespace {

using comm_core::data_of;
using comm_core::element_of;
using comm_core::listed;
using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::String;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

// A table's rows, five numbers each, as in Shape.
std::vector<Shape> shapes_of(const Array<int64_t>& numbers) {
    std::vector<Shape> shapes;
    if (numbers.size() == 0 || numbers.size() % 5 != 0) TVM_FFI_THROW(ValueError) << "rows of five numbers are needed";
    for (size_t row = 0; row < numbers.size(); row += 5) {
        const auto at = [&](size_t column) { return static_cast<int64_t>(numbers[row + column]); };
        if (at(1) < 0 || at(1) >= static_cast<int64_t>(Algorithm::kCount) || at(3) < 32 || at(3) > 1024 ||
            at(3) % 32 != 0 || at(4) < 1) {
            TVM_FFI_THROW(ValueError) << "row " << row / 5 << " of the table can't be launched";
        }
        shapes.push_back({at(0),
                          static_cast<Algorithm>(at(1)),
                          static_cast<int>(at(2)),
                          static_cast<uint32_t>(at(3)),
                          static_cast<uint32_t>(at(4))});
    }
    return shapes;
}

// Raises where a kernel gave up: the text is for a person, the caller reads `error()`.
void refuse_if_poisoned(const Session& session) {
    if (session.error() != 0) TVM_FFI_THROW(RuntimeError) << "a kernel waited in vain";
}

// A session, as functions, in the order of `Native` in session.py:
//   into(tensor, out)         sums into `out`, which may be `tensor`
//   fresh(tensor)             sums into a tensor that the caller's allocator gives
//   error()                   0, or 1 + the rank that was waited for in vain
//   algorithm_of(nbytes)      the code of the algorithm that serves a size
//   abort()                   ends every wait of kernels in flight
//   set_shapes(numbers)       the table from now on
//   handle()                  of this rank's buffer, for the peers
//   attach(handles, count)    opens every rank's buffer; the multiprocessors to count on; once, before what follows
//   write_letters(number)     to every rank
//   read_letters(numbers)     of every rank; "", or what is wrong
//   unmap()                   lets go of the peers' buffers
//   free()                    gives this rank's back
// The stream is the one that the binding found current for the tensors' device.
Array<Function> connect(int64_t rank, int64_t world_size, Array<int64_t> layout, double timeout_s, int64_t device) {
    auto session = std::make_shared<Session>(rank, world_size, listed(layout), timeout_s, device);
    const auto run = [session](const auto& tensor, char* out) {
        const DLDevice place = tensor.device();
        auto* const stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(place.device_type, place.device_id));
        const DLDataType dtype = tensor.dtype();
        session->run(data_of(tensor), out, tensor.numel() * dtype.bits / 8, element_of(dtype), stream);
    };
    const auto into = [session, run](TensorView tensor, TensorView out) {
        refuse_if_poisoned(*session);
        run(tensor, data_of(out));
    };
    const auto fresh = [session, run](TensorView tensor) -> Tensor {
        refuse_if_poisoned(*session);
        Tensor out = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, tensor.shape(), tensor.dtype(), tensor.device());
        run(tensor, data_of(out));
        return out;
    };
    const auto error = [session]() -> int64_t { return session->error(); };
    const auto algorithm_of = [session](int64_t nbytes) -> int64_t {
        return static_cast<int64_t>(session->shape_of(nbytes).algorithm);
    };
    const auto abort = [session]() { session->abort(); };
    const auto set_shapes = [session](Array<int64_t> numbers) { session->set_shapes(shapes_of(numbers)); };
    const auto handle = [session]() -> Bytes { return session->handle(); };
    const auto attach = [session](Array<Bytes> handles, int64_t multiprocessors) {
        session->attach({handles.begin(), handles.end()}, multiprocessors);
    };
    const auto write_letters = [session](int64_t number) { session->write_letters(number); };
    const auto read_letters = [session](Array<int64_t> numbers) -> String {
        return session->read_letters(listed(numbers));
    };
    const auto unmap = [session]() { session->unmap(); };
    const auto free = [session]() { session->free(); };
    return {Function::FromTyped(into),
            Function::FromTyped(fresh),
            Function::FromTyped(error),
            Function::FromTyped(algorithm_of),
            Function::FromTyped(abort),
            Function::FromTyped(set_shapes),
            Function::FromTyped(handle),
            Function::FromTyped(attach),
            Function::FromTyped(write_letters),
            Function::FromTyped(read_letters),
            Function::FromTyped(unmap),
            Function::FromTyped(free)};
}

// What the Python side must agree with: bytes of the counter and the barriers' flags, bytes of the letters, and how
// many algorithms there are.
Array<int64_t> constants() {
    return {static_cast<int64_t>(kFlagsAt + kMaxBlocks * comm_core::kFlagLineNbytes),
            static_cast<int64_t>(kLettersNbytes),
            static_cast<int64_t>(Algorithm::kCount)};
}

}  // namespace
}  // namespace comm_customar_v1

TVM_FFI_DLL_EXPORT_TYPED_FUNC(connect, comm_customar_v1::connect);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(constants, comm_customar_v1::constants);
