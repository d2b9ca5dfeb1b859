#include <immintrin.h>

#include <cstring>
#include <limits>
#include <type_traits>

#include "gemm/kernel.h"

namespace quernstone::gemm::avx512_bf16_vnni {
namespace {

#include "gemm/avx2_tokens.inl"
#include "gemm/avx512_primitives.inl"

inline vi dot4(vi sums, vi codes, vi x) { return _mm512_dpbusd_epi32(sums, codes, x); }
inline vi finish4(vi sums) { return sums; }

// Codes are biased by 128, so a product is too large by 128 times the sum of x.
inline vi prepare8(vi biased) { return biased; }
inline vi dot8(vi sums, vi codes, vi x) { return _mm512_dpbusd_epi32(sums, codes, x); }
inline vi finish8(vi sums, vi eight_times_x) { return isub(sums, ishift_left<4>(eight_times_x)); }

#include "gemm/block_kernel.inl"

}  // namespace

const Kernels kKernels{bf16_float, int8_float, int8_int8,    int4_float,
                       int4_int8,  quantize,   silu_multiply};

}  // namespace quernstone::gemm::avx512_bf16_vnni
