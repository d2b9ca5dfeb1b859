#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "gemm/codes.h"

// Every level's arithmetic, one number at a time. Products with activations of 8 bits have the same
// bits at every level; those with fp32 are rounded after the product too.
namespace quernstone::gemm::baseline {
namespace {

using Row = std::array<float, kRows>;

// out[t][row] = sum over groups of (integer product of a group) * weight(row, group) * scale(t, group)
template <class Code, class Weight>
void integer_product(const Tokens& x, float* out, const Code& code, const Weight& weight) {
    const std::int64_t groups = x.padded / kScaleGroup;
    for (std::int64_t t = 0; t < x.count; ++t) {
        for (std::int64_t row = 0; row < kRows; ++row) {
            float total = 0.0F;
            for (std::int64_t g = 0; g < groups; ++g) {
                std::int32_t sum = 0;
                for (std::int64_t k = g * kScaleGroup; k < (g + 1) * kScaleGroup; ++k) {
                    sum += code(row, k) * x.codes[t * x.padded + k];
                }
                total = std::fma(static_cast<float>(sum),
                                 weight(row, g * kScaleGroup) * x.scales[t * groups + g], total);
            }
            out[t * kRows + row] = total;
        }
    }
}

template <class Weight>
void float_product(const Tokens& x, float* out, const Weight& weight) {
    std::fill_n(out, x.count * kRows, 0.0F);
    for (std::int64_t k = 0; k < x.padded; ++k) {
        Row w{};
        for (std::int64_t row = 0; row < kRows; ++row) {
            w[static_cast<std::size_t>(row)] = weight(row, k);
        }
        for (std::int64_t t = 0; t < x.count; ++t) {
            const float value = x.values[t * x.padded + k];
            for (std::int64_t row = 0; row < kRows; ++row) {
                out[t * kRows + row] += w[static_cast<std::size_t>(row)] * value;
            }
        }
    }
}

void scale_rows(const Block& block, std::int64_t tokens, float* out) {
    for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t row = 0; row < kRows; ++row) {
            out[t * kRows + row] *= int8_scale(block, row);
        }
    }
}

void int4_int8(const Block& w, const Tokens& x, float* out) {
    integer_product(
        x, out, [&](std::int64_t row, std::int64_t k) { return int4_code(w, row, k); },
        [&](std::int64_t row, std::int64_t k) { return int4_scale(w, row, k); });
}

void int4_float(const Block& w, const Tokens& x, float* out) {
    float_product(x, out, [&](std::int64_t row, std::int64_t k) {
        return static_cast<float>(int4_code(w, row, k)) * int4_scale(w, row, k);
    });
}

void int8_int8(const Block& w, const Tokens& x, float* out) {
    integer_product(
        x, out, [&](std::int64_t row, std::int64_t k) { return int8_code(w, row, k); },
        [](std::int64_t, std::int64_t) { return 1.0F; });
    scale_rows(w, x.count, out);
}

void int8_float(const Block& w, const Tokens& x, float* out) {
    float_product(x, out, [&](std::int64_t row, std::int64_t k) {
        return static_cast<float>(int8_code(w, row, k));
    });
    scale_rows(w, x.count, out);
}

void bf16_float(const Block& w, const Tokens& x, float* out) {
    float_product(x, out, [&](std::int64_t row, std::int64_t k) { return bf16_weight(w, row, k); });
}

void quantize(const float* x, std::int64_t n, std::int64_t padded, std::int8_t* codes,
              float* scales, std::int32_t* sums) {
    for (std::int64_t g = 0; g < padded / kScaleGroup; ++g) {
        const std::int64_t begin = g * kScaleGroup;
        const std::int64_t end = std::min(begin + kScaleGroup, n);
        float most = 0.0F;
        bool finite = true;
        for (std::int64_t k = begin; k < end; ++k) {
            finite = finite && std::isfinite(x[k]);
            most = std::max(most, std::fabs(x[k]));
        }
        scales[g] = finite ? most * (1.0F / 127.0F) : std::numeric_limits<float>::quiet_NaN();
        const float inverse = finite && most > 1e-36F ? 127.0F / most : 0.0F;
        std::int32_t sum = 0;
        for (std::int64_t k = begin; k < begin + kScaleGroup; ++k) {
            const float value = finite && k < end ? x[k] * inverse : 0.0F;
            const auto code = static_cast<std::int32_t>(std::nearbyint(value));
            codes[k] = static_cast<std::int8_t>(code);
            sum += code;
        }
        sums[g] = 8 * sum;
    }
}

// e^x for x <= 0 as avx2_tokens.inl has it, operation by operation.
float exp_nonpositive(float x) {
    const float clamped = x < -87.0F ? -87.0F : x;
    const float n = std::nearbyint(clamped * 1.44269504F);
    float r = std::fma(-n, 0.693359375F, clamped);
    r = std::fma(-n, -2.12194440e-4F, r);
    float p = 1.0F / 5040.0F;
    for (const float c :
         {1.0F / 720.0F, 1.0F / 120.0F, 1.0F / 24.0F, 1.0F / 6.0F, 0.5F, 1.0F, 1.0F}) {
        p = std::fma(p, r, c);
    }
    return std::isnan(x) ? x : std::ldexp(p, static_cast<int>(n));
}

void silu_multiply(float* gate, const float* up, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        const float e = exp_nonpositive(-std::fabs(gate[i]));
        gate[i] = gate[i] * ((gate[i] < 0.0F ? e : 1.0F) / (1.0F + e)) * up[i];
    }
}

template <BlocksTimesTokens kOne>
void each_block(const Block& blocks, const Tokens& x, float* out) {
    Block w = blocks;
    for (std::int64_t b = 0; b < blocks.count; ++b) {
        kOne(w, x, out + b * x.count * kRows);
        w.codes += w.bytes;
        w.scales += w.bytes;
        w.zeros = w.zeros == nullptr ? nullptr : w.zeros + w.bytes;
    }
}

}  // namespace

const Kernels kKernels{each_block<bf16_float>, each_block<int8_float>, each_block<int8_int8>,
                       each_block<int4_float>, each_block<int4_int8>,  quantize,
                       silu_multiply};

}  // namespace quernstone::gemm::baseline
