#include <immintrin.h>

#include <cstring>
#include <limits>
#include <type_traits>

#include "gemm/kernel.h"

namespace quernstone::gemm::avx2 {
namespace {

#include "gemm/avx2_primitives.inl"
#include "gemm/avx2_tokens.inl"
#include "gemm/block_kernel.inl"

}  // namespace

const Kernels kKernels{bf16_float, int8_float, int8_int8,    int4_float,
                       int4_int8,  quantize,   silu_multiply};

}  // namespace quernstone::gemm::avx2
