// The vector type and its primitives at 512 bits, for both AVX-512 files.

using vf = __m512;
using vi = __m512i;
constexpr int kWidth = 16;
constexpr int kWideVectors = 2;  // a wide panel: 32 rows, tiles of 12 x 32
constexpr int kWideRows = 12;
constexpr int kNarrowRows = 12;  // a narrow panel: 16 rows, tiles of 12 x 16

inline vf vset(float x) { return _mm512_set1_ps(x); }
inline vf vbroadcast(const float* p) { return _mm512_set1_ps(*p); }
inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vi vload(const std::int32_t* p) { return _mm512_loadu_si512(p); }
inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf vreciprocal(vf x) { return _mm512_div_ps(_mm512_set1_ps(1.0F), x); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }

// The number whose exponent field is the low mantissa bits of t, its mantissa 0
inline vf vpower(vf t) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23));
}

// lo <= j < hi ? x : other
inline vf vwhere_visible(vi lo, vi hi, std::int32_t j, vf x, vf other) {
    const vi key = _mm512_set1_epi32(j);
    const auto seen = static_cast<__mmask16>(_mm512_cmpgt_epi32_mask(hi, key) &
                                             ~_mm512_cmpgt_epi32_mask(lo, key));
    return _mm512_mask_blend_ps(seen, other, x);
}

inline vf vzero_if_equal(vf x, float y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, vset(y), _CMP_NEQ_UQ), x);
}

// y > bound ? x : 0
inline vf vzero_unless_above(vf y, float bound, vf x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, vset(bound), _CMP_GT_OQ), x);
}

inline bool vall_finite(vf x) {
    const vf difference = _mm512_sub_ps(x, x);  // NaN for NaN and infinities
    return _mm512_cmp_ps_mask(difference, difference, _CMP_UNORD_Q) == 0;
}

// Rows become columns.
inline void vtranspose(vf (&r)[kWidth]) {
    vf a[kWidth];
    vf b[kWidth];
    for (int i = 0; i < kWidth; i += 2) {
        a[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < kWidth; i += 4) {
        for (int c = 0; c < 2; ++c) {
            b[i + 2 * c] = _mm512_shuffle_ps(a[i + c], a[i + c + 2], 0x44);
            b[i + 2 * c + 1] = _mm512_shuffle_ps(a[i + c], a[i + c + 2], 0xee);
        }
    }
    for (int c = 0; c < 4; ++c) {  // b[4 i + c]: quarter l is column 4 l + c of rows 4 i ...
        const vf even_01 = _mm512_shuffle_f32x4(b[c], b[c + 4], 0x88);
        const vf even_23 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0x88);
        const vf odd_01 = _mm512_shuffle_f32x4(b[c], b[c + 4], 0xdd);
        const vf odd_23 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0xdd);
        r[c] = _mm512_shuffle_f32x4(even_01, even_23, 0x88);
        r[c + 4] = _mm512_shuffle_f32x4(odd_01, odd_23, 0x88);
        r[c + 8] = _mm512_shuffle_f32x4(even_01, even_23, 0xdd);
        r[c + 12] = _mm512_shuffle_f32x4(odd_01, odd_23, 0xdd);
    }
}

inline vf vload_bf16(const std::uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Round to nearest, ties to even; NaN stays NaN.
inline void vstore_bf16(std::uint16_t* p, vf x) {
    const vi bits = _mm512_castps_si512(x);
    const vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const vi rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const vi word = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16)));
}
