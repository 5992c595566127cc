// The fused kernels on a CPU, as emulated.cpp has the plain ones, and between them launches of those, on the same
// buffers: the sums to the bit, the norms against fp64, and the norms' bits the same on every rank, from every
// algorithm and in every shape of launch.
//
//     emulated_norm WORLD_SIZE ROUNDS
//
// Compiling takes long: only two ranks have all dtypes.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "emulated_ranks.h"
#include "judged_rows.h"
// The kernels come after what stands for a GPU.
#include "add_norm.cuh"
#include "oneshot_push.cuh"
#include "oneshot_push_norm.cuh"
#include "padded_push_norm.cuh"
#include "twoshot_push.cuh"
#include "twoshot_push_norm.cuh"

using namespace emulated;

namespace {

constexpr uint32_t kMostVecs = 2250;  // of a message
constexpr size_t kLargest = kMostVecs * 16;
constexpr uint64_t kTailsAt = 1 << 17;
constexpr Layout kLayout{kTailsAt, kTailsAt + 4096, 2 * kLargest};

struct Launch {
    std::string name;
    std::function<void(const NormParams&)> kernel;
    uint32_t vecs, cluster, clusters, pipeline_depth;
    bool two_shots, separate;
    bool quantizes = false, padded = false;
};

struct Rank {
    std::vector<char> buffer;
    Tensors tensors;
};

// What padded launches read, the same on all ranks.
int32_t num_tokens = 0;
Padding padding{};

template <typename T, int W, bool kQuantizes>
void padded(const NormParams& params) {
    padded_push_norm<T, W, kQuantizes>({params, padding});
}

// Chooses which of a launch's rows are real; returns how many are summed.
uint32_t pad(uint32_t world_size, uint32_t num_rows, std::mt19937& dice) {
    const uint32_t before = dice() % 2 == 0 ? dice() % 9 : 0;
    const auto rows = static_cast<int32_t>(before + num_rows);
    const int32_t numbers[] = {0, 1, -3, rows / 2, rows - 1, rows, rows + 4, 1 << 30};
    num_tokens = numbers[dice() % 8];
    const auto one_shot = static_cast<uint32_t>(world_size + dice() % (num_rows + 1));
    padding = {&num_tokens, rows, one_shot, 1, before};
    const uint32_t end = static_cast<uint32_t>(std::clamp(num_tokens, 0, rows));
    return std::max(end, before + 1) - before;
}

NormParams params_of(std::vector<Rank>& ranks, size_t rank, uint32_t num_rows, uint32_t row_vecs, bool in_place) {
    NormParams params{};
    params.plain = session_params(ranks, kLayout, rank);
    Tensors& tensors = ranks[rank].tensors;
    params.plain.input = tensors.input.data();
    params.plain.output = in_place ? tensors.input.data() : tensors.output.data();
    params.plain.num_vecs = num_rows * row_vecs;
    params.residual = tensors.residual.data();
    params.weight = tensors.weight.data();
    params.sum = in_place ? tensors.residual.data() : tensors.sum.data();
    params.num_rows = num_rows;
    params.row_vecs = row_vecs;
    params.eps = kEps;
    params.offset = kOffset;
    return params;
}

uint32_t up_to_warps(uint32_t threads) {
    return (threads + 31) / 32 * 32;
}

template <typename T, int W>
void plain(std::vector<Rank>& ranks, uint32_t num_rows, uint32_t row_vecs, bool in_place, bool two_shots) {
    const bool parts = two_shots && num_rows * row_vecs >= two_shot_vecs(W);
    fake::on_every_rank(W, [&](size_t rank) {
        const NormParams params = params_of(ranks, rank, num_rows, row_vecs, in_place);
        fake::run_grid(
            2, 32, 1, [&] { parts ? twoshot_push<T, W, 1>(params.plain) : oneshot_push<T, W, 1>(params.plain); });
    });
}

// The launch on the first `present` ranks.
template <typename T, int W>
void run(std::vector<Rank>& ranks,
         uint32_t num_rows,
         uint32_t row_vecs,
         bool in_place,
         const Launch& launch,
         size_t present = W,
         const Quantised& how = {QuantForm::kStatic, true, false}) {
    if (launch.separate) plain<T, W>(ranks, num_rows, row_vecs, in_place, true);
    const uint32_t groups = launch.two_shots ? (num_rows + W - 1) / W : num_rows;
    const uint32_t clusters = std::min(launch.clusters, groups), together = launch.cluster * launch.vecs;
    const uint32_t threads = launch.separate ? 64 : up_to_warps((row_vecs + together - 1) / together);
    fake::on_every_rank(present, [&](size_t rank) {
        NormParams params = params_of(ranks, rank, num_rows, row_vecs, in_place);
        params.inverse_hidden = 1.0f / static_cast<float>(row_vecs * 4 * T::count);
        params.plain.pipeline_depth = launch.pipeline_depth;
        if (launch.quantizes) {
            Tensors& tensors = ranks[rank].tensors;
            const auto [row_stride, column_stride] = strides_of(how, num_rows, row_vecs);
            params.quant = {tensors.values.data(), tensors.scales.data(), row_stride, column_stride, how.form};
            if (!how.wants_norm) params.plain.output = nullptr;
        }
        fake::run_grid(clusters * launch.cluster, threads, launch.cluster, [&] { launch.kernel(params); });
    });
}

template <typename T>
void fill_tensor(std::vector<char>& tensor, std::mt19937& dice, bool any_bits) {
    std::normal_distribution<float> normal;
    for (size_t byte = 0; byte < kLargest; byte += 4) {
        float values[T::count];
        for (float& value : values) value = normal(dice);
        const uint32_t word = any_bits ? any_word(dice) : T::pack(values);
        std::memcpy(tensor.data() + byte, &word, 4);
    }
}

template <typename T>
bool summed(const std::vector<Rank>& ranks, size_t count) {
    std::vector<std::vector<char>> inputs;
    for (const Rank& rank : ranks) inputs.push_back(rank.tensors.input);
    for (size_t index = 0; index < count; ++index) {
        const float expected = fake::summed<T>(inputs, index);
        for (const Rank& rank : ranks) {
            if (!fake::same(expected, fake::at<T>(rank.tensors.output.data(), index))) return false;
        }
    }
    return true;
}

// A launch whose peers don't come ends, and says for whom it waited.
template <typename T, int W>
bool gives_up(std::vector<Rank>& ranks, const std::vector<Launch>& launches) {
    comm_core::SpinGuard::most_polls = 100;
    for (const Launch& launch : launches) {
        if (launch.separate) continue;
        set_up_buffers(ranks, kLayout);
        error_word = 0;
        num_tokens = 2 * W + 1;
        padding = {&num_tokens, 2 * W + 1, W, 1, 0};
        run<T, W>(ranks, 2 * W + 1, 37, false, launch, 1);
        // Of those that are missing the first.
        if (error_word != 1 + 1) {
            std::printf("%s, %d ranks, of which one comes: the error word is %u\n", launch.name.c_str(), W, error_word);
            return false;
        }
    }
    return true;
}

template <typename T, int W>
int check(int rounds, unsigned seed) {
    std::vector<Launch> launches = {
        {"oneshot 2, clusters of 2", oneshot_push_norm<T, W, 2>, 2, 2, 1, 0, false, false},
        {"twoshot 2", twoshot_push_norm<T, W, 2>, 2, 1, 3, 0, true, false},
        {"twoshot 2, pipeline_depth 1", twoshot_push_norm<T, W, 2>, 2, 1, 2, 1, true, false},
        {"twoshot 2, clusters of 2, pipeline_depth 1", twoshot_push_norm<T, W, 2>, 2, 2, 1, 1, true, false},
        {"separate", add_norm<T>, 1, 1, 2, 0, false, true},
        {"padded", padded<T, W, false>, padded_norm_vecs(W), 1, 2, 1, false, false, false, true},
        {"padded, clusters of 2", padded<T, W, false>, padded_norm_vecs(W), 2, 3, 1, false, false, false, true},
    };
    if constexpr (W <= 4) {
        const std::vector<Launch> more = {
            {"oneshot 1", oneshot_push_norm<T, W, 1>, 1, 1, 2, 0, false, false},
            {"oneshot 1, clusters of 4", oneshot_push_norm<T, W, 1>, 1, 4, 1, 0, false, false},
            {"twoshot 1", twoshot_push_norm<T, W, 1>, 1, 1, 3, 0, true, false},
            {"twoshot 1, clusters of 2, pipeline_depth 5", twoshot_push_norm<T, W, 1>, 1, 2, 1, 5, true, false},
        };
        launches.insert(launches.end(), more.begin(), more.end());
    }
    if constexpr (W == 2) launches.push_back({"oneshot 4", oneshot_push_norm<T, 2, 4>, 4, 1, 2, 0, false, false});
    // One dtype, as compiling takes long.
    if constexpr (std::is_same_v<T, comm_core::BFloat16>) {
        const std::vector<Launch> more = {
            {"quantised oneshot 2", oneshot_push_norm<T, W, 2, true>, 2, 1, 2, 0, false, false, true},
            {"quantised oneshot 2, clusters of 2", oneshot_push_norm<T, W, 2, true>, 2, 2, 1, 0, false, false, true},
            {"quantised twoshot 2", twoshot_push_norm<T, W, 2, true>, 2, 1, 2, 1, true, false, true},
            {"quantised twoshot 2, clusters of 2", twoshot_push_norm<T, W, 2, true>, 2, 2, 1, 0, true, false, true},
            {"padded, quantised", padded<T, W, true>, padded_norm_vecs(W), 2, 2, 1, false, false, true, true},
        };
        launches.insert(launches.end(), more.begin(), more.end());
    }
    std::vector<Rank> ranks(W);
    set_up_buffers(ranks, kLayout);
    std::mt19937 dice(seed);
    int done = 0;
    for (int round = 0; round < rounds; ++round) {
        const uint32_t lengths[] = {1, 5, 31, 33, 64, 70, 97, 130, 48, 112}, counts[] = {1, 2, 3, 4, 5, 7, 9};
        const uint32_t row_vecs = lengths[(dice() + round) % 10];
        // Beyond four ranks as many as two shots take, in a round or two, of which the last lacks some ranks' rows.
        const uint32_t num_rows = W <= 4 ? counts[dice() % 7] : W + dice() % (W + 2);
        const bool any_bits = round % 3 == 2;
        std::vector<Tensors> fresh(W);
        for (Tensors& tensors : fresh) {
            for (std::vector<char>* tensor :
                 {&tensors.input, &tensors.residual, &tensors.weight, &tensors.output, &tensors.sum}) {
                tensor->assign(kLargest + kBehind, kCanary);
            }
            tensors.values.assign(kLargest / 2 + kBehind, kCanary);
            tensors.scales.assign(4096, kStaticScale);
            fill_tensor<T>(tensors.input, dice, any_bits);
        }
        fill_tensor<T>(fresh[0].residual, dice, any_bits);
        fill_tensor<T>(fresh[0].weight, dice, false);
        for (Tensors& tensors : fresh) {
            tensors.residual = fresh[0].residual;
            tensors.weight = fresh[0].weight;
        }
        std::vector<float> norms;
        for (const Launch& launch : launches) {
            if (launch.two_shots && num_rows < W) continue;
            const bool in_place = dice() % 2 == 0;
            // Its sums over the ranks are rounded before the residual comes: other bits.
            std::vector<float> apart;
            for (int rank = 0; rank < W; ++rank) ranks[rank].tensors = fresh[rank];
            if (dice() % 2 == 0) {
                plain<T, W>(ranks, num_rows, row_vecs, false, dice() % 2 == 0);
                if (!summed<T>(ranks, num_rows * row_vecs * 4 * T::count)) {
                    std::printf("a plain sum before %s is wrong\n", launch.name.c_str());
                    return 1;
                }
                for (int rank = 0; rank < W; ++rank) ranks[rank].tensors = fresh[rank];
            }
            const auto form = static_cast<QuantForm>(dice() % (row_vecs % 16 == 0 ? 3 : 2));
            const Quantised how{form, dice() % 2 == 0, dice() % 2 == 0};
            const uint32_t summed_rows = launch.padded ? pad(W, num_rows, dice) : num_rows;
            run<T, W>(ranks, num_rows, row_vecs, in_place, launch, W, how);
            for (int rank = 0; rank < W; ++rank) {
                std::string wrong = judge<T, W>(ranks[rank].tensors,
                                                fresh,
                                                rank,
                                                summed_rows,
                                                row_vecs,
                                                in_place,
                                                launch.separate,
                                                !launch.quantizes || how.wants_norm,
                                                launch.separate ? apart : norms);
                if (launch.quantizes && wrong.empty()) {
                    wrong = judge_quantised<T>(ranks[rank].tensors, norms, summed_rows, num_rows, row_vecs, how);
                }
                if (!wrong.empty() || error_word != 0) {
                    std::printf("%s, %u rows of %u vectors, rank %d of %d%s: %s\n",
                                launch.name.c_str(),
                                num_rows,
                                row_vecs,
                                rank,
                                W,
                                in_place ? ", in place" : "",
                                error_word != 0 ? "gave up" : wrong.c_str());
                    return 1;
                }
            }
            ++done;
        }
    }
    if (!gives_up<T, W>(ranks, launches)) return 1;
    error_word = 0;
    comm_core::SpinGuard::most_polls = comm_core::SpinGuard::kMinute;
    std::printf("%d launches of %d ranks, every row is right\n", done, W);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const int world_size = argc > 1 ? std::atoi(argv[1]) : 2, rounds = argc > 2 ? std::atoi(argv[2]) : 1;
    if (world_size == 2)
        return check<comm_core::BFloat16, 2>(rounds, 1) || check<comm_core::Float32, 2>(rounds, 2) ||
               check<comm_core::Float16, 2>(rounds, 3);
    if (world_size == 3) return check<comm_core::BFloat16, 3>(rounds, 6);
    if (world_size == 4) return check<comm_core::Float16, 4>(rounds, 7);
    if (world_size == 5) return check<comm_core::Float32, 5>(rounds, 4);
    if (world_size == 8) return check<comm_core::BFloat16, 8>(rounds, 5);
    return 2;
}
