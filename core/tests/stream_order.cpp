// comm_core/host.h's StreamOrder against a stand-in for the CUDA runtime, which refuses what the runtime refuses, and a
// destroyed stream's handle. Exits with the number of failures, each printed to stdout.
#include "emulate.h"
// What it stands for comes after it.
#include <comm_core/host.h>

#include <cstdio>
#include <map>
#include <string>

namespace {

struct Stream {
    unsigned long long id, capture = 0;
    int work = 0;                            // the last call on it, by number
    std::map<unsigned long long, int> seen;  // the last call that it waits for, outside captures (0) and in each
};

std::map<cudaStream_t, Stream> streams;
std::map<cudaEvent_t, std::pair<unsigned long long, int>> events;  // the capture and the call that each was recorded in
unsigned long long next_id = 1;
long next_event = 1;
int failures = 0, records = 0;

cudaStream_t handle(long number) {
    return reinterpret_cast<cudaStream_t>(number);
}

void open(long number) {
    streams[handle(number)] = {next_id++, 0, 0, {}};
}

void destroy(long number) {
    streams.erase(handle(number));
}

void expect(bool right, const std::string& what) {
    if (right) return;
    std::printf("%s\n", what.c_str());
    ++failures;
}

// Makes a call, and expects that it is ordered after the call `before` of the same capture, or outside captures.
int calls = 0;
int call(comm_core::StreamOrder& order, long number, int before) {
    order.begin(handle(number));
    Stream& stream = streams.at(handle(number));
    const int seen = stream.seen.count(stream.capture) ? stream.seen.at(stream.capture) : 0;
    expect(seen == before,
           "call " + std::to_string(calls + 1) + " comes after call " + std::to_string(seen) + ", not after " +
               std::to_string(before));
    stream.work = stream.seen[stream.capture] = ++calls;
    order.end(handle(number));
    return calls;
}

}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(next_event++);
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ++records;
    if (stream == cudaStreamLegacy) stream = nullptr;
    const Stream& on = streams.at(stream);
    events[event] = {on.capture, on.seen.count(on.capture) ? on.seen.at(on.capture) : 0};
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const auto [capture, seen] = events.at(event);
    Stream& on = streams.at(stream);
    if (capture != on.capture) return cudaErrorStreamCaptureIsolation;
    on.seen[capture] = seen;
    return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
    if (streams.at(stream).capture != 0) return cudaErrorStreamCaptureUnsupported;
    *id = streams.at(stream).id;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream,
                                     cudaStreamCaptureStatus* status,
                                     unsigned long long* id,
                                     cudaGraph_t*,
                                     const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**,
                                     size_t*) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream,
                                        cudaStreamCaptureStatus* status,
                                        unsigned long long* id,
                                        cudaGraph_t*,
                                        const cudaGraphNode_t**,
                                        size_t*) {
#endif
    const Stream& on = streams.at(stream);
    *status = on.capture == 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
    if (on.capture != 0) *id = on.capture;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorStreamCaptureIsolation ? "isolation" : "another error";
}
}

namespace {

void eager() {
    comm_core::StreamOrder order;
    const int first = call(order, 0, 0);
    const int second = call(order, 0, first);
    expect(records == 0, "nothing is recorded while only the default stream is used");
    open(10);
    const int third = call(order, 10, second);
    const int fourth = call(order, 10, third);
    destroy(10);
    const int fifth = call(order, 0, fourth);
    open(10);  // the same handle
    const int sixth = call(order, 10, fifth);
    destroy(10);
    open(10);
    const int seventh = call(order, 10, sixth);
    call(order, 0, seventh);
    destroy(10);
}

void captured() {
    comm_core::StreamOrder order;
    for (long number = 20; number < 24; ++number) open(number);
    const int eager_call = call(order, 20, 0);
    streams[handle(20)].capture = streams[handle(21)].capture = 7;
    streams[handle(22)].capture = 8;
    const int first = call(order, 20, 0);
    const int second = call(order, 21, first);
    const int third = call(order, 20, second);
    call(order, 20, third);
    call(order, 22, 0);
    // An eager call meanwhile comes after the eager call before, whose stream captures by now.
    const int another = call(order, 23, eager_call);
    streams[handle(20)].capture = streams[handle(21)].capture = 0;
    call(order, 21, another);
}

}  // namespace

int main() {
    streams[nullptr] = {0, 0, 0, {}};
    try {
        eager();
        captured();
    } catch (const std::exception& error) {
        expect(false, error.what());
    }
    std::printf("%d failures\n", failures);
    return failures;
}
