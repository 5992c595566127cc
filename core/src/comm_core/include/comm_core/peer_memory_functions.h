// `PeerMemory` as functions for Python: the one header here that knows apache-tvm-ffi. A plugin exports it in a line,
//
//     TVM_FFI_DLL_EXPORT_TYPED_FUNC(peer_memory, comm_core::peer_memory);
//
// and `comm_core.registration` takes what it returns. Errors arrive there as RuntimeError.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <memory>
#include <string>
#include <vector>

#include "peer_memory.h"

namespace comm_core {

// A device's `PeerMemory`, as functions:
//   locate(address, nbytes) -> [sharing, offset, then base, nbytes, key of each piece]
//   share(base, sharing) -> the handle's bytes, or for a file its descriptor
//   open(bytes) -> address
//   import_piece(sharing, file, bytes) -> number
//   map(numbers, nbytes) -> address
//   let_go(address)
//   close()
inline tvm::ffi::Array<tvm::ffi::Function> peer_memory(int64_t device) {
    using tvm::ffi::Any;
    using tvm::ffi::Array;
    using tvm::ffi::Bytes;
    using tvm::ffi::Function;
    const auto memory = std::make_shared<PeerMemory>(static_cast<int>(device));
    const auto listed = [](const Array<int64_t>& values) { return std::vector<int64_t>(values.begin(), values.end()); };
    const auto text = [](const Bytes& bytes) { return std::string(bytes.data(), bytes.size()); };
    const auto locate = [memory](int64_t address, int64_t nbytes) -> Array<Any> {
        const Span span = memory->locate(static_cast<CUdeviceptr>(address), static_cast<size_t>(nbytes));
        Array<Any> found{static_cast<int64_t>(span.sharing), static_cast<int64_t>(span.offset)};
        for (const Piece& piece : span.pieces) {
            found.push_back(static_cast<int64_t>(piece.base));
            found.push_back(static_cast<int64_t>(piece.nbytes));
            found.push_back(tvm::ffi::String(piece.key));
        }
        return found;
    };
    const auto share = [memory](int64_t base, int64_t sharing) -> Any {
        int file = -1;
        const std::string bytes = memory->share(static_cast<CUdeviceptr>(base), static_cast<Sharing>(sharing), file);
        if (file >= 0) return static_cast<int64_t>(file);
        return Bytes(bytes);
    };
    const auto open = [memory, text](Bytes bytes) -> int64_t {
        return static_cast<int64_t>(memory->open(text(bytes)));
    };
    const auto import_piece = [memory, text](int64_t sharing, int64_t file, Bytes bytes) -> int64_t {
        return memory->import_piece(static_cast<Sharing>(sharing), static_cast<int>(file), text(bytes));
    };
    const auto map = [memory, listed](Array<int64_t> numbers, Array<int64_t> nbytes) -> int64_t {
        return static_cast<int64_t>(memory->map(listed(numbers), listed(nbytes)));
    };
    const auto let_go = [memory](int64_t address) { memory->let_go(static_cast<CUdeviceptr>(address)); };
    const auto close = [memory]() { memory->close(); };
    return {Function::FromTyped(locate),
            Function::FromTyped(share),
            Function::FromTyped(open),
            Function::FromTyped(import_piece),
            Function::FromTyped(map),
            Function::FromTyped(let_go),
            Function::FromTyped(close)};
}

}  // namespace comm_core
