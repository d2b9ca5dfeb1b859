#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "pim/lhr_kernel.h"

namespace quernstone::pim::lhr::avx512 {
namespace {

using Real = __m512;
using Code = __m512i;
constexpr int kLanes = 16;

inline Real load(const float* p) noexcept { return _mm512_loadu_ps(p); }
inline void store(float* p, Real x) noexcept { _mm512_storeu_ps(p, x); }
inline void stream(float* p, Real x) noexcept { _mm512_stream_ps(p, x); }
inline void fence() noexcept { _mm_sfence(); }
inline Real set(float x) noexcept { return _mm512_set1_ps(x); }
inline Code set_code(std::int32_t x) noexcept { return _mm512_set1_epi32(x); }
inline Real add(Real a, Real b) noexcept { return _mm512_add_ps(a, b); }
inline Real subtract(Real a, Real b) noexcept { return _mm512_sub_ps(a, b); }
inline Real multiply(Real a, Real b) noexcept { return _mm512_mul_ps(a, b); }
inline Real min(Real a, Real b) noexcept { return _mm512_min_ps(a, b); }
inline Real max(Real a, Real b) noexcept { return _mm512_max_ps(a, b); }
inline Real floor(Real x) noexcept { return _mm512_roundscale_ps(x, 9); }
inline Code both(Code a, Code b) noexcept { return _mm512_and_si512(a, b); }
inline Code to_code(Real x) noexcept { return _mm512_cvttps_epi32(x); }

// A permutation reads the lowest four bits of its index: a table of sixteen numbers.
template <int kNibbles>
inline Real hamming(Code code) noexcept {
    const Real table = _mm512_setr_ps(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    Real ones = _mm512_add_ps(_mm512_permutexvar_ps(code, table),
                              _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), table));
    if constexpr (kNibbles > 2) {
        ones = _mm512_add_ps(
            ones, _mm512_add_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(code, 8), table),
                                _mm512_permutexvar_ps(_mm512_srli_epi32(code, 12), table)));
    }
    return ones;
}

#include "pim/lhr_kernel.inl"

}  // namespace

const Kernels kKernels{&sum, &gradient};

}  // namespace quernstone::pim::lhr::avx512
