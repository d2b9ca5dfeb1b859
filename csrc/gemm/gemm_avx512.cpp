#include <immintrin.h>

#include <cstring>
#include <limits>
#include <type_traits>

#include "gemm/kernel.h"

namespace quernstone::gemm::avx512 {
namespace {

#include "gemm/avx2_tokens.inl"
#include "gemm/avx512_primitives.inl"

// A group of int4: sums of codes 0..15 times int8 in 16 bits, where eight steps fit.
inline vi dot4(vi sums, vi codes, vi x) {
    return _mm512_add_epi16(sums, _mm512_maddubs_epi16(codes, x));
}
inline vi finish4(vi sums) { return _mm512_madd_epi16(sums, _mm512_set1_epi16(1)); }

// A group of int8, codes biased by 128.
struct Signed {
    vi magnitude;
    __mmask64 negative;
};
inline Signed prepare8(vi biased) {
    const vi code = _mm512_xor_si512(biased, _mm512_set1_epi8(-128));
    return {_mm512_abs_epi8(code), _mm512_movepi8_mask(code)};
}
inline vi dot8(vi sums, const Signed& w, vi x) {
    const vi signed_x = _mm512_mask_sub_epi8(x, w.negative, izero(), x);
    const vi pairs = _mm512_maddubs_epi16(w.magnitude, signed_x);
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
inline vi finish8(vi sums, vi /*eight_times_x*/) { return sums; }

#include "gemm/block_kernel.inl"

}  // namespace

const Kernels kKernels{bf16_float, int8_float, int8_int8,    int4_float,
                       int4_int8,  quantize,   silu_multiply};

}  // namespace quernstone::gemm::avx512
