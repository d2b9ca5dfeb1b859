#include <cstring>

#include "attention/block.h"

// The level that any 64-bit target takes: four floats in the compiler's own
// vector type (gcc and clang), which becomes SSE2, NEON or plain registers.
namespace quernstone::attention::baseline {
namespace {

using vf = float __attribute__((vector_size(16)));
using vi = std::int32_t __attribute__((vector_size(16)));
using vu = std::uint32_t __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kWideVectors = 2;  // a wide panel: 8 rows, tiles of 4 x 8
constexpr int kWideRows = 4;
constexpr int kNarrowRows = 8;  // a narrow panel: 4 rows, tiles of 8 x 4

inline vf vset(float x) { return vf{x, x, x, x}; }
inline vf vbroadcast(const float* p) { return vset(*p); }
inline vf vload(const float* p) {
    vf r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
inline void vstore(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
inline vi vload(const std::int32_t* p) {
    vi r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
inline vf vadd(vf a, vf b) { return a + b; }
inline vf vsub(vf a, vf b) { return a - b; }
inline vf vmul(vf a, vf b) { return a * b; }
inline vf vdiv(vf a, vf b) { return a / b; }
inline vf vreciprocal(vf x) { return vset(1.0F) / x; }
inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
inline vf vmin(vf a, vf b) { return a < b ? a : b; }

// The number whose exponent field is the low mantissa bits of t, its mantissa 0
inline vf vpower(vf t) { return reinterpret_cast<vf>(reinterpret_cast<vu>(t) << 23); }

// lo <= j < hi ? x : other
inline vf vwhere_visible(vi lo, vi hi, std::int32_t j, vf x, vf other) {
    const vi key = {j, j, j, j};
    return (lo <= key) & (key < hi) ? x : other;
}

inline vf vzero_if_equal(vf x, float y) { return x == vset(y) ? vset(0.0F) : x; }

// y > bound ? x : 0
inline vf vzero_unless_above(vf y, float bound, vf x) { return y > vset(bound) ? x : vset(0.0F); }

inline bool vall_finite(vf x) {
    const vi finite = (x - x) == vset(0.0F);
    return (finite[0] & finite[1] & finite[2] & finite[3]) != 0;
}

// Rows become columns.
inline void vtranspose(vf (&r)[kWidth]) {
    const vf a = {r[0][0], r[1][0], r[2][0], r[3][0]};
    const vf b = {r[0][1], r[1][1], r[2][1], r[3][1]};
    const vf c = {r[0][2], r[1][2], r[2][2], r[3][2]};
    const vf d = {r[0][3], r[1][3], r[2][3], r[3][3]};
    r[0] = a;
    r[1] = b;
    r[2] = c;
    r[3] = d;
}

inline vf vload_bf16(const std::uint16_t* p) {
    const vu bits = {p[0], p[1], p[2], p[3]};
    return reinterpret_cast<vf>(bits << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
inline void vstore_bf16(std::uint16_t* p, vf x) {
    const vu bits = reinterpret_cast<vu>(x);
    const vu rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
    const vu quiet = {0x7fc00000U, 0x7fc00000U, 0x7fc00000U, 0x7fc00000U};
    const vu word = (x == x ? rounded : quiet) >> 16;
    for (int i = 0; i < kWidth; ++i) {
        p[i] = static_cast<std::uint16_t>(word[i]);
    }
}

#include "attention/block_kernel.inl"
#include "attention/fp32_dot.inl"
#include "attention/gradient.inl"
#include "attention/gradient_fp32.inl"

}  // namespace

const Kernels kF32 = make_kernels<Fp32Dot<float>, float>();
const Kernels kBf16 = make_kernels<Fp32Dot<std::uint16_t>, std::uint16_t>();
const GradKernel kGradF32 = make_grad_kernel<Fp32Gradient<float>, float>();
const GradKernel kGradBf16 = make_grad_kernel<Fp32Gradient<std::uint16_t>, std::uint16_t>();

}  // namespace quernstone::attention::baseline
