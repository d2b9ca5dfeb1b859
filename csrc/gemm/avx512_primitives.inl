// 16 rows a vector: what block_kernel.inl is written in, but for the products of bytes.

using vf = __m512;
using vi = __m512i;
constexpr int kLanes = 16;
constexpr int kTall = 8;
constexpr int kWide = 4;

inline vf vzero() { return _mm512_setzero_ps(); }
inline vf vset(float x) { return _mm512_set1_ps(x); }
inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }

inline vi izero() { return _mm512_setzero_si512(); }
inline vi iset(std::int32_t x) { return _mm512_set1_epi32(x); }
inline vi iload(const std::byte* p) { return _mm512_loadu_si512(p); }
inline vi iand(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi isub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
template <int bits>
inline vi ishift_right(vi a) {
    return _mm512_srli_epi32(a, bits);
}
template <int bits>
inline vi ishift_left(vi a) {
    return _mm512_slli_epi32(a, bits);
}
inline vf vfrom_int(vi a) { return _mm512_cvtepi32_ps(a); }
inline vf vfrom_bits(vi a) { return _mm512_castsi512_ps(a); }
inline vi iwiden_16(const std::byte* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vi iwiden_8(const std::byte* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepu16_epi32(_mm256_cvtepu8_epi16(bytes));
}
