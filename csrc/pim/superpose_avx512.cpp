#include <immintrin.h>

#include <algorithm>

#include "pim/superpose.h"
#include "pim/superpose_kernel.h"

namespace quernstone::pim::superpose_avx512 {
namespace {

using reg = __m512;
constexpr std::int64_t kRegFloats = 16;
inline reg load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, reg x) { _mm512_storeu_ps(p, x); }
inline reg zero() { return _mm512_setzero_ps(); }
inline reg multiply_add(reg x, float y, reg z) { return _mm512_fmadd_ps(x, _mm512_set1_ps(y), z); }
inline reg greater(reg a, reg b) { return _mm512_max_ps(a, b); }
inline std::uint32_t at_least(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

namespace level {
#include "pim/superpose_kernel.inl"
}  // namespace level

}  // namespace

void worst(const Screen& screen, const Cycles& cycles) { level::worst(screen, cycles); }

}  // namespace quernstone::pim::superpose_avx512
