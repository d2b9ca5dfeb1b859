#include <cmath>
#include <cstring>

#include "attention/block.h"

// The level that any 64-bit compiler takes: arrays of four floats, which
// compilers turn into whatever vectors their target has.
namespace quernstone::attention::baseline {
namespace {

constexpr int kWidth = 4;
constexpr int kWideVectors = 2;
constexpr int kWideRows = 4;
constexpr int kNarrowRows = 4;

struct vf {
    float x[kWidth];
};
struct vi {
    std::int32_t x[kWidth];
};

template <class F>
inline vf lanes(F f) {
    vf r;
    for (int i = 0; i < kWidth; ++i) {
        r.x[i] = f(i);
    }
    return r;
}

inline float from_bits(std::uint32_t bits) {
    float f = 0.0F;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
inline std::uint32_t to_bits(float f) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &f, sizeof bits);
    return bits;
}

inline vf vset(float x) {
    return lanes([&](int) { return x; });
}
inline vf vbroadcast(const float* p) { return vset(*p); }
inline vf vload(const float* p) {
    vf r;
    std::memcpy(r.x, p, sizeof r.x);
    return r;
}
inline void vstore(float* p, vf x) { std::memcpy(p, x.x, sizeof x.x); }
inline vi vload(const std::int32_t* p) {
    vi r;
    std::memcpy(r.x, p, sizeof r.x);
    return r;
}
inline vf vadd(vf a, vf b) {
    return lanes([&](int i) { return a.x[i] + b.x[i]; });
}
inline vf vsub(vf a, vf b) {
    return lanes([&](int i) { return a.x[i] - b.x[i]; });
}
inline vf vmul(vf a, vf b) {
    return lanes([&](int i) { return a.x[i] * b.x[i]; });
}
inline vf vdiv(vf a, vf b) {
    return lanes([&](int i) { return a.x[i] / b.x[i]; });
}
inline vf vfma(vf a, vf b, vf c) {
    return lanes([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}
inline vf vmax(vf a, vf b) {  // b where either is NaN
    return lanes([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
inline vf vmin(vf a, vf b) {
    return lanes([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
}
inline vf vscale(vf p, vf t) {
    return lanes([&](int i) { return from_bits(to_bits(p.x[i]) + (to_bits(t.x[i]) << 23)); });
}
inline vf vwhere_visible(vi lo, vi hi, std::int32_t j, vf x, vf other) {
    return lanes([&](int i) { return lo.x[i] <= j && j < hi.x[i] ? x.x[i] : other.x[i]; });
}
inline vf vzero_if_equal(vf x, float y) {
    return lanes([&](int i) { return x.x[i] == y ? 0.0F : x.x[i]; });
}
inline bool vall_finite(vf x) {
    bool all = true;
    for (const float f : x.x) {
        all = all && std::isfinite(f);
    }
    return all;
}
inline vf vload_bf16(const std::uint16_t* p) {
    return lanes([&](int i) { return from_bits(static_cast<std::uint32_t>(p[i]) << 16); });
}
inline std::uint16_t round_bf16(float x) {
    const std::uint32_t bits = to_bits(x);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    return static_cast<std::uint16_t>(std::isnan(x) ? 0x7fc0U : rounded);
}
inline void vstore_bf16(std::uint16_t* p, vf x) {
    for (int i = 0; i < kWidth; ++i) {
        p[i] = round_bf16(x.x[i]);
    }
}

#include "attention/block_kernel.inl"
#include "attention/fp32_dot.inl"

}  // namespace

const Kernels kF32 = make_kernels<Fp32Dot, float>();
const Kernels kBf16 = make_kernels<Fp32Dot, std::uint16_t>();

}  // namespace quernstone::attention::baseline
