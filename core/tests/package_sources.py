"""Sources of packages with native code, small enough to compile in a moment."""

# The macro of apache-tvm-ffi takes a compiler seconds, so one package has it, and the others what it defines.
MACRO_CPP = """
#include <comm_core/version.h>
#include <tvm/ffi/function.h>

static int64_t add(int64_t a, int64_t b) { return a + b; }
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add, add);

static int64_t major_version() { return COMM_CORE_HOOK_API_MAJOR; }
TVM_FFI_DLL_EXPORT_TYPED_FUNC(major_version, major_version);
"""

EXPORT_H = """
#pragma once
#include <tvm/ffi/c_api.h>

#define EXPORT(name, value)                                                                \
    extern "C" __attribute__((visibility("default"))) int __tvm_ffi_##name(                \
        void*, [[maybe_unused]] const TVMFFIAny* given, int32_t, TVMFFIAny* result) {      \
        result->type_index = kTVMFFIInt;                                                   \
        result->zero_padding = 0;                                                          \
        result->v_int64 = value;                                                           \
        return 0;                                                                          \
    }
"""

ADD_CPP = """
#include "detail.h"
#include "export.h"

static int64_t add(int64_t a, int64_t b) { return a + b + OFFSET; }
EXPORT(add, add(given[0].v_int64, given[1].v_int64))
"""

FILL_CU = """
#include <cuda_runtime.h>

#include "export.h"

__global__ void fill(float* x, float value) { x[threadIdx.x] = value; }

static int64_t launch(int64_t x, double value) {
    fill<<<1, 32>>>(reinterpret_cast<float*>(x), static_cast<float>(value));
    return cudaGetLastError();
}
EXPORT(launch, launch(given[0].v_int64, given[1].v_float64))
"""

VERSION_CPP = """
#include <cuda_runtime.h>

#include "export.h"

static int64_t runtime_version() {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : -1;
}
EXPORT(runtime_version, runtime_version())
"""
