#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention/attention.h"

// What the forward and the backward driver share: extents, their checks, and
// which keys a query sees.
namespace quernstone::attention {

inline constexpr std::int64_t kMaxKeys = std::numeric_limits<std::int32_t>::max();
inline constexpr std::int64_t kNoWindow = 4 * kMaxKeys;  // beyond every position, no overflow

struct Extents {
    std::int64_t b, h, g, t, s, d;
};

template <class T>
Extents extents(const ForwardArgs<T>& a) noexcept {
    return {a.q.extent[0], a.q.extent[1], a.k.extent[1],
            a.q.extent[2], a.k.extent[2], a.q.extent[3]};
}

inline Status same(const char* what, std::int64_t got, const char* want,
                   std::int64_t number) noexcept {
    return got == number ? Status{} : invalid(what, got, want, number);
}

inline Status check_positions(const View<const std::int64_t, 1>& view, const char* shape,
                              const char* value, const Extents& e) noexcept {
    if (!view.present()) {
        return {};
    }
    QS_TRY(same(shape, view.extent[0], "the batch size", e.b));
    for (std::int64_t b = 0; b < e.b; ++b) {
        const std::int64_t x = *view.at(b);
        if (x < 0 || x > e.s) {
            return invalid(value, x, "0 <= value <= key count", e.s);
        }
    }
    return {};
}

template <class T>
Status check(const ForwardArgs<T>& a, const Extents& e) noexcept {
    QS_TRY(same("k.shape[0] (batch)", a.k.extent[0], "q.shape[0] =", e.b));
    QS_TRY(same("v.shape[0] (batch)", a.v.extent[0], "q.shape[0] =", e.b));
    QS_TRY(same("v.shape[1] (heads)", a.v.extent[1], "k.shape[1] =", e.g));
    QS_TRY(same("v.shape[2] (keys)", a.v.extent[2], "k.shape[2] =", e.s));
    QS_TRY(same("k.shape[3] (head width)", a.k.extent[3], "q.shape[3] =", e.d));
    QS_TRY(same("v.shape[3] (head width)", a.v.extent[3], "q.shape[3] =", e.d));
    if (e.d < kMinWidth || e.d > kMaxWidth) {
        return invalid("q.shape[3] (head width)", e.d, "16 to 256");
    }
    if (e.g == 0 || e.h % e.g != 0 || e.h == 0) {
        return invalid("q.shape[1] (query heads)", e.h, "a positive multiple of k.shape[1] =", e.g);
    }
    if (e.s > kMaxKeys || e.t > kMaxKeys) {
        return invalid("q.shape[2] or k.shape[2]", std::max(e.s, e.t), "at most", kMaxKeys);
    }
    if (!std::isfinite(a.scale)) {
        return invalid("scale",
                       std::isnan(a.scale) ? "nan"
                       : a.scale > 0       ? "inf"
                                           : "-inf",
                       "a finite number");
    }
    if (a.window < 0) {
        return invalid("window", a.window, "at least 1");
    }
    if (a.kind == Kind::kSink) {
        if (!a.sinks.present()) {
            return invalid("sinks", "None", "a tensor [h] for kind 'sink'");
        }
        QS_TRY(same("sinks.shape[0]", a.sinks.extent[0], "q.shape[1] =", e.h));
    } else if (a.sinks.present()) {
        return invalid("sinks", "a tensor", "None unless kind is 'sink'");
    }
    if (a.kind == Kind::kGated) {
        if (!a.gate.present()) {
            return invalid("gate", "None", "logits [b, h, t] or [b, h, t, d] for kind 'gated'");
        }
        QS_TRY(same("gate.shape[0] (batch)", a.gate.extent[0], "q.shape[0] =", e.b));
        QS_TRY(same("gate.shape[1] (heads)", a.gate.extent[1], "q.shape[1] =", e.h));
        QS_TRY(same("gate.shape[2] (queries)", a.gate.extent[2], "q.shape[2] =", e.t));
        if (a.gate.extent[3] != 1) {
            QS_TRY(same("gate.shape[3] (head width)", a.gate.extent[3], "q.shape[3] =", e.d));
        }
    } else if (a.gate.present()) {
        return invalid("gate", "a tensor", "None unless kind is 'gated'");
    }
    QS_TRY(check_positions(a.key_start, "key_start.shape[0]", "key_start", e));
    QS_TRY(check_positions(a.key_lengths, "key_lengths.shape[0]", "key_lengths", e));
    if (a.token_mask.present()) {
        QS_TRY(same("token_mask.shape[0] (batch)", a.token_mask.extent[0], "q.shape[0] =", e.b));
        QS_TRY(same("token_mask.shape[1] (queries)", a.token_mask.extent[1], "q.shape[2] =", e.t));
    }
    return {};
}

struct Range {
    std::int32_t lo, hi;
};

// Keys that query t of batch b sees.
template <class T>
class Visibility {
   public:
    Visibility(const ForwardArgs<T>& a, const Extents& e, std::int64_t b) noexcept
        : start_(a.key_start.present() ? *a.key_start.at(b) : 0),
          length_(a.key_lengths.present() ? *a.key_lengths.at(b) : e.s),
          offset_(e.s - e.t),
          window_(a.window == 0 ? kNoWindow : std::min(a.window, kNoWindow)),
          causal_(a.causal) {}

    [[nodiscard]] Range of(std::int64_t t) const noexcept {
        const std::int64_t p = t + offset_;
        const std::int64_t lo = std::max(start_, p - window_ + 1);
        const std::int64_t hi = std::min(length_, causal_ ? p + 1 : p + window_);
        return {static_cast<std::int32_t>(std::min(lo, kMaxKeys)),
                static_cast<std::int32_t>(std::max(hi, std::int64_t{0}))};
    }

    [[nodiscard]] std::int32_t first() const noexcept { return static_cast<std::int32_t>(start_); }
    [[nodiscard]] std::int32_t after_first() const noexcept {
        return static_cast<std::int32_t>(std::min(start_ + 1, kMaxKeys));
    }

   private:
    std::int64_t start_, length_, offset_, window_;
    bool causal_;
};

}  // namespace quernstone::attention
