using reg = __m256i;
constexpr int kRegBytes = 32;
constexpr int kParts = 2;
constexpr std::int64_t kFar = 1024;

inline reg load(const std::uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const reg*>(p));
}
inline void store(std::uint8_t* p, reg x) { _mm256_storeu_si256(reinterpret_cast<reg*>(p), x); }
inline reg zero() { return _mm256_setzero_si256(); }
inline reg add8(reg a, reg b) { return _mm256_add_epi8(a, b); }
inline reg twice8(reg x) { return _mm256_add_epi8(x, x); }
inline reg add16(reg a, reg b) { return _mm256_add_epi16(a, b); }
inline reg add64(reg a, reg b) { return _mm256_add_epi64(a, b); }
inline reg and_(reg a, reg b) { return _mm256_and_si256(a, b); }
inline reg or_(reg a, reg b) { return _mm256_or_si256(a, b); }
inline reg andnot(reg a, reg b) { return _mm256_andnot_si256(a, b); }
inline reg xor_(reg a, reg b) { return _mm256_xor_si256(a, b); }
inline reg shift_right(reg a, int n) { return _mm256_srl_epi16(a, _mm_cvtsi32_si128(n)); }
inline reg shift_left(reg a, int n) { return _mm256_sll_epi16(a, _mm_cvtsi32_si128(n)); }
// 255 where a byte is 0.
inline reg zero_bytes(reg a) { return _mm256_cmpeq_epi8(a, zero()); }
inline reg high16(reg a) { return _mm256_srli_epi16(a, 8); }
inline reg set8(std::uint8_t x) { return _mm256_set1_epi8(static_cast<char>(x)); }
inline reg set_word(std::uint8_t x) { return set8(x); }
inline reg set_word(std::uint16_t x) { return _mm256_set1_epi16(static_cast<short>(x)); }
template <class U>
inline reg add_word(reg a, reg b) {
    return sizeof(U) == 1 ? _mm256_add_epi8(a, b) : _mm256_add_epi16(a, b);
}
inline void prefetch(const std::byte* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}
inline reg popcount8(reg x) {
    const reg table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                       0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const reg low = _mm256_set1_epi8(15);
    return _mm256_add_epi8(
        _mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
}
inline reg sum_bytes(reg x) { return _mm256_sad_epu8(x, zero()); }
inline std::uint64_t sum64(reg x) {
    alignas(kRegBytes) std::uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<reg*>(lanes), x);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}
inline bool any(reg x) { return _mm256_testz_si256(x, x) == 0; }
inline std::uint64_t mask64(const std::uint8_t* p, int bit) {
    const __m128i count = _mm_cvtsi32_si128(7 - bit);
    const auto half = [&](const std::uint8_t* at) {
        return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(load(at), count)));
    };
    return half(p) | static_cast<std::uint64_t>(half(p + kRegBytes)) << 32U;
}
// 2 * 128 * 127 is below 2^15.
inline reg dot(reg sum, reg bytes, reg digits) {
    return _mm256_add_epi32(
        sum, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, digits), _mm256_set1_epi16(1)));
}
inline reg shift32(reg x) { return _mm256_slli_epi32(x, 6); }
inline reg add32(reg a, reg b) { return _mm256_add_epi32(a, b); }
inline __m256i four_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
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
