// What few_kernel.inl needs beside avx512_primitives.inl and dot.

inline reg shift32(reg x) { return _mm512_slli_epi32(x, 6); }
inline reg add32(reg a, reg b) { return _mm512_add_epi32(a, b); }
inline __m256i halves(__m512i x) {
    return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
}
inline __m256i four_sums(reg a, reg b, reg c, reg d) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(halves(a), halves(b)),
                             _mm256_hadd_epi32(halves(c), halves(d)));
}
// Of the lanes of each, that of the k-th shifted right by k.
inline void eight_sums(reg a, reg b, reg c, reg d, reg e, reg f, reg g, reg h, std::int32_t* out) {
    const __m256i low = four_sums(a, b, c, d);
    const __m256i high = four_sums(e, f, g, h);
    const __m256i sums = _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                                          _mm256_permute2x128_si256(low, high, 0x31));
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm256_srlv_epi32(sums, places));
}
