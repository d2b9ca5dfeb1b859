using reg = __m512i;
constexpr int kRegBytes = 64;
constexpr int kParts = 1;
constexpr std::int64_t kFar = 1024;

inline reg load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(std::uint8_t* p, reg x) { _mm512_storeu_si512(p, x); }
inline reg zero() { return _mm512_setzero_si512(); }
inline reg add8(reg a, reg b) { return _mm512_add_epi8(a, b); }
inline reg twice8(reg x) { return _mm512_add_epi8(x, x); }
inline reg add16(reg a, reg b) { return _mm512_add_epi16(a, b); }
inline reg add64(reg a, reg b) { return _mm512_add_epi64(a, b); }
inline reg and_(reg a, reg b) { return _mm512_and_si512(a, b); }
inline reg or_(reg a, reg b) { return _mm512_or_si512(a, b); }
inline reg andnot(reg a, reg b) { return _mm512_andnot_si512(a, b); }
inline reg xor_(reg a, reg b) { return _mm512_xor_si512(a, b); }
inline reg shift_right(reg a, int n) { return _mm512_srl_epi16(a, _mm_cvtsi32_si128(n)); }
inline reg shift_left(reg a, int n) { return _mm512_sll_epi16(a, _mm_cvtsi32_si128(n)); }
// 255 where a byte is 0.
inline reg zero_bytes(reg a) { return _mm512_movm_epi8(_mm512_testn_epi8_mask(a, a)); }
inline reg high16(reg a) { return _mm512_srli_epi16(a, 8); }
inline reg set8(std::uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline reg set_word(std::uint8_t x) { return set8(x); }
inline reg set_word(std::uint16_t x) { return _mm512_set1_epi16(static_cast<short>(x)); }
template <class U>
inline reg add_word(reg a, reg b) {
    return sizeof(U) == 1 ? _mm512_add_epi8(a, b) : _mm512_add_epi16(a, b);
}
inline void prefetch(const std::byte* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}
inline reg popcount8(reg x) {
    const reg table =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const reg low = _mm512_set1_epi8(15);
    return _mm512_add_epi8(
        _mm512_shuffle_epi8(table, _mm512_and_si512(x, low)),
        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), low)));
}
inline reg sum_bytes(reg x) { return _mm512_sad_epu8(x, zero()); }
inline std::uint64_t sum64(reg x) { return static_cast<std::uint64_t>(_mm512_reduce_add_epi64(x)); }
inline bool any(reg x) { return _mm512_test_epi32_mask(x, x) != 0; }
inline std::uint64_t mask64(const std::uint8_t* p, int bit) {
    return _mm512_test_epi8_mask(load(p), set8(static_cast<std::uint8_t>(1U << bit)));
}
