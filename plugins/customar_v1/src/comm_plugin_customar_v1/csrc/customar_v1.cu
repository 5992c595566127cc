// The functions that session.py calls; session.cuh does the work.

#include <memory>
#include <string>

#include "session.cuh"

namespace comm_customar_v1 {
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

// The rows of a table, each given as the first five fields of Shape.
std::vector<Shape> shapes_of(const Array<int64_t>& numbers) {
    std::vector<Shape> shapes;
    if (numbers.size() == 0 || numbers.size() % 5 != 0)
        TVM_FFI_THROW(ValueError) << "the table has " << numbers.size() << " numbers, which aren't rows of five";
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

// Raises if a kernel timed out; session.py then reads `error()` and raises an error that names the rank.
void refuse_if_poisoned(const Session& session) {
    if (session.error() != 0) TVM_FFI_THROW(RuntimeError) << "a kernel timed out waiting for a peer";
}

// Returns the functions of a session by name, as `Native` in session.py lists them:
//   all_reduce(tensor)              returns the sum, in a tensor from the caller's allocator
//   all_reduce_out(tensor, out)     sums into `out`, which may be `tensor`
//   error()                         returns 0, or 1 + the rank that a kernel timed out waiting for
//   waits()                         returns three numbers for each rank: how many waits for it were long, their sum and
//                                   the longest, in nanoseconds
//   algorithm_of(nbytes)            returns the code of the algorithm that serves a size
//   abort()                         ends every wait of running kernels
//   set_shapes(numbers)             replaces the table
//   attach(buffers, count)          takes the addresses of all ranks' buffers, and the fewest multiprocessors of any
//                                   rank's device; called once, before the functions below and the first sum
//   write_test_pages(seed)          writes a page to every rank
//   read_test_pages(seeds)          reads every rank's pages; returns "", or what is wrong; after all ranks' writes
// Sums run on the stream that the binding found current for the tensors' device.
Map<String, Function> connect(
    int64_t rank, int64_t world_size, Array<int64_t> layout, double timeout_s, int64_t device) {
    auto session = std::make_shared<Session>(rank, world_size, listed(layout), timeout_s, device);
    const auto run = [session](const auto& tensor, char* out) {
        const DLDevice place = tensor.device();
        auto* const stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(place.device_type, place.device_id));
        const DLDataType dtype = tensor.dtype();
        session->run(data_of(tensor), out, tensor.numel() * dtype.bits / 8, element_of(dtype), stream);
    };
    const auto all_reduce_out = [session, run](TensorView tensor, TensorView out) {
        refuse_if_poisoned(*session);
        run(tensor, data_of(out));
    };
    const auto all_reduce = [session, run](TensorView tensor) -> Tensor {
        refuse_if_poisoned(*session);
        Tensor out = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, tensor.shape(), tensor.dtype(), tensor.device());
        run(tensor, data_of(out));
        return out;
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
    const auto set_shapes = [session](Array<int64_t> numbers) { session->set_shapes(shapes_of(numbers)); };
    const auto attach = [session](Array<int64_t> buffers, int64_t multiprocessors) {
        session->attach(listed(buffers), multiprocessors);
    };
    const auto write_test_pages = [session](int64_t seed) { session->write_test_pages(seed); };
    const auto read_test_pages = [session](Array<int64_t> seeds) -> String {
        return session->read_test_pages(listed(seeds));
    };
    return {{"all_reduce", Function::FromTyped(all_reduce)},
            {"all_reduce_out", Function::FromTyped(all_reduce_out)},
            {"error", Function::FromTyped(error)},
            {"waits", Function::FromTyped(waits)},
            {"algorithm_of", Function::FromTyped(algorithm_of)},
            {"abort", Function::FromTyped(abort)},
            {"set_shapes", Function::FromTyped(set_shapes)},
            {"attach", Function::FromTyped(attach)},
            {"write_test_pages", Function::FromTyped(write_test_pages)},
            {"read_test_pages", Function::FromTyped(read_test_pages)}};
}

// Returns what session.py needs to know: the size of the counter and the barriers' flags, the size of the region of the
// peer-access test, both in bytes, and the number of algorithms.
Array<int64_t> constants() {
    return {static_cast<int64_t>(kFlagsAt + kMaxBlocks * comm_core::kFlagLineNbytes),
            static_cast<int64_t>(kTestRegionNbytes),
            static_cast<int64_t>(Algorithm::kCount)};
}

}  // namespace
}  // namespace comm_customar_v1

TVM_FFI_DLL_EXPORT_TYPED_FUNC(connect, comm_customar_v1::connect);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(constants, comm_customar_v1::constants);
