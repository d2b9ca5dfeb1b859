#pragma once

#include <cstdint>
#include <span>

#include "common/view.h"

namespace quernstone::moe {

// The c experts of `count` that a linear router [e, m] would choose for each of x [t, m], into ids
// [t, c]: those that it has no row for, which are shared and always chosen, and then those of the
// largest products, the lower number first where two are equal. -1 where there are too few; NaN is
// the least of all. Rows of x and of the router are contiguous; scores [e] is memory to work in.
void choose(View<const float, 2> router, View<const float, 2> x, std::int64_t count,
            View<std::int64_t, 2> ids, std::span<float> scores) noexcept;

}  // namespace quernstone::moe
