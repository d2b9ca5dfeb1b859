#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

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
inline Code set_code(std::int32_t x) noexcept { return x; }
inline Real add(Real a, Real b) noexcept { return a + b; }
inline Real subtract(Real a, Real b) noexcept { return a - b; }
inline Real multiply(Real a, Real b) noexcept { return a * b; }
inline Real min(Real a, Real b) noexcept { return a < b ? a : b; }
inline Real max(Real a, Real b) noexcept { return a > b ? a : b; }
inline Real floor(Real x) noexcept { return std::floor(x); }
inline Code both(Code a, Code b) noexcept { return a & b; }
// A NaN has no code: any will do, its product with the NaN that it came from is NaN.
inline Code to_code(Real x) noexcept { return std::isnan(x) ? 0 : static_cast<Code>(x); }

template <int kNibbles>
inline Real hamming(Code code) noexcept {
    return static_cast<Real>(std::popcount(static_cast<std::uint32_t>(code)));
}

#include "pim/lhr_kernel.inl"

}  // namespace

const Kernels kKernels{&sum, &gradient};

}  // namespace quernstone::pim::lhr::baseline
