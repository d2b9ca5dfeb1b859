#include "moe/router.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "moe/dot.h"

namespace quernstone::moe {
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
