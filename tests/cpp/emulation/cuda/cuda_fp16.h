#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
    std::uint16_t bits;
};

inline float __half2float(__half x) {
    const float sign = (x.bits & 0x8000U) != 0 ? -1.0F : 1.0F;
    const int exponent = x.bits >> 10 & 0x1f;
    const auto mantissa = static_cast<float>(x.bits & 0x3ffU);
    if (exponent == 0) {
        return sign * std::ldexp(mantissa, -24);
    }
    if (exponent == 0x1f) {
        return mantissa != 0.0F ? std::nanf("") : sign * INFINITY;
    }
    return sign * std::ldexp(1024.0F + mantissa, exponent - 25);
}

inline __half __float2half_rn(float x) {
    const std::uint32_t sign = std::bit_cast<std::uint32_t>(x) >> 16 & 0x8000U;
    const float size = std::fabs(x);
    std::uint32_t bits = 0x7e00U;
    if (size >= 65520.0F) {  // what rounds to 2^16 is infinite
        bits = 0x7c00U;
    } else if (size == size) {
        // The unit of the result: nearbyint rounds ties to even, and a carry is right.
        const int exponent = size < 0x1p-14F ? -14 : std::ilogb(size);
        const auto units =
            static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
        bits = static_cast<std::uint32_t>(exponent + 14) * 1024U + units;
    }
    return {static_cast<std::uint16_t>(sign | bits)};
}
