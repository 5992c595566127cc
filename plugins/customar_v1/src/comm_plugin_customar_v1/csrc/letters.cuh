// Letters: what the ranks write into each other's buffers, once, before the backend is trusted.
//
// Drivers have said that peer access works where it gave wrong data. So every rank stores a page of words into every
// peer's memory, and loads one from there, with the accesses that the kernels use; the words depend on a number that
// the writer made up for this session, so that neither old memory nor another group's buffer passes for right.
//
// A rank's region: a page from each rank, its own among them, which its peers load; then as many for what it loaded.
#pragma once

#include <comm_core/memory.cuh>

#include <cstdint>

#include "params.cuh"

namespace comm_customar_v1 {

constexpr uint32_t kLetterNbytes = 4096;
constexpr uint32_t kLetterWords = kLetterNbytes / 4;
constexpr uint64_t kLettersNbytes = 2 * kMaxRanks * kLetterNbytes;

// Word number `index` of the letter of the rank that made up `number`.
__host__ __device__ constexpr uint32_t letter_word(uint32_t number, uint32_t index) {
    // A bijection of `index` for each `number`: words that are swapped are seen. The multiplier is Knuth's, of the
    // golden ratio.
    const uint32_t mixed = (index + 1) * 2654435761u ^ number;
    return (mixed ^ mixed >> 15) * 2654435761u;
}

// Where rank `writer` wrote its letter in the region at `letters`, and where what was loaded of it goes.
__host__ __device__ constexpr uint64_t letter_at(uint32_t writer) {
    return static_cast<uint64_t>(writer) * kLetterNbytes;
}
__host__ __device__ constexpr uint64_t answer_at(uint32_t writer) {
    return letter_at(kMaxRanks + writer);
}

struct Mail {
    char* letters[kMaxRanks];  // by rank, the region as this device sees it
    uint32_t rank;
    uint32_t number;
};

// One block a rank that is written to.
static __global__ void write_letters(const __grid_constant__ Mail mail) {
    char* const letter = mail.letters[blockIdx.x] + letter_at(mail.rank);
    for (uint32_t vec = threadIdx.x; vec < kLetterWords / 4; vec += blockDim.x) {
        const uint32_t word = 4 * vec;
        comm_core::store_relaxed_sys(letter + word * 4,
                                     Vec{letter_word(mail.number, word),
                                         letter_word(mail.number, word + 1),
                                         letter_word(mail.number, word + 2),
                                         letter_word(mail.number, word + 3)});
    }
}

// One block a rank that is read from: what lies there of its own. The host orders it after the peer's writing.
static __global__ void read_letters(const __grid_constant__ Mail mail) {
    const uint32_t writer = blockIdx.x;
    const char* const letter = mail.letters[writer] + letter_at(writer);
    char* const answer = mail.letters[mail.rank] + answer_at(writer);
    for (uint32_t vec = threadIdx.x; vec < kLetterWords / 4; vec += blockDim.x) {
        comm_core::store(answer + vec * 16, comm_core::load_relaxed_sys(letter + vec * 16));
    }
}

// How many words of a letter, or of what was loaded of it, aren't its writer's.
inline uint32_t wrong_words(const uint32_t* words, uint32_t number) {
    uint32_t wrong = 0;
    for (uint32_t index = 0; index < kLetterWords; ++index) wrong += words[index] != letter_word(number, index);
    return wrong;
}

}  // namespace comm_customar_v1
