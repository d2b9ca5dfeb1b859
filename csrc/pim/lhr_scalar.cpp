#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "pim/lhr_kernel.h"

namespace quernstone::pim::lhr::baseline {
namespace {

using Real = float;
using Code = std::int32_t;
constexpr int kLanes = 1;

inline Real load(const float* p) noexcept { return *p; }
inline void store(float* p, Real x) noexcept { *p = x; }
inline void stream(float* p, Real x) noexcept { *p = x; }
inline void fence() noexcept {}
inline Real set(float x) noexcept { return x; }
inline Real add(Real a, Real b) noexcept { return a + b; }
inline Real subtract(Real a, Real b) noexcept { return a - b; }
inline Real multiply(Real a, Real b) noexcept { return a * b; }
inline Real min(Real a, Real b) noexcept { return a < b ? a : b; }
inline Real max(Real a, Real b) noexcept { return a > b ? a : b; }
inline Real absolute(Real x) noexcept { return std::fabs(x); }
inline Real floor(Real x) noexcept { return std::floor(x); }
// A NaN has no code: any will do, its product with the NaN that it came from is NaN.
inline Code floor_code(Real x) noexcept {
    return std::isnan(x) ? 0 : static_cast<Code>(std::floor(x));
}
inline Real to_real(Code code) noexcept { return static_cast<Real>(code); }
inline bool uncommon(Real a, Real limit, Real x, Real y) noexcept { return !(a < limit) || x != y; }

struct Bytes {
    std::int8_t of[4];
};
inline Bytes to_bytes(const Real (&x)[4]) noexcept {
    Bytes made{};
    for (int u = 0; u < 4; ++u) {
        made.of[u] = std::isnan(x[u]) ? std::int8_t{0} : static_cast<std::int8_t>(x[u]);
    }
    return made;
}
inline Real from_bytes(const Bytes& strip, int u) noexcept {
    return static_cast<Real>(strip.of[u]);
}
inline Bytes load_bytes(const std::int8_t* p) noexcept {
    Bytes made;
    std::memcpy(&made, p, sizeof made);
    return made;
}
inline void stream_bytes(std::int8_t* p, const Bytes& strip) noexcept {
    std::memcpy(p, &strip, sizeof strip);
}

template <int kNibbles>
struct Ones {
    explicit Ones(const Problem& p) noexcept : mask(p.mask) {}
    Real of(Code code) const noexcept {
        return static_cast<Real>(std::popcount(static_cast<std::uint32_t>(code & mask)));
    }
    Real at(Code code, Real& step) const noexcept {
        const Real ones = of(code);
        step = of(code + 1) - ones;
        return ones;
    }
    Code mask;
};

#include "pim/lhr_kernel.inl"

}  // namespace

const Kernels kKernels{&sum, &gradient, &sum_and_slopes, &expand};

}  // namespace quernstone::pim::lhr::baseline
