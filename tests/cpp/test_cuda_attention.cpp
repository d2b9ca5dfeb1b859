// The CUDA kernels under the emulator, beside the CPU's: neither shares a line with the other.
//
// Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "attention.h"
#include "attention/attention.h"
#include "check.h"
#include "device.h"
#include "emulator.h"

namespace {

using emulation::Order;
using quernstone::View;
using quernstone::attention::ForwardArgs;
using quernstone::attention::Kind;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Shape {
    std::int64_t b, h, g, t, s, d;
    std::int64_t window = 0;
    bool causal = true;
    std::int64_t offset = 0;  // elements before K and V: 0 leaves them aligned
    bool padded = false;
};

struct Result {
    std::vector<float> out, lse, importance;
    friend bool operator==(const Result& a, const Result& b) {
        return bits(a.out) == bits(b.out) && bits(a.lse) == bits(b.lse) &&
               bits(a.importance) == bits(b.importance);
    }
    static std::vector<std::uint32_t> bits(const std::vector<float>& x) {
        std::vector<std::uint32_t> all;
        for (const float value : x) {
            all.push_back(std::bit_cast<std::uint32_t>(value));
        }
        return all;
    }
};

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

template <class T>
std::vector<T> as(const std::vector<float>& x, std::int64_t offset = 0) {
    std::vector<T> all(size(offset), quernstone::cuda::from_float<T>(kNan));
    for (const float value : x) {
        all.push_back(quernstone::cuda::from_float<T>(value));
    }
    return all;
}

template <class T>
std::vector<float> widened(const std::vector<T>& x) {
    std::vector<float> all;
    for (const T& value : x) {
        all.push_back(quernstone::cuda::to_float(value));
    }
    return all;
}

// One call's inputs as numbers that T holds.
template <class T>
struct Problem {
    Problem(const Shape& shape, Kind which, bool by_element)
        : e(shape),
          kind(which),
          gate_width(by_element ? e.d : 1),
          q(normal(e.b * e.h * e.t * e.d, 1)),
          k(normal(e.b * e.g * e.s * e.d, 2)),
          v(normal(e.b * e.g * e.s * e.d, 3)),
          gate(normal(e.b * e.h * e.t * gate_width, 4)),
          sinks(normal(e.h, 5)) {
        for (std::int64_t b = 0; b < e.b; ++b) {
            start.push_back(b * 3 % (e.s + 1));
            lengths.push_back(b % 2 == 0 ? e.s : e.s / 2);
        }
        for (std::int64_t i = 0; i < e.b * e.t; ++i) {
            token_mask.push_back(i % 3 == 1 ? 0 : static_cast<std::uint8_t>(2 * i + 1));
        }
    }

    static std::vector<float> normal(std::int64_t count, unsigned seed) {
        std::mt19937 engine(seed);
        std::normal_distribution<float> distribution;
        std::vector<float> all(size(count));
        for (float& x : all) {
            x = quernstone::cuda::to_float(quernstone::cuda::from_float<T>(distribution(engine)));
        }
        return all;
    }

    [[nodiscard]] float scale() const { return 1.0F / std::sqrt(static_cast<float>(e.d)); }

    [[nodiscard]] Result on_the_cpu() const {
        Result to = empty();
        ForwardArgs<float> a;
        a.q = {q.data(), {e.b, e.h, e.t, e.d}, {e.h * e.t * e.d, e.t * e.d, e.d, 1}};
        a.k = {k.data(), {e.b, e.g, e.s, e.d}, {e.g * e.s * e.d, e.s * e.d, e.d, 1}};
        a.v = {v.data(), a.k.extent, a.k.stride};
        a.kind = kind;
        if (kind == Kind::kSink) {
            a.sinks = {sinks.data(), {e.h}, {1}};
        }
        if (kind == Kind::kGated) {
            const std::int64_t w = gate_width;
            a.gate = {gate.data(), {e.b, e.h, e.t, w}, {e.h * e.t * w, e.t * w, w, 1}};
        }
        a.causal = e.causal;
        a.window = e.window;
        a.scale = scale();
        if (e.padded) {
            a.key_start = {start.data(), {e.b}, {1}};
            a.key_lengths = {lengths.data(), {e.b}, {1}};
            a.token_mask = {token_mask.data(), {e.b, e.t}, {e.t, 1}};
        }
        a.out = {to.out.data(), a.q.extent, a.q.stride};
        a.lse = {to.lse.data(), {e.b, e.h, e.t}, {e.h * e.t, e.t, 1}};
        a.importance = {to.importance.data(), {e.h}, {1}};
        CHECK(quernstone::attention::forward(a, 1).ok());
        return to;
    }

    [[nodiscard]] Result emulated(const emulation::Schedule& schedule) const {
        Result to = empty();
        // Of exactly the size that they have to have: AddressSanitizer sees what is read beyond.
        const std::vector<T> tq = as<T>(q);
        const std::vector<T> tk = as<T>(k, e.offset);
        const std::vector<T> tv = as<T>(v, e.offset);
        const std::vector<T> tgate = as<T>(gate);
        std::vector<T> out = as<T>(to.out);
        QsAttentionDecode a{};
        a.q = tq.data();
        a.k = tk.data() + e.offset;
        a.v = tv.data() + e.offset;
        a.kind = kind == Kind::kSink ? QS_SINK : kind == Kind::kGated ? QS_GATED : QS_VANILLA;
        if (kind == Kind::kSink) {
            a.sinks = sinks.data();
        }
        if (kind == Kind::kGated) {
            a.gate = tgate.data();
            a.gate_per_element = gate_width == e.d ? 1 : 0;
        }
        if (e.padded) {
            a.key_start = start.data();
            a.key_lengths = lengths.data();
            a.token_mask = token_mask.data();
        }
        a.out = out.data();
        a.lse = to.lse.data();
        a.importance = to.importance.data();
        a.b = e.b;
        a.h = e.h;
        a.g = e.g;
        a.t = e.t;
        a.s = e.s;
        a.d = e.d;
        strides(a.q_stride, e.h, e.t, e.d);
        strides(a.k_stride, e.g, e.s, e.d);
        strides(a.v_stride, e.g, e.s, e.d);
        strides(a.gate_stride, e.h, e.t, gate_width);
        a.window = e.window;
        a.scale = scale();
        a.dtype = sizeof(T) == 4 ? QS_F32 : std::is_same_v<T, __half> ? QS_F16 : QS_BF16;
        a.causal = e.causal ? 1 : 0;
        const std::int64_t bytes = qs_attention_decode_scratch(&a);
        std::vector<float> scratch(size(bytes) / sizeof(float), kNan);
        a.scratch = scratch.data();
        emulation::set_schedule(schedule);
        const char* error = qs_attention_decode(&a, nullptr);
        emulation::set_schedule({});
        CHECK_EQ(std::string(error == nullptr ? "" : error), "");
        to.out = widened(out);
        return to;
    }

    static void strides(std::int64_t (&to)[3], std::int64_t h, std::int64_t t, std::int64_t d) {
        to[0] = h * t * d;
        to[1] = t * d;
        to[2] = d;
    }

    [[nodiscard]] Result empty() const {
        return {std::vector<float>(q.size(), kNan), std::vector<float>(size(e.b * e.h * e.t), kNan),
                std::vector<float>(size(e.h), kNan)};
    }

    Shape e;
    Kind kind;
    std::int64_t gate_width;
    std::vector<float> q, k, v, gate, sinks;
    std::vector<std::int64_t> start, lengths;
    std::vector<std::uint8_t> token_mask;
};

// Largest difference over the largest size; two NaNs or two infinities are alike.
double difference(const std::vector<float>& got, const std::vector<float>& want) {
    double most = 0.0;
    double scale = 1e-30;
    for (std::size_t i = 0; i < want.size(); ++i) {
        if (std::isfinite(want[i])) {
            scale = std::max(scale, std::fabs(double{want[i]}));
        }
        const bool same = got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i]));
        most = std::max(most, same ? 0.0 : std::fabs(double{got[i]} - double{want[i]}));
        if (!same && !(std::isfinite(got[i]) && std::isfinite(want[i]))) {
            return std::numeric_limits<double>::infinity();
        }
    }
    return most / scale;
}

template <class T>
void check(const Shape& shape, double unit) {
    for (const Kind kind : {Kind::kSink, Kind::kVanilla, Kind::kGated}) {
        for (const bool by_element : {false, true}) {
            if (by_element && kind != Kind::kGated) {
                continue;
            }
            const Problem<T> problem(shape, kind, by_element);
            const Result want = problem.on_the_cpu();
            const Result got = problem.emulated({});
            // Both sum in fp32, in another order, and only ours is rounded to T.
            std::ostringstream label;
            label << "kind " << int(kind) << " t " << shape.t << " s " << shape.s << " d "
                  << shape.d;
            const double off = difference(got.out, want.out);
            if (!(off <= unit + 4e-6)) {
                check::fail(__FILE__, __LINE__,
                            label.str() + ": out off by " + std::to_string(off));
            }
            CHECK(difference(got.lse, want.lse) <= 4e-6);
            CHECK(difference(got.importance, want.importance) <= 4e-6);
            // A race or a read of what nobody wrote gives other bits in another order.
            CHECK(got == problem.emulated({Order::kDescending, 0, 0x11}));
            if (shape.t == 8) {
                CHECK(got == problem.emulated({Order::kShuffled, 7, 0x3c}));
            }
        }
    }
}

template <class T>
void check_all(double unit) {
    check<T>({1, 4, 4, 1, 300, 64}, unit);
    check<T>({2, 6, 2, 3, 70, 40, 0, true, 0, true}, unit);
    check<T>({1, 6, 1, 8, 40, 128, 20}, unit);
    check<T>({2, 2, 1, 5, 33, 256, 0, false, 0, true}, unit);
    check<T>({1, 2, 2, 2, 50, 65, 7, false}, unit);
    check<T>({1, 2, 2, 2, 50, 64, 0, true, 3}, unit);
    check<T>({1, 2, 1, 8, 3, 16}, unit);
}

TEST(cuda_attention_under_the_emulator_is_the_cpus_in_fp32) { check_all<float>(0.0); }
TEST(cuda_attention_under_the_emulator_is_the_cpus_in_fp16) { check_all<__half>(0x1p-11); }
TEST(cuda_attention_under_the_emulator_is_the_cpus_in_bf16) { check_all<__nv_bfloat16>(0x1p-8); }

TEST(cuda_attention_of_an_empty_cache_is_zero) {
    const Problem<float> problem({1, 2, 1, 3, 0, 32}, Kind::kSink, false);
    const Result got = problem.emulated({});
    CHECK(got.out == std::vector<float>(got.out.size(), 0.0F));
    CHECK(got.lse == std::vector<float>(6, -std::numeric_limits<float>::infinity()));
    CHECK(got.importance == std::vector<float>(2, 0.0F));
}

TEST(emulated_fp16_converts_as_the_standard_says) {
    using quernstone::cuda::from_float;
    CHECK_EQ(from_float<__half>(1.0F).bits, 0x3c00);
    CHECK_EQ(from_float<__half>(-0.0F).bits, 0x8000);
    CHECK_EQ(from_float<__half>(65504.0F).bits, 0x7bff);
    CHECK_EQ(from_float<__half>(65519.9F).bits, 0x7bff);
    CHECK_EQ(from_float<__half>(65520.0F).bits, 0x7c00);
    CHECK_EQ(from_float<__half>(0x1p-24F).bits, 0x0001);
    CHECK_EQ(from_float<__half>(0x1p-25F).bits, 0x0000);  // a tie, to even
    CHECK_EQ(from_float<__half>(0x1.8p-24F).bits, 0x0002);
    CHECK_EQ(from_float<__half>(1.0F + 0x1p-11F).bits, 0x3c00);
    CHECK_EQ(from_float<__half>(1.0F + 0x3p-11F).bits, 0x3c02);
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const __half x{static_cast<std::uint16_t>(bits)};
        const float wide = quernstone::cuda::to_float(x);
        CHECK(std::isnan(wide) || from_float<__half>(wide).bits == x.bits);
    }
}

}  // namespace
