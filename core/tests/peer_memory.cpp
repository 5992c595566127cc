// comm_core/peer_memory.h against the driver that fake_cuda.cpp stands for; one process is owner and peer. Exits with
// the number of failures, each told on stdout.
#include <comm_core/peer_memory.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <numeric>

#include "fake_cuda.h"

using comm_core::PeerMemory;
using comm_core::Sharing;
using comm_core::Span;

namespace {

int failures = 0;
constexpr size_t kUnit = 1 << 16;

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

// Pieces side by side, every byte another's than its neighbours'.
CUdeviceptr expandable(const std::vector<size_t>& nbytes, unsigned types) {
    const auto& driver = comm_core::Driver::get();
    CUdeviceptr base = 0;
    const size_t total = std::accumulate(nbytes.begin(), nbytes.end(), size_t{0});
    driver.cuMemAddressReserve_(&base, total, 0, 0, 0);
    CUdeviceptr place = base;
    for (const size_t size : nbytes) {
        driver.cuMemMap_(place, size, 0, fake_create(size, types), 0);
        place += size;
    }
    CUmemAccessDesc access{};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    driver.cuMemSetAccess_(base, total, &access, 1);
    for (size_t i = 0; i < total; ++i) at(base)[i] = static_cast<char>(i * 31 + i / 251);
    return base;
}

CUdeviceptr taken(PeerMemory& owner, PeerMemory& peer, const Span& span, bool backwards) {
    std::vector<int64_t> numbers(span.pieces.size()), nbytes(span.pieces.size());
    for (size_t i = 0; i < numbers.size(); ++i) {
        const size_t number = backwards ? numbers.size() - 1 - i : i;
        int file = -1;
        const std::string bytes = owner.share(span.pieces[number].base, span.sharing, file);
        expect((file >= 0) == (span.sharing == Sharing::kFile), "a descriptor just for a file");
        numbers[number] = peer.import_piece(span.sharing, file, bytes);
        nbytes[number] = static_cast<int64_t>(span.pieces[number].nbytes);
        if (file >= 0) close(file);
    }
    return peer.map(numbers, nbytes);
}

void ipc() {
    PeerMemory owner(0), peer(0);
    const CUdeviceptr base = fake_malloc(4 * kUnit);
    at(base)[kUnit + 5] = 42;
    const Span span = owner.locate(base + kUnit, 100);
    expect(span.sharing == Sharing::kIpc && span.pieces.size() == 1 && span.offset == kUnit, "one allocation");
    int file = -1;
    const std::string handle = owner.share(span.pieces[0].base, span.sharing, file);
    expect(handle.size() == sizeof(CUipcMemHandle) && file == -1, "a handle of CUDA IPC");
    const CUdeviceptr there = peer.open(handle);
    expect(there != base && at(there + span.offset)[5] == 42, "the peer sees it");
    const std::string before = span.pieces[0].key;
    fake_replace(base);
    expect(owner.locate(base, 1).pieces[0].key != before, "other memory has another key");
    expect_error([&] { owner.locate(base + 4 * kUnit - 8, 16); }, "");
    expect_error([&] { peer.open("short"); }, "isn't a handle of CUDA IPC");
    peer.let_go(there);
    expect_error([&] { peer.let_go(there); }, "nothing is open at this address");
}

void pieces(unsigned types, Sharing sharing) {
    const int before = fake_open();
    const CUdeviceptr base = expandable({2 * kUnit, 4 * kUnit, kUnit, 2 * kUnit}, types);
    const int owned = fake_open();
    {
        PeerMemory owner(0), peer(0);
        const Span span = owner.locate(base + 5 * kUnit, 3 * kUnit);  // in the second, third and fourth
        expect(span.sharing == sharing && span.pieces.size() == 3 && span.offset == 3 * kUnit, "three pieces");
        const CUdeviceptr there = taken(owner, peer, span, true);
        const bool same = std::memcmp(at(there + span.offset), at(base + 5 * kUnit), 3 * kUnit) == 0;
        expect(there != span.pieces[0].base && same, "the peer sees them side by side");
        at(base)[6 * kUnit] ^= 1;
        expect(at(there)[4 * kUnit] == at(base)[6 * kUnit], "it is the same memory");
        const Span whole = owner.locate(base, 9 * kUnit);
        expect(whole.pieces.size() == 4 && whole.pieces[1].key == span.pieces[0].key, "a piece has one key");
        expect_error([&] { owner.locate(base, 10 * kUnit); }, "");
        // A window that can't be mapped to its end.
        const int open = fake_open();
        expect_error([&] { peer.map({0, 99}, {static_cast<int64_t>(kUnit), 1}); }, "");
        expect_error([&] { peer.map({0}, {static_cast<int64_t>(64 * kUnit)}); }, "cuMemMap: invalid argument");
        expect(fake_open() == open, "nothing is left of it");
        expect(open > owned, "the peer holds something");
        peer.close();
        expect(fake_open() == owned, "close gives it all back");
        peer.close();
    }
    expect(fake_open() == owned && owned > before, "and only that");
}

void refusals() {
    PeerMemory memory(0);
    expect_error([&] { memory.locate(4096, 16); }, "no device memory is known");
    const CUdeviceptr base = expandable({kUnit}, CU_MEM_HANDLE_TYPE_NONE);
    expect_error([&] { memory.locate(base, 16); }, "can't be shared");
    expect_error([&] { memory.locate(fake_malloc(kUnit), 0); }, "empty");
    expect_error([&] { memory.import_piece(Sharing::kFabric, -1, "short"); }, "isn't a fabric handle");
    expect_error([&] { memory.import_piece(Sharing::kFile, open("/dev/null", O_RDONLY), ""); }, "invalid argument");
    PeerMemory second(1);
    expect_error([&] { second.locate(base, 16); }, "isn't in this device's memory");
}

}  // namespace

int main() {
    ipc();
    pieces(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, Sharing::kFile);
    pieces(CU_MEM_HANDLE_TYPE_FABRIC, Sharing::kFabric);
    pieces(CU_MEM_HANDLE_TYPE_FABRIC | CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, Sharing::kFile);
    refusals();
    std::printf("%d failures\n", failures);
    return failures;
}
