// comm_core/host.h's resources against a stand-in for the CUDA runtime, which counts the contexts that it has to create
// in threads without one. Exits with the number of failures, each printed to stdout.
#include "emulate.h"
// The stand-in must come before what uses it.
#include <comm_core/host.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

namespace {

thread_local int current = 0;
thread_local bool has_context = false;
int created = 0, live = 0, failures = 0;

// Every stand-in that needs a context calls this. The first call in a thread without one would create it.
void need_context() {
    if (!has_context) ++created;
    has_context = true;
}

void expect(int is, int expected, const char* what) {
    if (is == expected) return;
    std::printf("%s: %d, not %d\n", what, is, expected);
    ++failures;
}

struct Session {
    comm_core::ErrorWord error;
    comm_core::WaitCounters waits{4};
    comm_core::StreamOrder order;
};

constexpr int kResources = 4;  // two arrays and two events

}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    current = device;
    has_context = true;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    need_context();
    *event = reinterpret_cast<cudaEvent_t>(static_cast<intptr_t>(++live));
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
    need_context();
    --live;
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t nbytes, unsigned) {
    need_context();
    ++live;
    *memory = std::malloc(nbytes);
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** mapped, void* memory, unsigned) {
    *mapped = memory;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
    need_context();
    --live;
    std::free(memory);
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
    return "";
}
}

int main() {
    cudaSetDevice(1);
    auto session = std::make_unique<Session>();
    expect(live, kResources, "resources of a session");
    session.reset();
    expect(live, 0, "resources after a session's end in its own thread");

    session = std::make_unique<Session>();
    std::thread([&] { session.reset(); }).join();
    expect(created, 0, "contexts created in a thread that has chosen no device");
    expect(live, kResources, "resources that wait");
    session = std::make_unique<Session>();
    expect(live, kResources, "resources of the next session");
    cudaSetDevice(2);
    session.reset();
    expect(live, kResources, "resources that wait while another device is current");
    comm_core::DeferredFrees::run();
    expect(live, 0, "resources after all");
    std::printf("%d failures\n", failures);
    return failures;
}
