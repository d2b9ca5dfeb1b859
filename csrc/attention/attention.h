#pragma once

#include <cstdint>

#include "common/bf16.h"
#include "common/status.h"
#include "common/view.h"

// Scaled dot-product attention on the CPU with the gates of "Attention Sink
// Forges Native MoE in Attention Layers" (arXiv 2602.01203). See README.md.
//
// Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
namespace quernstone::attention {

inline constexpr std::int64_t kMinWidth = 16;
inline constexpr std::int64_t kMaxWidth = 256;

enum class Kind : std::uint8_t { kSink, kVanilla, kGated };

template <class T>  // float or bf16; sums are fp32 either way
struct ForwardArgs {
    View<const T, 4> q;     // [b, h, t, d]
    View<const T, 4> k, v;  // [b, g, s, d], h % g == 0
    Kind kind = Kind::kSink;
    View<const float, 1> sinks;  // [h] logit of a key with no value; kSink only
    View<const T, 4> gate;       // [b, h, t, 1 or d] logits; kGated only
    bool causal = true;          // query i sees keys j <= i + s - t
    std::int64_t window = 0;     // keys a query sees up to its own position; 0: all
    float scale = 1.0F;
    View<const std::int64_t, 1> key_start;    // [b] first visible key; may be absent
    View<const std::int64_t, 1> key_lengths;  // [b] end of the visible keys; may be absent

    View<T, 4> out;                          // [b, h, t, d], contiguous
    View<float, 3> lse;                      // [b, h, t] nats, the sink left out; may be absent
    View<const std::uint8_t, 2> token_mask;  // [b, t] not 0: counts; absent: all
    View<float, 1> importance;               // [h] mean gate; may be absent
    // [b, h, t] logit of the vanilla gate, for backward(); may be absent
    View<float, 3> gate_logit;
};

// Checks every extent before reading memory. A row with no visible key gives
// out = 0, gate = 0 and lse = -inf. A row's result depends on that row alone:
// not on the number of threads, the other rows of the call, or t.
template <class T>
[[nodiscard]] Status forward(const ForwardArgs<T>& args, int threads) noexcept;

template <class T>
struct BackwardArgs {
    // As forward() left it: lse present, importance absent; gate_logit present
    // where the kind is vanilla and dimportance is.
    ForwardArgs<T> forward;
    View<const T, 4> dout;             // [b, h, t, d]
    View<const float, 3> dlse;         // [b, h, t]; may be absent
    View<const float, 1> dimportance;  // [h]; may be absent
    View<T, 4> dq, dk, dv;             // as q, k, v; contiguous
    View<float, 1> dsinks;             // [h]; kSink only
    View<T, 4> dgate;                  // as gate, contiguous; kGated only
};

// One pass over the scores; the gates add a few numbers a row. Results do not
// depend on the number of threads.
template <class T>
[[nodiscard]] Status backward(const BackwardArgs<T>& args, int threads) noexcept;

// Seconds that the last forward() on this thread took, checks included.
[[nodiscard]] double last_forward_seconds() noexcept;

}  // namespace quernstone::attention
