// Activations between the products, at 256 bits for every level that has AVX2.

inline __m256i load_bits(const float* x) { return _mm256_castps_si256(_mm256_loadu_ps(x)); }

// The largest lane, of non-negative ones
inline std::int32_t largest(__m256i x) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(m);
}

inline std::int32_t sum_of_lanes(__m256i x) {
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(m);
}

// Bit patterns of magnitudes order as integers, NaN above infinity.
inline void quantize_group(const float* x, std::int8_t* codes, float* scale,
                           std::int32_t* eight_sums) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += 8) {
        top = _mm256_max_epi32(top, _mm256_and_si256(load_bits(x + i), magnitude));
    }
    const std::int32_t bits = largest(top);
    float most = 0.0F;
    std::memcpy(&most, &bits, sizeof most);
    const bool finite = bits < 0x7f800000;
    *scale = finite ? most * (1.0F / 127.0F) : std::numeric_limits<float>::quiet_NaN();
    // Below this the reciprocal would overflow; such a group is 0.
    const __m256 inverse = _mm256_set1_ps(finite && most > 1e-36F ? 127.0F / most : 0.0F);
    __m256i q[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 value = finite ? _mm256_loadu_ps(x + 8 * i) : _mm256_setzero_ps();
        q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
    }
    const __m256i sum =
        _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
    *eight_sums = 8 * sum_of_lanes(sum);
    // packs works on halves: 0 4 1 5 2 6 3 7 is the order that it leaves
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                        _mm256_permutevar8x32_epi32(bytes, order));
}

void quantize(const float* x, std::int64_t n, std::int64_t padded, std::int8_t* codes,
              float* scales, std::int32_t* sums) {
    const std::int64_t whole = n / kScaleGroup;
    for (std::int64_t g = 0; g < whole; ++g) {
        quantize_group(x + g * kScaleGroup, codes + g * kScaleGroup, scales + g, sums + g);
    }
    for (std::int64_t g = whole; g < padded / kScaleGroup; ++g) {
        float rest[kScaleGroup] = {};
        const std::int64_t left = n - g * kScaleGroup;
        if (left > 0) {
            std::memcpy(rest, x + g * kScaleGroup, static_cast<std::size_t>(left) * sizeof *x);
        }
        quantize_group(rest, codes + g * kScaleGroup, scales + g, sums + g);
    }
}

// e^x for x <= 0 within 2 ulp; 0 below -87; Cody and Waite's reduction, then a polynomial
inline __m256 exp_nonpositive(__m256 x) {
    const __m256 clamped = _mm256_max_ps(_mm256_set1_ps(-87.0F), x);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(clamped, _mm256_set1_ps(1.44269504F)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375F), clamped);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4F), r);
    __m256 p = _mm256_set1_ps(1.0F / 5040.0F);
    for (const float c :
         {1.0F / 720.0F, 1.0F / 120.0F, 1.0F / 24.0F, 1.0F / 6.0F, 0.5F, 1.0F, 1.0F}) {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    }
    const __m256i power =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

// With e = exp(-|g|): sigmoid(g) is 1 / (1 + e), or e / (1 + e) where g < 0. NaN stays NaN.
inline __m256 silu_times(__m256 g, __m256 up) {
    const __m256 sign = _mm256_set1_ps(-0.0F);
    const __m256 e = exp_nonpositive(_mm256_or_ps(g, sign));
    const __m256 top = _mm256_blendv_ps(_mm256_set1_ps(1.0F), e, g);
    const __m256 sigmoid = _mm256_div_ps(top, _mm256_add_ps(_mm256_set1_ps(1.0F), e));
    return _mm256_mul_ps(_mm256_mul_ps(g, sigmoid), up);
}

void silu_multiply(float* gate, const float* up, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(gate + i, silu_times(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
    }
    if (i < n) {
        float g[8] = {};
        float u[8] = {};
        const auto bytes = static_cast<std::size_t>(n - i) * sizeof *gate;
        std::memcpy(g, gate + i, bytes);
        std::memcpy(u, up + i, bytes);
        _mm256_storeu_ps(g, silu_times(_mm256_loadu_ps(g), _mm256_loadu_ps(u)));
        std::memcpy(gate + i, g, bytes);
    }
}
