#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/view.h"

// Hamming weights of weights that are still real numbers: the regulariser that training lowers them
// with. README.md has the formulas.
namespace quernstone::pim::lhr {

inline constexpr int kMinBits = 2, kMaxBits = 16;

// Axes: n channels, k weights of a channel, g groups of a channel.
struct Layer {
    View<const float, 2> weight;  // [n, k], contiguous
    View<const float, 2> scales;  // [n or 1, g], contiguous, finite and positive
    std::int64_t group = 0;       // weights that share a scale, g = ceil(k / group)
    int bits = 8;                 // of the two's complement code
    int shift = 0;                // added to the code before it is stored
};

// The mean over the layer of the interpolated Hamming weight, in bits: 0 to `bits`. NaN where a
// weight is. Does not depend on the number of threads.
[[nodiscard]] Status mean_hamming_weight(const Layer& layer, double& mean, int threads) noexcept;

// grad (+)= factor * d mean / d weight, adding where `accumulate`. `grad` [n, k] is contiguous; large
// ones are written past the caches.
[[nodiscard]] Status mean_gradient(const Layer& layer, double factor, bool accumulate,
                                   View<float, 2> grad, int threads) noexcept;

// value = factor * mean^2 and grad (+)= d value / d weight: both of the above in one call.
[[nodiscard]] Status squared(const Layer& layer, double factor, bool accumulate,
                             View<float, 2> grad, double& value, int threads) noexcept;

}  // namespace quernstone::pim::lhr
