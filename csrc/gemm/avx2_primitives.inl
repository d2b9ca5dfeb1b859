// 8 rows a vector: what block_kernel.inl is written in.

using vf = __m256;
using vi = __m256i;
constexpr int kLanes = 8;
constexpr int kTall = 4;  // tokens of a tile one vector of rows wide
constexpr int kWide = 2;  // tokens of a tile that takes a whole block of rows

inline vf vzero() { return _mm256_setzero_ps(); }
inline vf vset(float x) { return _mm256_set1_ps(x); }
inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

inline vi izero() { return _mm256_setzero_si256(); }
inline vi iset(std::int32_t x) { return _mm256_set1_epi32(x); }
inline vi iload(const std::byte* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline vi iand(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi isub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
template <int bits>
inline vi ishift_right(vi a) {
    return _mm256_srli_epi32(a, bits);
}
template <int bits>
inline vi ishift_left(vi a) {
    return _mm256_slli_epi32(a, bits);
}
inline vf vfrom_int(vi a) { return _mm256_cvtepi32_ps(a); }
inline vf vfrom_bits(vi a) { return _mm256_castsi256_ps(a); }
inline vi iwiden_16(const std::byte* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vi iwiden_8(const std::byte* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// A group of int4: sums of codes 0..15 times int8 in 16 bits, where eight steps fit.
inline vi dot4(vi sums, vi codes, vi x) {
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x));
}
inline vi finish4(vi sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// A group of int8, codes biased by 128.
struct Signed {
    vi code, magnitude;
};
inline Signed prepare8(vi biased) {
    const vi code = _mm256_xor_si256(biased, _mm256_set1_epi8(-128));
    return {code, _mm256_abs_epi8(code)};
}
inline vi dot8(vi sums, const Signed& w, vi x) {
    const vi pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.code));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline vi finish8(vi sums, vi /*eight_times_x*/) { return sums; }
