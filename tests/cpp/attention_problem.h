#pragma once

// Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "attention/attention.h"

namespace attention_test {

using namespace quernstone;
using namespace quernstone::attention;

struct Shape {
    std::int64_t b, h, g, t, s, d;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

template <class T>
T narrow(float x) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return x;
    } else {
        return {static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16)};
    }
}

template <class T>
std::vector<T> normal(std::int64_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> distribution;
    std::vector<T> values(static_cast<std::size_t>(count));
    for (T& value : values) {
        value = narrow<T>(distribution(engine));
    }
    return values;
}

template <class T>
View<T, 4> contiguous(T* data, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
    return {data, {b, h, t, d}, {h * t * d, t * d, d, 1}};
}

// One call's memory. Outputs start as NaN, so that what is not written shows.
template <class T>
struct Problem {
    Problem(Shape shape, Kind kind)
        : e(shape),
          q(normal<T>(e.b * e.h * e.t * e.d, 1)),
          k(normal<T>(e.b * e.g * e.s * e.d, 2)),
          v(normal<T>(e.b * e.g * e.s * e.d, 3)),
          gate(normal<T>(e.b * e.h * e.t, 4)),
          sinks(normal<float>(e.h, 5)),
          out(q.size(), narrow<T>(std::numeric_limits<float>::quiet_NaN())),
          lse(gate.size(), std::numeric_limits<float>::quiet_NaN()),
          importance(sinks.size(), std::numeric_limits<float>::quiet_NaN()) {
        args.q = contiguous<const T>(q.data(), e.b, e.h, e.t, e.d);
        args.k = contiguous<const T>(k.data(), e.b, e.g, e.s, e.d);
        args.v = contiguous<const T>(v.data(), e.b, e.g, e.s, e.d);
        args.kind = kind;
        if (kind == Kind::kSink) {
            args.sinks = {sinks.data(), {e.h}, {1}};
        } else if (kind == Kind::kGated) {
            args.gate = contiguous<const T>(gate.data(), e.b, e.h, e.t, 1);
        }
        args.scale = 1.0F / std::sqrt(static_cast<float>(e.d));
        args.out = contiguous<T>(out.data(), e.b, e.h, e.t, e.d);
        args.lse = {lse.data(), {e.b, e.h, e.t}, {e.h * e.t, e.t, 1}};
        args.importance = {importance.data(), {e.h}, {1}};
    }
    Problem(const Problem&) = delete;
    Problem& operator=(const Problem&) = delete;

    Shape e;
    std::vector<T> q, k, v, gate;
    std::vector<float> sinks;
    std::vector<T> out;
    std::vector<float> lse, importance;
    ForwardArgs<T> args;
};

// Groups, caches, widths off the vector length, more rows than one block and fewer than one panel.
inline const std::vector<Shape> kShapes = {{1, 2, 2, 131, 131, 64}, {2, 6, 2, 37, 53, 40},
                                           {1, 4, 1, 1, 70, 128},   {1, 1, 1, 19, 19, 16},
                                           {1, 3, 3, 9, 200, 31},   {1, 2, 1, 70, 70, 256}};

}  // namespace attention_test
