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
inline Real add(Real a, Real b) noexcept { return _mm512_add_ps(a, b); }
inline Real subtract(Real a, Real b) noexcept { return _mm512_sub_ps(a, b); }
inline Real multiply(Real a, Real b) noexcept { return _mm512_mul_ps(a, b); }
inline Real min(Real a, Real b) noexcept { return _mm512_min_ps(a, b); }
inline Real max(Real a, Real b) noexcept { return _mm512_max_ps(a, b); }
inline Real floor(Real x) noexcept { return _mm512_roundscale_ps(x, 9); }
inline Real absolute(Real x) noexcept { return _mm512_abs_ps(x); }
inline Code floor_code(Real x) noexcept {
    return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
inline Real to_real(Code code) noexcept { return _mm512_cvtepi32_ps(code); }
inline bool uncommon(Real a, Real limit, Real x, Real y) noexcept {
    return (_mm512_cmp_ps_mask(a, limit, _CMP_NLT_UQ) | _mm512_cmp_ps_mask(x, y, _CMP_NEQ_UQ)) != 0;
}

using Bytes = __m512i;
inline Bytes to_bytes(const Real (&x)[4]) noexcept {
    const auto narrow = [](Real r) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(r)); };
    Bytes strip = _mm512_castsi128_si512(narrow(x[0]));
    strip = _mm512_inserti32x4(strip, narrow(x[1]), 1);
    strip = _mm512_inserti32x4(strip, narrow(x[2]), 2);
    return _mm512_inserti32x4(strip, narrow(x[3]), 3);
}
inline __m128i quarter(Bytes strip, int u) noexcept {
    switch (u) {
        case 0:
            return _mm512_castsi512_si128(strip);
        case 1:
            return _mm512_extracti32x4_epi32(strip, 1);
        case 2:
            return _mm512_extracti32x4_epi32(strip, 2);
        default:
            return _mm512_extracti32x4_epi32(strip, 3);
    }
}
inline Real from_bytes(Bytes strip, int u) noexcept {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter(strip, u)));
}
inline Bytes load_bytes(const std::int8_t* p) noexcept { return _mm512_load_si512(p); }
inline void stream_bytes(std::int8_t* p, Bytes strip) noexcept {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), strip);
}

// A permutation reads the lowest four bits of its index: a table of sixteen numbers, whatever the
// higher bits are.
template <int kNibbles>
struct Ones {
    explicit Ones(const Problem& p) noexcept
        : mask(_mm512_set1_epi32(p.mask)),
          table(_mm512_setr_ps(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4)) {}

    Real of(Code code) const noexcept {
        code = _mm512_and_si512(code, mask);
        const auto nibble = [&](Code from) { return _mm512_permutexvar_ps(from, table); };
        return _mm512_add_ps(
            _mm512_add_ps(nibble(code), nibble(_mm512_srli_epi32(code, 4))),
            _mm512_add_ps(nibble(_mm512_srli_epi32(code, 8)), nibble(_mm512_srli_epi32(code, 12))));
    }
    Real at(Code code, Real& step) const noexcept {
        const Real ones = of(code);
        step = _mm512_sub_ps(of(_mm512_add_epi32(code, _mm512_set1_epi32(1))), ones);
        return ones;
    }
    Code mask;
    Real table;
};

template <>
struct Ones<2> {
    explicit Ones(const Problem& p) noexcept
        : ones_low(_mm512_load_ps(p.ones_low.data())),
          ones_high(_mm512_load_ps(p.ones_high.data())),
          step_low(_mm512_load_ps(p.step_low.data())),
          step_high(_mm512_load_ps(p.step_high.data())),
          carries(_mm512_set1_ps(p.step_low[15])) {}

    Real of(Code code) const noexcept {
        return _mm512_add_ps(_mm512_permutexvar_ps(code, ones_low),
                             _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), ones_high));
    }
    Real at(Code code, Real& step) const noexcept {
        const Code high = _mm512_srli_epi32(code, 4);
        step = _mm512_permutexvar_ps(code, step_low);
        // Nothing but lower bits that are all set has this step.
        const __mmask16 carry = _mm512_cmp_ps_mask(step, carries, _CMP_EQ_OQ);
        step = _mm512_add_ps(step, _mm512_maskz_permutexvar_ps(carry, high, step_high));
        return _mm512_add_ps(_mm512_permutexvar_ps(code, ones_low),
                             _mm512_permutexvar_ps(high, ones_high));
    }
    Real ones_low, ones_high, step_low, step_high, carries;
};

#include "pim/lhr_kernel.inl"

}  // namespace

const Kernels kKernels{&sum, &gradient, &sum_and_slopes, &expand};

}  // namespace quernstone::pim::lhr::avx512
