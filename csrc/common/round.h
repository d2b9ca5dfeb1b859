#pragma once

#include <cstdint>

namespace quernstone {

// Of a non-negative n and a positive step.
constexpr std::int64_t divide_up(std::int64_t n, std::int64_t step) noexcept {
    return (n + step - 1) / step;
}

constexpr std::int64_t round_up(std::int64_t n, std::int64_t step) noexcept {
    return divide_up(n, step) * step;
}

}  // namespace quernstone
