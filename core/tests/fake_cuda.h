// What a test asks of the driver that fake_cuda.cpp stands for.
#pragma once

#include <cuda.h>

extern "C" {

// As cudaMalloc gives it.
CUdeviceptr fake_malloc(size_t nbytes);
// As if it had been freed, and other memory been given the same place.
void fake_replace(CUdeviceptr base);
// Physical memory that may be shared as `types` say.
CUmemGenericAllocationHandle fake_create(size_t nbytes, unsigned types);
// How much is open: handles, reservations, contexts.
int fake_open();
}
