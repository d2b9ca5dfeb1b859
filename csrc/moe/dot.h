#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace quernstone::moe {

// The order of the sum is that of sixteen lanes, whatever the processor.
inline float dot(const float* a, const float* b, std::int64_t n) noexcept {
    constexpr std::int64_t kLanes = 16;
    std::array<float, kLanes> lanes{};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            lanes[static_cast<std::size_t>(lane)] += a[i + lane] * b[i + lane];
        }
    }
    float sum = 0.0F;
    for (; i < n; ++i) {
        sum += a[i] * b[i];
    }
    for (const float lane : lanes) {
        sum += lane;
    }
    return sum;
}

}  // namespace quernstone::moe
