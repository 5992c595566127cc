// A fused call's tensors, and why their rows are wrong.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulated_ranks.h"
#include "norm.cuh"

namespace emulated {

constexpr float kEps = 0.25f, kOffset = 0.5f, kStaticScale = 0.013f;

// How a launch that quantises does so.
struct Quantised {
    QuantForm form;
    bool wants_norm, column_major;
};

// A rank's tensors, each with what lies behind it.
struct Tensors {
    std::vector<char> input, residual, weight, output, sum, values;
    std::vector<float> scales;
};

// The strides of a call's scales, in elements.
inline std::pair<int64_t, int64_t> strides_of(const Quantised& how, uint32_t num_rows, uint32_t row_vecs) {
    if (how.form == QuantForm::kPerToken) return {1, 1};
    return how.column_major ? std::pair<int64_t, int64_t>{1, num_rows + 3}
                            : std::pair<int64_t, int64_t>{row_vecs / 16, 1};
}

inline bool untouched(const std::vector<char>& tensor, const std::vector<char>& before, size_t from) {
    return std::equal(tensor.begin() + from, tensor.end(), before.begin() + from);
}

// The nearest float8_e4m3fn, ties to the even one; saturated. From the definition of the format.
inline uint8_t to_fp8(float value) {
    if (value != value) return 0x7f;
    const double magnitude = std::min(std::abs(static_cast<double>(value)), 448.0);
    int best = 0;
    double nearest = 1e9;
    for (int code = 0; code < 127; ++code) {
        const double number = code < 8 ? code * 0x1p-9 : (8 + code % 8) * std::ldexp(1.0, code / 8 - 10);
        const double distance = std::abs(number - magnitude);
        if (distance < nearest || (distance == nearest && code % 2 == 0)) {
            nearest = distance;
            best = code;
        }
    }
    return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

// Why a rank's quantised rows are wrong; "" where they aren't. `norms`: what was to be quantised.
template <typename T>
std::string judge_quantised(const Tensors& now,
                            const std::vector<float>& norms,
                            uint32_t num_rows,
                            uint32_t all_rows,
                            uint32_t row_vecs,
                            const Quantised& how) {
    const size_t hidden = row_vecs * 4 * T::count;
    const auto [row_stride, column_stride] = strides_of(how, all_rows, row_vecs);
    const size_t together = how.form == QuantForm::kPerGroup ? 128 : hidden;
    std::vector<bool> written(now.scales.size());
    for (size_t row = 0; row < num_rows; ++row) {
        for (size_t from = 0; from < hidden; from += together) {
            float largest = 0.0f;
            for (size_t column = from; column < from + together; ++column) {
                const float number = std::abs(norms[row * hidden + column]);
                if (number > largest) largest = number;
            }
            const size_t place = row * row_stride + from / 128 * column_stride;
            float scale = kStaticScale;
            if (how.form != QuantForm::kStatic) {
                scale = how.form == QuantForm::kPerToken ? std::max(largest / 448.0f, 1.0f / (448.0f * 512.0f))
                                                         : std::max(largest, 1e-10f) / 448.0f;
                written[place] = true;
                if (now.scales[place] != scale) return "scale of row " + std::to_string(row);
            }
            for (size_t column = from; column < from + together; ++column) {
                const float norm = norms[row * hidden + column];
                const float scaled = how.form == QuantForm::kStatic ? norm * (1.0f / scale) : norm / scale;
                const auto value = static_cast<uint8_t>(now.values[row * hidden + column]);
                if (scaled != scaled ? (value & 0x7f) != 0x7f : value != to_fp8(scaled)) {
                    return "value " + std::to_string(row * hidden + column) + ": " + std::to_string(value) +
                           " instead of " + std::to_string(to_fp8(scaled));
                }
            }
        }
    }
    for (size_t place = 0; place < now.scales.size(); ++place) {
        if (!written[place] && now.scales[place] != kStaticScale) return "another scale was written";
    }
    for (size_t place = num_rows * hidden; place < now.values.size(); ++place) {
        if (now.values[place] != kCanary) return "written beyond the values";
    }
    return "";
}

// Why a rank's results are wrong; "" where they aren't. `norms`: the bits that the first launch gave, kept by it.
template <typename T, int W>
std::string judge(const Tensors& now,
                  const std::vector<Tensors>& before,
                  int rank,
                  uint32_t num_rows,
                  uint32_t row_vecs,
                  bool in_place,
                  bool separate,
                  bool has_norm,
                  std::vector<float>& norms) {
    const std::vector<char>& output = in_place ? now.input : now.output;
    const std::vector<char>& sums = in_place ? now.residual : now.sum;
    const size_t hidden = row_vecs * 4 * T::count, nbytes = num_rows * row_vecs * 16;
    const Tensors& old = before[rank];
    if (!untouched(now.weight, old.weight, 0) || !untouched(now.input, old.input, in_place && has_norm ? nbytes : 0) ||
        !untouched(now.residual, old.residual, in_place ? nbytes : 0) ||
        !untouched(now.output, old.output, in_place || !has_norm ? 0 : nbytes) ||
        !untouched(now.sum, old.sum, in_place ? 0 : nbytes)) {
        return "written where nothing was to be written";
    }
    const bool first = norms.empty();
    for (size_t row = 0; row < num_rows; ++row) {
        double squares = 0.0;
        for (size_t index = row * hidden; index < (row + 1) * hidden; ++index) {
            float sum = fake::at<T>(before[0].input.data(), index);
            for (int q = 1; q < W; ++q) sum += fake::at<T>(before[q].input.data(), index);
            if (separate) sum = fake::rounded<T>(sum);
            const float expected = fake::rounded<T>(sum + fake::at<T>(before[0].residual.data(), index));
            if (!fake::same(expected, fake::at<T>(sums.data(), index))) {
                return "sum " + std::to_string(index) + ": " + std::to_string(fake::at<T>(sums.data(), index)) +
                       " instead of " + std::to_string(expected);
            }
            squares += static_cast<double>(expected) * expected;
        }
        const double scale = 1.0 / std::sqrt(squares / hidden + kEps);
        for (size_t column = 0; has_norm && column < hidden; ++column) {
            const size_t index = row * hidden + column;
            const float norm = fake::at<T>(output.data(), index);
            if (first) norms.push_back(norm);
            if (!fake::same(norms[index], norm)) return "norm " + std::to_string(index) + ": other bits than before";
            // Of what overflows fp32 there is nothing to be said but that all ranks have the same.
            if (!(squares < 1e30)) continue;
            const double expected =
                fake::at<T>(sums.data(), index) * scale * (fake::at<T>(old.weight.data(), column) + double{kOffset});
            // Half of the dtype's step for the rounding, and some steps of fp32's.
            const double step = T::count == 1 ? 0.0 : std::is_same_v<T, comm_core::BFloat16> ? 0x1p-8 : 0x1p-11;
            const double tiny = T::count == 1 ? 1e-6 : 1e-7;
            if (!(std::abs(norm - expected) <= std::abs(expected) * (step * 1.02 + 2e-6) + tiny)) {
                return "norm " + std::to_string(index) + ": " + std::to_string(norm) + " instead of " +
                       std::to_string(expected);
            }
        }
    }
    return "";
}

}  // namespace emulated
