// What a test asks of the driver that fake_cuda.cpp stands for.
#pragma once

#include <cstddef>

// The granularity of physical memory, in bytes.
constexpr size_t kUnit = 1 << 16;

// How much is open: references to physical memory, reservations, contexts.
extern "C" int fake_open();
