#include <immintrin.h>

#include <cstring>

#include "attention/block.h"

// Both matrix products by VDPBF16PS: a lane holds two neighbours along the
// summed axis. Keys lie like that in memory; values are interleaved two keys
// at a time, probabilities are rounded to bf16 in pairs. Sums stay fp32.
namespace quernstone::attention::avx512_bf16_vnni {
namespace {

#include "attention/avx512_primitives.inl"
#include "attention/block_kernel.inl"

inline __m512bh as_bf16(vi x) { return reinterpret_cast<__m512bh>(x); }

inline vi broadcast_pair(const std::uint16_t* p) {
    std::int32_t pair = 0;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}

// acc[r] += sum over pairs of a[r][pair] b[pair]; a at r * a_row + pair * a_pair,
// b at pair * b_pair
template <int R, int NV>
inline void dot_pairs(vf (&acc)[R][NV], const std::uint16_t* a, std::int64_t a_row,
                      std::int64_t a_pair, const std::int32_t* b, std::int64_t b_pair,
                      std::int64_t pairs) {
    for (std::int64_t i = 0; i < pairs; ++i, a += a_pair, b += b_pair) {
        vi right[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) {
            right[n] = vload(b + n * kWidth);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vi left = broadcast_pair(a + r * a_row);
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) {
                acc[r][n] = _mm512_dpbf16_ps(acc[r][n], as_bf16(left), as_bf16(right[n]));
            }
        }
    }
}

inline void copy_channels(const std::uint16_t* from, std::int64_t col, std::int64_t d,
                          std::uint16_t* to) {
    if (col == 1) {
        std::memcpy(to, from, static_cast<std::size_t>(d) * sizeof *to);
        return;
    }
    for (std::int64_t i = 0; i < d; ++i) {
        to[i] = from[i * col];
    }
}

// to[i] = {first[i], second[i]}, a null pointer being zeros
inline void interleave(const std::uint16_t* first, const std::uint16_t* second, std::int64_t col,
                       std::int64_t d, std::uint16_t* to) {
    std::int64_t i = 0;
    if (col == 1 && first != nullptr && second != nullptr) {
        for (; i + kWidth <= d; i += kWidth) {
            const vi low = _mm512_cvtepu16_epi32(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + i)));
            const vi high = _mm512_cvtepu16_epi32(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + i)));
            _mm512_storeu_si512(to + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
    for (; i < d; ++i) {
        to[2 * i] = first != nullptr ? first[i * col] : std::uint16_t{0};
        to[2 * i + 1] = second != nullptr ? second[i * col] : std::uint16_t{0};
    }
}

struct Bf16Dot {
    struct Keys {
        const std::uint16_t* k;   // [key][even d], a zero behind an odd width
        const std::uint16_t* v;   // [key pair][d][2], a zero key behind an odd count
        std::uint16_t* spare;     // as large as v
        std::int32_t* rounded;    // [key pair][lane] probabilities, for values()
        std::int64_t begin, end;  // keys
    };

    static constexpr std::int64_t even(std::int64_t n) { return (n + 1) & ~std::int64_t{1}; }

    static std::int64_t copy_floats(std::int64_t d) {
        const std::int64_t probabilities = (kMaxBlockKeys / 2 + 1) * kWideVectors * kWidth;
        return kMaxBlockKeys * even(d) / 2 + 2 * (kMaxBlockKeys * d / 2) + probabilities;
    }

    template <class T>
    static Keys load_keys(const Block& block, std::int64_t begin, std::int64_t end, float* copies) {
        const std::int64_t d = block.width;
        const std::int64_t n = end - begin;
        auto* rounded = reinterpret_cast<std::int32_t*>(copies);
        auto* k = reinterpret_cast<std::uint16_t*>(rounded +
                                                   (kMaxBlockKeys / 2 + 1) * kWideVectors * kWidth);
        std::uint16_t* v = k + kMaxBlockKeys * even(d);
        const auto* from_k = static_cast<const std::uint16_t*>(block.k) + begin * block.k_row;
        const auto* from_v = static_cast<const std::uint16_t*>(block.v) + begin * block.v_row;
        for (std::int64_t j = 0; j < n; ++j) {
            std::uint16_t* to = k + j * even(d);
            to[even(d) - 1] = 0;
            copy_channels(from_k + j * block.k_row, block.k_col, d, to);
        }
        for (std::int64_t j = 0; j < n; j += 2) {
            const std::uint16_t* second = j + 1 < n ? from_v + (j + 1) * block.v_row : nullptr;
            interleave(from_v + j * block.v_row, second, block.v_col, d, v + j * d);
        }
        return {k, v, v + kMaxBlockKeys * d, rounded, begin, end};
    }

    template <class T, int NV>
    static void load_queries(const Block& block, const Row* rows, int n, float* q) {
        constexpr int kLanes = NV * kWidth;
        auto* pairs = reinterpret_cast<std::uint16_t*>(q);  // [d / 2][lane][2]
        for (int lane = 0; lane < kLanes; ++lane) {
            const auto* from = static_cast<const std::uint16_t*>(rows[lane < n ? lane : 0].q);
            for (std::int64_t i = 0; i < even(block.width); ++i) {
                const bool present = lane < n && i < block.width;
                pairs[(i / 2 * kLanes + lane) * 2 + i % 2] =
                    present ? from[i * block.q_col] : std::uint16_t{0};
            }
        }
    }

    static float value(const Keys& keys, std::int64_t j, std::int64_t d, std::int64_t i) {
        const std::int64_t r = j - keys.begin;
        return Stored<std::uint16_t>::get(keys.v[((r & ~std::int64_t{1}) * d) + i * 2 + r % 2]);
    }

    // The same keys with zeros for values that are no numbers.
    static Keys cleaned(const Keys& keys, std::int64_t d) {
        for (std::int64_t i = 0; i < even(keys.end - keys.begin) * d; ++i) {
            const bool number = finite(Stored<std::uint16_t>::get(keys.v[i]));
            keys.spare[i] = number ? keys.v[i] : std::uint16_t{0};
        }
        Keys clean = keys;
        clean.v = keys.spare;
        return clean;
    }

    static bool values_finite(const Keys& keys, std::int64_t j, std::int64_t d) {
        bool all = true;
        for (std::int64_t i = 0; i < d; ++i) {
            all = all && finite(value(keys, j, d, i));
        }
        return all;
    }

    static vf poison(const Keys& keys, std::int64_t j, std::int64_t d) {
        return vset(values_finite(keys, j, d) ? 0.0F : __builtin_nanf(""));
    }

    // A pair that reaches over [from, to) multiplies a key outside by 0.
    static bool ends_clean(const Keys& keys, std::int64_t from, std::int64_t to, std::int64_t d) {
        const bool low = (from - keys.begin) % 2 == 0 || values_finite(keys, from - 1, d);
        const bool high =
            (to - keys.begin) % 2 == 0 || to == keys.end || values_finite(keys, to, d);
        return low && high;
    }

    template <int NV>
    static void logits(const Keys& keys, std::int64_t from, std::int64_t to, std::int64_t d,
                       float scale, const float* q, float* s, vf* top) {
        const std::uint16_t* k = keys.k + (from - keys.begin) * even(d);
        for (std::int64_t left = to - from; left > 0;) {
            const std::int64_t n = tile_height<kTileRows<NV>>(left);
            with_height<kTileRows<NV>>(n, [&]<int R>() {
                logit_tile<R, NV>(k, d, scale, reinterpret_cast<const std::int32_t*>(q), s, top);
            });
            k += n * even(d);
            s += n * NV * kWidth;
            left -= n;
        }
    }

    template <int NV>
    static void values(const Keys& keys, std::int64_t from, std::int64_t to, std::int64_t d,
                       const float* p, float* o, const vf* alpha) {
        const std::int64_t first = (from - keys.begin) & ~std::int64_t{1};
        const std::int64_t pairs = (even(to - keys.begin) - first) / 2;
        for (std::int64_t i = 0; i < pairs; ++i) {
            const std::int64_t j = keys.begin + first + 2 * i;
            for (int n = 0; n < NV; ++n) {
                const float* at = p + (j - from) * NV * kWidth + n * kWidth;
                const vf even_key = j >= from ? vload(at) : vset(0.0F);
                const vf odd_key = j + 1 < to ? vload(at + NV * kWidth) : vset(0.0F);
                _mm512_storeu_si512(keys.rounded + (i * NV + n) * kWidth,
                                    round_pair(even_key, odd_key));
            }
        }
        const std::uint16_t* v = keys.v + first * d;
        for (std::int64_t left = d; left > 0;) {
            const std::int64_t n = tile_height<kTileRows<NV>>(left);
            with_height<kTileRows<NV>>(
                n, [&]<int R>() { value_tile<R, NV>(v, 2 * d, pairs, keys.rounded, o, alpha); });
            v += 2 * n;
            o += n * NV * kWidth;
            left -= n;
        }
    }

   private:
    // Two rows of probabilities as bf16, lane by lane side by side.
    static vi round_pair(vf even_key, vf odd_key) {
        const vi low =
            _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even_key)));
        const vi high =
            _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd_key)));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }

    template <int R, int NV>
    static void logit_tile(const std::uint16_t* k, std::int64_t d, float scale,
                           const std::int32_t* q, float* s, vf* top) {
        vf acc[R][NV] = {};
        dot_pairs(acc, k, even(d), 2, q, NV * kWidth, even(d) / 2);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) {
                const vf x = vmul(vset(scale), acc[r][n]);
                vstore(s + (r * NV + n) * kWidth, x);
                top[n] = vmax(top[n], x);
            }
        }
    }

    template <int R, int NV>
    static void value_tile(const std::uint16_t* v, std::int64_t v_pair, std::int64_t pairs,
                           const std::int32_t* p, float* o, const vf* alpha) {
        vf acc[R][NV] = {};
        dot_pairs(acc, v, 2, v_pair, p, NV * kWidth, pairs);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) {
                float* at = o + (r * NV + n) * kWidth;
                vstore(at, vfma(alpha[n], vload(at), acc[r][n]));
            }
        }
    }
};

#include "attention/gradient.inl"
#include "attention/gradient_bf16.inl"

}  // namespace

const Kernels kBf16 = make_kernels<Bf16Dot, std::uint16_t>();
const GradKernel kGradBf16 = make_grad_kernel<Bf16Gradient, std::uint16_t>();

}  // namespace quernstone::attention::avx512_bf16_vnni
