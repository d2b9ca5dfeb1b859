#include "moe/router.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace quernstone::moe {
namespace {

// In sixteen sums, so that the compiler need not keep one order.
float dot(const float* a, const float* b, std::int64_t n) noexcept {
    constexpr std::int64_t kLanes = 16;
    std::array<float, kLanes> sums{};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            sums[static_cast<std::size_t>(lane)] += a[i + lane] * b[i + lane];
        }
    }
    float sum = 0.0F;
    for (; i < n; ++i) {
        sum += a[i] * b[i];
    }
    for (const float one : sums) {
        sum += one;
    }
    return sum;
}

}  // namespace

void choose(View<const float, 2> router, View<const float, 2> x, std::int64_t count,
            View<std::int64_t, 2> ids, std::span<float> scores) noexcept {
    constexpr float kLeast = -std::numeric_limits<float>::infinity();
    const std::int64_t routed = router.extent[0], chosen = ids.extent[1];
    for (std::int64_t t = 0; t < x.extent[0]; ++t) {
        for (std::int64_t e = 0; e < routed; ++e) {
            const float found = dot(router.at(e, 0), x.at(t, 0), x.extent[1]);
            scores[static_cast<std::size_t>(e)] = std::isnan(found) ? kLeast : found;
        }
        std::int64_t c = 0;
        for (std::int64_t e = routed; e < count && c < chosen; ++e) {
            *ids.at(t, c++) = e;
        }
        // A few of some tens: the largest again and again, each left out from then on.
        for (; c < chosen; ++c) {
            const auto best = std::max_element(scores.begin(), scores.end(), [](float a, float b) {
                return std::isnan(b) ? false : std::isnan(a) || a < b;
            });
            const bool any = best != scores.end() && !std::isnan(*best);
            *ids.at(t, c) = any ? best - scores.begin() : -1;
            if (any) {
                *best = std::numeric_limits<float>::quiet_NaN();
            }
        }
    }
}

}  // namespace quernstone::moe
