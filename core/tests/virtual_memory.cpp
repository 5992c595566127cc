// comm_core/virtual_memory.h against the driver that fake_cuda.cpp stands for; one process is owner and peer. Exits
// with the number of failures, each printed to stdout.
#include <comm_core/virtual_memory.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <functional>

#include "fake_cuda.h"

using comm_core::VirtualMemory;

namespace {

int failures = 0;

void expect(bool right, const char* what) {
    if (right) return;
    std::printf("%s\n", what);
    ++failures;
}

void expect_error(const std::function<void()>& call, const std::string& words) {
    try {
        call();
    } catch (const std::exception& error) {
        if (std::string(error.what()).find(words) != std::string::npos) return;
        std::printf("\"%s\" instead of \"%s\"\n", error.what(), words.c_str());
    }
    expect(false, ("no error: " + words).c_str());
}

char* at(CUdeviceptr address) {
    return reinterpret_cast<char*>(address);
}

void shared() {
    constexpr size_t nbytes = 3 * kUnit + 5;
    VirtualMemory owner(0), peer(0);
    expect(owner.rounded(1) == kUnit && owner.rounded(nbytes) == 4 * kUnit, "whole units");
    const int64_t first = owner.create(1), second = owner.create(nbytes);
    const CUdeviceptr here = owner.map(second, nbytes);
    const int file = owner.export_file(second);
    const CUdeviceptr there = peer.map(peer.import_file(file), nbytes);
    expect(first != second && close(file) == 0, "the descriptor is the caller's");
    for (size_t i = 0; i < nbytes; ++i) at(here)[i] = static_cast<char>(i * 31 + i / 251);
    expect(there != here && std::memcmp(at(there), at(here), nbytes) == 0, "the peer sees it");
    at(there)[nbytes - 1] ^= 1;
    expect(at(here)[nbytes - 1] == at(there)[nbytes - 1], "it is the same memory");
    const int open = fake_open();
    expect_error([&] { peer.map(0, 5 * kUnit); }, "cuMemMap: invalid argument");
    expect_error([&] { peer.map(1, kUnit); }, "no allocation number 1");
    expect(fake_open() == open, "nothing is left of what can't be mapped");
    owner.close();
    owner.close();
    expect(at(there)[3] == 3 * 31, "the peer keeps it when its owner has let go");
    expect_error([&] { owner.export_file(second); }, "no allocation number");
}

void refusals() {
    VirtualMemory memory(0), second(1);
    expect_error([&] { second.create(kUnit); }, "cuMemCreate: invalid argument");
    expect_error([&] { memory.import_file(open("/dev/null", O_RDONLY)); }, "invalid argument");
    const int file = memory.export_file(memory.create(1));
    // What was imported isn't handed on.
    expect_error([&] { memory.export_file(memory.import_file(file)); }, "invalid argument");
    close(file);
}

}  // namespace

int main() {
    shared();
    refusals();
    expect(fake_open() == 0, "all of it is given back");
    std::printf("%d failures\n", failures);
    return failures;
}
