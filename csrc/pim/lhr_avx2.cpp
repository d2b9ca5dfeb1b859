#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "pim/lhr_kernel.h"

namespace quernstone::pim::lhr::avx2 {
namespace {

using Real = __m256;
using Code = __m256i;
constexpr int kLanes = 8;

inline Real load(const float* p) noexcept { return _mm256_loadu_ps(p); }
inline void store(float* p, Real x) noexcept { _mm256_storeu_ps(p, x); }
inline void stream(float* p, Real x) noexcept { _mm256_stream_ps(p, x); }
inline void fence() noexcept { _mm_sfence(); }
inline Real set(float x) noexcept { return _mm256_set1_ps(x); }
inline Code set_code(std::int32_t x) noexcept { return _mm256_set1_epi32(x); }
inline Real add(Real a, Real b) noexcept { return _mm256_add_ps(a, b); }
inline Real subtract(Real a, Real b) noexcept { return _mm256_sub_ps(a, b); }
inline Real multiply(Real a, Real b) noexcept { return _mm256_mul_ps(a, b); }
inline Real min(Real a, Real b) noexcept { return _mm256_min_ps(a, b); }
inline Real max(Real a, Real b) noexcept { return _mm256_max_ps(a, b); }
inline Real floor(Real x) noexcept { return _mm256_floor_ps(x); }
inline Code both(Code a, Code b) noexcept { return _mm256_and_si256(a, b); }
inline Code to_code(Real x) noexcept { return _mm256_cvttps_epi32(x); }

template <int kNibbles>
inline Real hamming(Code code) noexcept {
    const Code table =
        _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const Code nibbles = _mm256_set1_epi8(15);
    const Code low = _mm256_and_si256(code, nibbles);
    const Code high = _mm256_and_si256(_mm256_srli_epi32(code, 4), nibbles);
    Code ones = _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
    if constexpr (kNibbles > 2) {
        ones = _mm256_and_si256(_mm256_add_epi8(ones, _mm256_srli_epi32(ones, 8)),
                                _mm256_set1_epi32(255));
    }
    return _mm256_cvtepi32_ps(ones);
}

#include "pim/lhr_kernel.inl"

}  // namespace

const Kernels kKernels{&sum, &gradient};

}  // namespace quernstone::pim::lhr::avx2
