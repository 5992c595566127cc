// What of apache-tvm-ffi the host's code names, for a program that is compiled without it.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

struct Thrown {
    std::ostringstream text;
    ~Thrown() noexcept(false) { throw std::runtime_error(text.str()); }
};
#define TVM_FFI_THROW(kind) Thrown().text

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
enum { kDLFloat = 2, kDLBfloat = 4 };

namespace tvm::ffi {
template <typename T>
using Array = std::vector<T>;
}
