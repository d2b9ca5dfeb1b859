#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "pim/kernel.h"

namespace quernstone::pim::avx512_bf16_vnni {
namespace {

#include "pim/avx512_primitives.inl"

inline reg dot(reg sum, reg bytes, reg digits) { return _mm512_dpbusd_epi32(sum, bytes, digits); }

#include "pim/avx512_few.inl"

constexpr std::int64_t kQuad = 4;  // rows of a 32-bit lane
constexpr int kCycles = 6;         // that one load of digits serves

inline __m512i digits_at(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
inline __m512i four_bits(const std::uint8_t* p) {
    return _mm512_set1_epi32(*reinterpret_cast<const int*>(p));
}

// Bits of `cycles` cycles, a byte each, times the quads: named sums, which gcc keeps in registers.
void product(const std::uint8_t* bits, std::int64_t rows, const std::uint8_t* quads,
             std::int32_t* out, std::int64_t stride) {
#define QS_EACH(use) use(0) use(1) use(2) use(3) use(4) use(5)
#define QS_ZERO(c) __m512i a##c = _mm512_setzero_si512(), b##c = a##c, e##c = a##c, f##c = a##c;
#define QS_ADD(c)                                           \
    {                                                       \
        const __m512i x = four_bits(bits + (c) * rows + i); \
        a##c = _mm512_dpbusd_epi32(a##c, x, d0);            \
        b##c = _mm512_dpbusd_epi32(b##c, x, d1);            \
        e##c = _mm512_dpbusd_epi32(e##c, x, d2);            \
        f##c = _mm512_dpbusd_epi32(f##c, x, d3);            \
    }
#define QS_STORE(c)                                     \
    _mm512_storeu_si512(out + (c) * stride, a##c);      \
    _mm512_storeu_si512(out + (c) * stride + 16, b##c); \
    _mm512_storeu_si512(out + (c) * stride + 32, e##c); \
    _mm512_storeu_si512(out + (c) * stride + 48, f##c);
    QS_EACH(QS_ZERO)
    for (std::int64_t i = 0; i < rows; i += kQuad) {
        const std::uint8_t* at = quads + i * kBlock;
        const __m512i d0 = digits_at(at);
        const __m512i d1 = digits_at(at + 64);
        const __m512i d2 = digits_at(at + 128);
        const __m512i d3 = digits_at(at + 192);
        QS_EACH(QS_ADD)
    }
    QS_EACH(QS_STORE)
#undef QS_EACH
#undef QS_ZERO
#undef QS_ADD
#undef QS_STORE
}

#include "pim/few_kernel.inl"

}  // namespace

void few_columns(const CountArgs& args) { few(args); }

void dot(const CountArgs& args) {
    const Patterns& p = args.patterns;
    const std::int64_t cycles = p.vectors * args.order.cycles();
    const std::int64_t bytes = p.planes * p.padded_rows;
    auto* bits = reinterpret_cast<std::uint8_t*>(args.scratch);
    auto* sums = reinterpret_cast<std::int32_t*>(bits + kCycles * p.padded_rows);
    const __m512i one = _mm512_set1_epi8(1);
    for (std::int64_t t0 = 0; t0 < cycles; t0 += kCycles) {
        for (std::int64_t t = t0; t < t0 + kCycles; ++t) {
            std::uint8_t* to = bits + (t - t0) * p.padded_rows;
            const int bit =
                t < cycles ? args.order.bit(static_cast<int>(t % args.order.cycles())) : -1;
            if (bit < 0) {
                std::fill_n(to, p.padded_rows, std::uint8_t{0});
                continue;
            }
            const std::uint8_t* plane =
                p.data + t / args.order.cycles() * bytes + bit / 8 * p.padded_rows;
            const __m128i shift = _mm_cvtsi32_si128(bit % 8);
            for (std::int64_t i = 0; i < p.padded_rows; i += 64) {
                const __m512i x = _mm512_loadu_si512(plane + i);
                _mm512_storeu_si512(to + i, _mm512_and_si512(_mm512_srl_epi16(x, shift), one));
            }
        }
        product(bits, p.padded_rows, args.block.quads, sums, kBlock);
        const std::int64_t end = std::min<std::int64_t>(kCycles, cycles - t0);
        for (std::int64_t t = 0; t < end; ++t) {
            std::copy_n(sums + t * kBlock, args.block.digits,
                        args.out + (t0 + t) * args.out_stride);
        }
    }
}

}  // namespace quernstone::pim::avx512_bf16_vnni
