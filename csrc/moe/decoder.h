#pragma once

#include <cstdint>

#include "common/bf16.h"
#include "common/status.h"
#include "common/view.h"
#include "gemm/gemm.h"

// What a decoder layer with grouped-query attention does beside attention itself and its experts,
// on packed matrices, with fp32 between the layers.
//
// Axes: t tokens, m hidden width, h query heads, g key heads, d head width, e routed experts,
// k choices of a token, n shared experts.
namespace quernstone::moe {

// x / sqrt(mean x^2 + eps) * weight
struct RmsNorm {
    View<const float, 1> weight;
    float eps = 0.0F;
};

struct Attention {
    gemm::Matrix qkv, out;  // [(h + 2 g) d, m] and [m, h d]
    gemm::Compute qkv_compute = gemm::Compute::kFloat, out_compute = gemm::Compute::kFloat;
    View<const float, 1> qkv_bias;  // [(h + 2 g) d]; may be absent
    View<const float, 1> out_bias;  // [m]; may be absent
    RmsNorm before;                 // of the layer's input
    // Of every head [d], or of all of them at once [h d] and [g d]; may be absent.
    RmsNorm of_q, of_k;
    std::int64_t heads = 0, kv_heads = 0, width = 0;
};

// Softmax over e, the k largest; weights divided by their sum or left. Shared experts are those
// numbered e .. e + n - 1, chosen by every token with weight 1 or sigmoid(shared_gate x).
struct Router {
    RmsNorm before;
    View<const float, 2> weight;       // [e, m]
    View<const float, 1> shared_gate;  // [m]; may be absent
    std::int64_t top_k = 0, shared = 0;
    bool renormalize = false;
    // AdapMoE's gating for any k, see quernstone.moe.gating.drop_experts.
    double sensitivity = 0.0, threshold = 0.0;
    bool gated = false;
};

// How many tokens a router saw, how many of them keep one expert, and the experts of all.
struct Counts {
    std::int64_t tokens = 0, single = 0, active = 0;
};

// Of T either float or bf16.
template <class T>
struct InputArgs {
    View<float, 2> hidden;          // [t, m]; `add` is added to it first
    View<const float, 2> add;       // [t, m]; may be absent
    View<const float, 2> cos, sin;  // [t, d], both halves alike: the rotation of transformers
    View<float, 2> normed;          // [t, m] room
    View<float, 2> projected;       // [t, (h + 2 g) d] room
    View<T, 3> q;                   // [h, t, d]
    View<T, 3> k, v;                // [g, t, d]
};

template <class T>
struct OutputArgs {
    View<const T, 3> attended;  // [h, t, d]
    View<float, 2> joined;      // [t, h d] room
    View<float, 2> hidden;      // [t, m]; the attention's output is added
    View<float, 2> x;           // [t, m] what the experts take
    View<std::int64_t, 2> ids;  // [t, k + n]; -1 where gated
    View<float, 2> weights;     // [t, k + n]
};

// Queries, keys and values of a layer's input.
template <class T>
[[nodiscard]] Status attention_inputs(const Attention& layer, const InputArgs<T>& args,
                                      int threads) noexcept;

// From what attention gives to what the experts take.
template <class T>
[[nodiscard]] Status expert_inputs(const Attention& layer, const Router& router,
                                   const OutputArgs<T>& args, Counts& counts, int threads) noexcept;

// out[t] = norm(hidden[t] + add[t]); `add` may be absent, and hidden stays as it is.
[[nodiscard]] Status final_norm(const RmsNorm& norm, View<const float, 2> hidden,
                                View<const float, 2> add, View<float, 2> out, int threads) noexcept;

}  // namespace quernstone::moe
