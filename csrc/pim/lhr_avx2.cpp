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
inline Real add(Real a, Real b) noexcept { return _mm256_add_ps(a, b); }
inline Real subtract(Real a, Real b) noexcept { return _mm256_sub_ps(a, b); }
inline Real multiply(Real a, Real b) noexcept { return _mm256_mul_ps(a, b); }
inline Real min(Real a, Real b) noexcept { return _mm256_min_ps(a, b); }
inline Real max(Real a, Real b) noexcept { return _mm256_max_ps(a, b); }
inline Real floor(Real x) noexcept { return _mm256_floor_ps(x); }
inline Real absolute(Real x) noexcept { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x); }
inline Code floor_code(Real x) noexcept { return _mm256_cvttps_epi32(_mm256_floor_ps(x)); }
inline Real to_real(Code code) noexcept { return _mm256_cvtepi32_ps(code); }
inline bool uncommon(Real a, Real limit, Real x, Real y) noexcept {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a, limit, _CMP_NLT_UQ),
                                           _mm256_cmp_ps(x, y, _CMP_NEQ_UQ))) != 0;
}

using Bytes = __m256i;
// Packing works within halves: the four lanes of one source that end up in each half are put
// together again.
inline Bytes to_bytes(const Real (&x)[4]) noexcept {
    const Code first = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
    const Code second = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2]), _mm256_cvtps_epi32(x[3]));
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline Real from_bytes(Bytes strip, int u) noexcept {
    const __m128i half = u < 2 ? _mm256_castsi256_si128(strip) : _mm256_extracti128_si256(strip, 1);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(u % 2 == 0 ? half : _mm_srli_si128(half, 8)));
}
inline Bytes load_bytes(const std::int8_t* p) noexcept {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
inline void stream_bytes(std::int8_t* p, Bytes strip) noexcept {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), strip);
}

template <int kNibbles>
struct Ones {
    explicit Ones(const Problem& p) noexcept
        : mask(_mm256_set1_epi32(p.mask)),
          nibbles(_mm256_set1_epi8(15)),
          table(_mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4)) {}

    Real of(Code code) const noexcept {
        code = _mm256_and_si256(code, mask);
        const Code low = _mm256_and_si256(code, nibbles);
        const Code high = _mm256_and_si256(_mm256_srli_epi32(code, 4), nibbles);
        Code ones =
            _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
        if constexpr (kNibbles > 2) {
            ones = _mm256_and_si256(_mm256_add_epi8(ones, _mm256_srli_epi32(ones, 8)),
                                    _mm256_set1_epi32(255));
        }
        return _mm256_cvtepi32_ps(ones);
    }
    Real at(Code code, Real& step) const noexcept {
        const Real ones = of(code);
        step = _mm256_sub_ps(of(_mm256_add_epi32(code, _mm256_set1_epi32(1))), ones);
        return ones;
    }
    Code mask, nibbles, table;
};

#include "pim/lhr_kernel.inl"

}  // namespace

const Kernels kKernels{&sum, &gradient, &sum_and_slopes, &expand};

}  // namespace quernstone::pim::lhr::avx2
