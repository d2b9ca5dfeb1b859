#include <immintrin.h>

#include <cstring>

#include "attention/block.h"

namespace quernstone::attention::avx512 {
namespace {

#include "attention/avx512_primitives.inl"
#include "attention/block_kernel.inl"
#include "attention/fp32_dot.inl"
#include "attention/gradient.inl"
#include "attention/gradient_fp32.inl"

}  // namespace

const Kernels kF32 = make_kernels<Fp32Dot<float>, float>();
const Kernels kBf16 = make_kernels<Fp32Dot<std::uint16_t>, std::uint16_t>();
const GradKernel kGradF32 = make_grad_kernel<Fp32Gradient<float>, float>();
const GradKernel kGradBf16 = make_grad_kernel<Fp32Gradient<std::uint16_t>, std::uint16_t>();

}  // namespace quernstone::attention::avx512
