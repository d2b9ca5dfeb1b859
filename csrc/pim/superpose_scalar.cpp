#include <algorithm>

#include "pim/superpose.h"
#include "pim/superpose_kernel.h"

namespace quernstone::pim::superpose_scalar {
namespace {

// Four lanes, of which compilers make vectors where the processor has any.
struct reg {
    float lane[4];
};
constexpr std::int64_t kRegFloats = 4;
inline reg load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void store(float* p, const reg& x) { std::copy_n(x.lane, kRegFloats, p); }
inline reg zero() { return {}; }
inline reg multiply_add(const reg& x, float y, reg z) {
    for (int i = 0; i < kRegFloats; ++i) {
        z.lane[i] += x.lane[i] * y;
    }
    return z;
}
inline reg greater(reg a, const reg& b) {
    for (int i = 0; i < kRegFloats; ++i) {
        a.lane[i] = a.lane[i] < b.lane[i] ? b.lane[i] : a.lane[i];
    }
    return a;
}
inline std::uint32_t at_least(const reg& a, const reg& b) {
    std::uint32_t mask = 0;
    for (int i = 0; i < kRegFloats; ++i) {
        mask |= (a.lane[i] >= b.lane[i] ? 1U : 0U) << i;
    }
    return mask;
}

namespace level {
#include "pim/superpose_kernel.inl"
}  // namespace level

}  // namespace

void worst(const Screen& screen, const Cycles& cycles) { level::worst(screen, cycles); }

}  // namespace quernstone::pim::superpose_scalar
