#include "moe/decoder.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>

#include "common/parallel.h"
#include "common/round.h"
#include "moe/dot.h"

namespace quernstone::moe {
namespace {

constexpr std::int64_t kMaxChoices = 64;
// Below this many numbers a second thread costs more than it gives.
constexpr std::int64_t kWorthAThread = 65536;

int threads_for(std::int64_t numbers, int threads) noexcept {
    return numbers < kWorthAThread ? 1 : threads;
}

void normalize(const RmsNorm& norm, const float* x, std::int64_t n, float* out) noexcept {
    const float scale = 1.0F / std::sqrt(dot(x, x, n) / static_cast<float>(n) + norm.eps);
    for (std::int64_t i = 0; i < n; ++i) {
        out[i] = x[i] * scale * norm.weight.data[i];
    }
}

void add_to(float* x, const float* y, std::int64_t n) noexcept {
    for (std::int64_t i = 0; i < n; ++i) {
        x[i] += y[i];
    }
}

float widened(float x) noexcept { return x; }
float widened(bf16 x) noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16U);
}

void narrow(float x, float& to) noexcept { to = x; }
// To the nearest, ties to even; NaN stays one.
void narrow(float x, bf16& to) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t odd = (bits >> 16U) & 1U;
    to.bits = std::isnan(x) ? std::uint16_t{0x7FC0}
                            : static_cast<std::uint16_t>((bits + 0x7FFFU + odd) >> 16U);
}

// Pairs (x[i], x[i + d/2]) turned by the angle of i.
template <class T>
void rotate(const float* x, const float* cos, const float* sin, std::int64_t width,
            T* to) noexcept {
    const std::int64_t half = width / 2;
    for (std::int64_t i = 0; i < half; ++i) {
        narrow(x[i] * cos[i] - x[i + half] * sin[i], to[i]);
        narrow(x[i + half] * cos[i + half] + x[i] * sin[i + half], to[i + half]);
    }
}

void normalize_heads(const RmsNorm& norm, float* x, std::int64_t heads,
                     std::int64_t width) noexcept {
    if (!norm.weight.present()) {
        return;
    }
    const std::int64_t size = norm.weight.extent[0];
    for (std::int64_t at = 0; at < heads * width; at += size) {
        normalize(norm, x + at, size, x + at);
    }
}

Status check(const Attention& layer) noexcept {
    const std::int64_t q = layer.heads * layer.width;
    const std::int64_t k = layer.kv_heads * layer.width;
    if (layer.width < 2 || layer.width % 2 != 0) {
        return invalid("width", layer.width, "an even number");
    }
    QS_TRY(same("qkv.rows", layer.qkv.layout.rows, "", q + 2 * k));
    QS_TRY(same("out.inputs", layer.out.layout.inputs, "", q));
    QS_TRY(same("out.rows", layer.out.layout.rows, "", layer.qkv.layout.inputs));
    QS_TRY(same("before.weight", layer.before.weight.extent[0], "", layer.qkv.layout.inputs));
    if (layer.qkv_bias.present()) {
        QS_TRY(same("qkv_bias", layer.qkv_bias.extent[0], "", q + 2 * k));
    }
    if (layer.out_bias.present()) {
        QS_TRY(same("out_bias", layer.out_bias.extent[0], "", layer.out.layout.rows));
    }
    if (layer.of_q.weight.present() != layer.of_k.weight.present()) {
        return invalid("of_k", "one norm alone", "one of q and one of k, or none");
    }
    if (layer.of_q.weight.present()) {
        const std::int64_t size = layer.of_q.weight.extent[0];
        if (size != layer.width && size != q) {
            return invalid("of_q", size, "the width of a head or of all, which are", q);
        }
        QS_TRY(same("of_k", layer.of_k.weight.extent[0], "", size == layer.width ? size : k));
    }
    return {};
}

Status check(const Router& router, std::int64_t hidden) noexcept {
    const std::int64_t experts = router.weight.extent[0];
    QS_TRY(same("router.weight.shape[1]", router.weight.extent[1], "", hidden));
    QS_TRY(same("router.before.weight", router.before.weight.extent[0], "", hidden));
    if (router.top_k < 1 || router.top_k > std::min(experts, kMaxChoices)) {
        return invalid("top_k", router.top_k, "1 to", std::min(experts, kMaxChoices));
    }
    if (router.shared_gate.present()) {
        QS_TRY(same("shared_gate", router.shared_gate.extent[0], "", hidden));
    }
    return {};
}

template <class T, int N>
Status same_shape(const char* what, const View<T, N>& x,
                  const std::array<std::int64_t, static_cast<std::size_t>(N)>& want) noexcept {
    for (std::size_t i = 0; i < static_cast<std::size_t>(N); ++i) {
        QS_TRY(same(what, x.extent[i], "in one of its axes", want[i]));
    }
    const std::size_t last = static_cast<std::size_t>(N) - 1;
    if (x.extent[last] > 1 && x.stride[last] != 1) {
        return invalid(what, "a strided last axis", "a contiguous last axis");
    }
    return {};
}

// The k largest of a softmax by falling weight, the shared experts behind them.
void choose(const Router& router, const float* x, float* logits, std::int64_t* ids, float* weights,
            Counts& counts) noexcept {
    const std::int64_t experts = router.weight.extent[0];
    const std::int64_t top_k = router.top_k;
    const float top = *std::max_element(logits, logits + experts);
    float sum = 0.0F;
    for (std::int64_t e = 0; e < experts; ++e) {
        logits[e] = std::exp(logits[e] - top);
        sum += logits[e];
    }
    float chosen = 0.0F;
    for (std::int64_t c = 0; c < top_k; ++c) {
        const std::int64_t best = std::max_element(logits, logits + experts) - logits;
        ids[c] = best;
        weights[c] = logits[best] / sum;
        chosen += weights[c];
        logits[best] = -1.0F;
    }
    if (router.renormalize) {
        for (std::int64_t c = 0; c < top_k; ++c) {
            weights[c] /= chosen;
        }
    }
    std::int64_t kept = top_k;
    if (router.gated) {
        double total = 0.0;
        for (std::int64_t c = 0; c < top_k; ++c) {
            total += static_cast<double>(weights[c]);
        }
        double tail = 0.0;
        while (kept > 1) {
            const double more = tail + static_cast<double>(weights[kept - 1]);
            const double share = more / std::max(total, 1e-300);
            if (share * share * router.sensitivity > router.threshold) {
                break;
            }
            tail = more;
            --kept;
        }
        double left = 0.0;
        for (std::int64_t c = 0; c < kept; ++c) {
            left += static_cast<double>(weights[c]);
        }
        const double scale = total / std::max(left, 1e-300);
        for (std::int64_t c = 0; c < top_k; ++c) {
            weights[c] =
                c < kept ? static_cast<float>(static_cast<double>(weights[c]) * scale) : 0.0F;
            ids[c] = c < kept ? ids[c] : -1;
        }
    }
    if (router.shared > 0) {
        float weight = 1.0F;
        if (router.shared_gate.present()) {
            weight =
                1.0F /
                (1.0F + std::exp(-dot(router.shared_gate.data, x, router.shared_gate.extent[0])));
        }
        for (std::int64_t s = 0; s < router.shared; ++s) {
            ids[top_k + s] = experts + s;
            weights[top_k + s] = weight;
        }
    }
    ++counts.tokens;
    counts.single += kept == 1 ? 1 : 0;
    counts.active += kept;
}

}  // namespace

template <class T>
Status attention_inputs(const Attention& layer, const InputArgs<T>& a, int threads) noexcept {
    QS_TRY(check(layer));
    const std::int64_t tokens = a.hidden.extent[0];
    const std::int64_t wide = layer.qkv.layout.inputs;
    const std::int64_t heads = layer.heads;
    const std::int64_t kv = layer.kv_heads;
    const std::int64_t width = layer.width;
    const std::int64_t rows = (heads + 2 * kv) * width;
    QS_TRY((same_shape("hidden", a.hidden, {tokens, wide})));
    if (a.add.present()) {
        QS_TRY((same_shape("add", a.add, {tokens, wide})));
    }
    QS_TRY((same_shape("cos", a.cos, {tokens, width})));
    QS_TRY((same_shape("sin", a.sin, {tokens, width})));
    QS_TRY((same_shape("normed", a.normed, {tokens, wide})));
    QS_TRY((same_shape("projected", a.projected, {tokens, rows})));
    QS_TRY((same_shape("q", a.q, {heads, tokens, width})));
    QS_TRY((same_shape("k", a.k, {kv, tokens, width})));
    QS_TRY((same_shape("v", a.v, {kv, tokens, width})));
    parallel_for(tokens, threads_for(tokens * wide, threads), [&](std::int64_t t) noexcept {
        if (a.add.present()) {
            add_to(a.hidden.at(t, 0), a.add.at(t, 0), wide);
        }
        normalize(layer.before, a.hidden.at(t, 0), wide, a.normed.at(t, 0));
    });
    const View<const float, 2> normed{a.normed.data, a.normed.extent, a.normed.stride};
    QS_TRY(gemm::multiply(layer.qkv, normed, layer.qkv_compute, a.projected, threads));
    parallel_for(tokens, threads_for(tokens * rows, threads), [&](std::int64_t t) noexcept {
        float* row = a.projected.at(t, 0);
        if (layer.qkv_bias.present()) {
            add_to(row, layer.qkv_bias.data, rows);
        }
        float* k = row + heads * width;
        const float* v = k + kv * width;
        normalize_heads(layer.of_q, row, heads, width);
        normalize_heads(layer.of_k, k, kv, width);
        for (std::int64_t h = 0; h < heads; ++h) {
            rotate(row + h * width, a.cos.at(t, 0), a.sin.at(t, 0), width, a.q.at(h, t, 0));
        }
        for (std::int64_t g = 0; g < kv; ++g) {
            rotate(k + g * width, a.cos.at(t, 0), a.sin.at(t, 0), width, a.k.at(g, t, 0));
            T* to = a.v.at(g, t, 0);
            for (std::int64_t i = 0; i < width; ++i) {
                narrow(v[g * width + i], to[i]);
            }
        }
    });
    return {};
}

template <class T>
Status expert_inputs(const Attention& layer, const Router& router, const OutputArgs<T>& a,
                     Counts& counts, int threads) noexcept {
    QS_TRY(check(layer));
    const std::int64_t tokens = a.hidden.extent[0];
    const std::int64_t wide = layer.out.layout.rows;
    QS_TRY(check(router, wide));
    const std::int64_t heads = layer.heads;
    const std::int64_t width = layer.width;
    const std::int64_t experts = router.weight.extent[0];
    const std::int64_t choices = router.top_k + router.shared;
    QS_TRY((same_shape("attended", a.attended, {heads, tokens, width})));
    QS_TRY((same_shape("joined", a.joined, {tokens, heads * width})));
    QS_TRY((same_shape("hidden", a.hidden, {tokens, wide})));
    QS_TRY((same_shape("x", a.x, {tokens, wide})));
    QS_TRY((same_shape("ids", a.ids, {tokens, choices})));
    QS_TRY((same_shape("weights", a.weights, {tokens, choices})));
    parallel_for(tokens, threads_for(tokens * wide, threads), [&](std::int64_t t) noexcept {
        float* to = a.joined.at(t, 0);
        for (std::int64_t h = 0; h < heads; ++h) {
            const T* from = a.attended.at(h, t, 0);
            for (std::int64_t i = 0; i < width; ++i) {
                to[h * width + i] = widened(from[i]);
            }
        }
    });
    const View<const float, 2> joined{a.joined.data, a.joined.extent, a.joined.stride};
    QS_TRY(gemm::multiply(layer.out, joined, layer.out_compute, a.x, threads));
    // A task is a run of tokens with room for the logits of one.
    constexpr std::int64_t kMaxExperts = 4096;
    if (experts > kMaxExperts) {
        return invalid("router.weight.shape[0]", experts, "at most", kMaxExperts);
    }
    const std::int64_t run = std::max<std::int64_t>(1, tokens / (std::int64_t{8} * threads));
    std::array<Counts, 1024> parts{};
    const std::int64_t tasks = std::min<std::int64_t>(divide_up(tokens, run), 1024);
    const std::int64_t each = divide_up(tokens, std::max<std::int64_t>(tasks, 1));
    parallel_for(tasks, threads_for(tokens * wide, threads), [&](std::int64_t task) noexcept {
        std::array<float, kMaxExperts> logits;
        for (std::int64_t t = task * each; t < std::min(tokens, (task + 1) * each); ++t) {
            float* hidden = a.hidden.at(t, 0);
            float* x = a.x.at(t, 0);
            add_to(hidden, x, wide);
            if (layer.out_bias.present()) {
                add_to(hidden, layer.out_bias.data, wide);
            }
            normalize(router.before, hidden, wide, x);
            for (std::int64_t e = 0; e < experts; ++e) {
                logits[static_cast<std::size_t>(e)] = dot(router.weight.at(e, 0), x, wide);
            }
            choose(router, x, logits.data(), a.ids.at(t, 0), a.weights.at(t, 0),
                   parts[static_cast<std::size_t>(task)]);
        }
    });
    for (const Counts& part : parts) {
        counts.tokens += part.tokens;
        counts.single += part.single;
        counts.active += part.active;
    }
    return {};
}

Status final_norm(const RmsNorm& norm, View<const float, 2> hidden, View<const float, 2> add,
                  View<float, 2> out, int threads) noexcept {
    const std::int64_t tokens = hidden.extent[0];
    const std::int64_t wide = hidden.extent[1];
    QS_TRY((same_shape("hidden", hidden, {tokens, wide})));
    QS_TRY(same("norm.weight", norm.weight.extent[0], "", wide));
    if (add.present()) {
        QS_TRY((same_shape("add", add, {tokens, wide})));
    }
    QS_TRY((same_shape("out", out, {tokens, wide})));
    parallel_for(tokens, threads_for(tokens * wide, threads), [&](std::int64_t t) noexcept {
        float* to = out.at(t, 0);
        std::copy_n(hidden.at(t, 0), wide, to);
        if (add.present()) {
            add_to(to, add.at(t, 0), wide);
        }
        normalize(norm, to, wide, to);
    });
    return {};
}

template Status attention_inputs(const Attention&, const InputArgs<float>&, int) noexcept;
template Status attention_inputs(const Attention&, const InputArgs<bf16>&, int) noexcept;
template Status expert_inputs(const Attention&, const Router&, const OutputArgs<float>&, Counts&,
                              int) noexcept;
template Status expert_inputs(const Attention&, const Router&, const OutputArgs<bf16>&, Counts&,
                              int) noexcept;

}  // namespace quernstone::moe
