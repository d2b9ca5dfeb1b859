#include <immintrin.h>

#include <algorithm>

#include "pim/superpose.h"
#include "pim/superpose_kernel.h"

namespace quernstone::pim::superpose_avx2 {
namespace {

using reg = __m256;
constexpr std::int64_t kRegFloats = 8;
inline reg load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, reg x) { _mm256_storeu_ps(p, x); }
inline reg zero() { return _mm256_setzero_ps(); }
inline reg multiply_add(reg x, float y, reg z) { return _mm256_fmadd_ps(x, _mm256_set1_ps(y), z); }
inline reg greater(reg a, reg b) { return _mm256_max_ps(a, b); }
inline std::uint32_t at_least(reg a, reg b) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}

namespace level {
#include "pim/superpose_kernel.inl"
}  // namespace level

}  // namespace

void worst(const Screen& screen, const Cycles& cycles) { level::worst(screen, cycles); }

}  // namespace quernstone::pim::superpose_avx2
