#include <immintrin.h>

#include <cstring>

#include "attention/block.h"

namespace quernstone::attention::avx2 {
namespace {

using vf = __m256;
using vi = __m256i;
constexpr int kWidth = 8;        // floats a vector holds
constexpr int kWideVectors = 2;  // a wide panel: 16 rows, tiles of 6 x 16
constexpr int kWideRows = 6;
constexpr int kNarrowRows = 12;  // a narrow panel: 8 rows, tiles of 12 x 8

inline vf vset(float x) { return _mm256_set1_ps(x); }
inline vf vbroadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vi vload(const std::int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
// 1 / x, a last digit or two off; 0 for the largest x
inline vf vreciprocal(vf x) {
    const vf y = _mm256_rcp_ps(x);
    return _mm256_mul_ps(y, _mm256_fnmadd_ps(x, y, _mm256_set1_ps(2.0F)));
}
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }

// The number whose exponent field is the low mantissa bits of t, its mantissa 0
inline vf vpower(vf t) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
}

// lo <= j < hi ? x : other
inline vf vwhere_visible(vi lo, vi hi, std::int32_t j, vf x, vf other) {
    const vi key = _mm256_set1_epi32(j);
    const vi seen = _mm256_andnot_si256(_mm256_cmpgt_epi32(lo, key), _mm256_cmpgt_epi32(hi, key));
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(seen));
}

inline vf vzero_if_equal(vf x, float y) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, vset(y), _CMP_EQ_OQ), x);
}

// y > bound ? x : 0
inline vf vzero_unless_above(vf y, float bound, vf x) {
    return _mm256_and_ps(_mm256_cmp_ps(y, vset(bound), _CMP_GT_OQ), x);
}

inline bool vall_finite(vf x) {
    const vf difference = _mm256_sub_ps(x, x);  // NaN for NaN and infinities
    return _mm256_movemask_ps(_mm256_cmp_ps(difference, difference, _CMP_UNORD_Q)) == 0;
}

// Rows become columns.
inline void vtranspose(vf (&r)[kWidth]) {
    vf a[kWidth];
    vf b[kWidth];
    for (int i = 0; i < kWidth; i += 2) {
        a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < kWidth; i += 4) {
        for (int c = 0; c < 2; ++c) {
            b[i + 2 * c] = _mm256_shuffle_ps(a[i + c], a[i + c + 2], 0x44);
            b[i + 2 * c + 1] = _mm256_shuffle_ps(a[i + c], a[i + c + 2], 0xee);
        }
    }
    for (int c = 0; c < 4; ++c) {
        r[c] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
        r[c + 4] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
    }
}

inline vf vload_bf16(const std::uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Round to nearest, ties to even; NaN stays NaN.
inline void vstore_bf16(std::uint16_t* p, vf x) {
    const vi bits = _mm256_castps_si256(x);
    const vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const vi rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const vi nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const vi quiet = _mm256_set1_epi32(0x7fc00000);
    const vi word = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const vi packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(word, word), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#include "attention/block_kernel.inl"
#include "attention/fp32_dot.inl"
#include "attention/gradient.inl"
#include "attention/gradient_fp32.inl"

}  // namespace

const Kernels kF32 = make_kernels<Fp32Dot<float>, float>();
const Kernels kBf16 = make_kernels<Fp32Dot<std::uint16_t>, std::uint16_t>();
const GradKernel kGradF32 = make_grad_kernel<Fp32Gradient<float>, float>();
const GradKernel kGradBf16 = make_grad_kernel<Fp32Gradient<std::uint16_t>, std::uint16_t>();

}  // namespace quernstone::attention::avx2
