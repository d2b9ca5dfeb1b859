#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "attention/attention.h"
#include "attention/block.h"
#include "attention/problem.h"
#include "common/cpu.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace quernstone::attention {
namespace {

template <class T>
const GradKernel& grad_kernel() noexcept {
    constexpr bool wide = sizeof(T) == sizeof(float);
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kAvx512Amx:
        case Isa::kAvx512Bf16Vnni:
            return wide ? avx512::kGradF32 : avx512_bf16_vnni::kGradBf16;
        case Isa::kAvx512:
            return wide ? avx512::kGradF32 : avx512::kGradBf16;
        case Isa::kAvx2:
            return wide ? avx2::kGradF32 : avx2::kGradBf16;
        case Isa::kBaseline:
            break;
    }
#endif
    return wide ? baseline::kGradF32 : baseline::kGradBf16;
}

float as_float(float x) noexcept { return x; }
float as_float(bf16 x) noexcept {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float f = 0.0F;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

void put(float x, float& to) noexcept { to = x; }
void put(float x, bf16& to) noexcept {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    to.bits = static_cast<std::uint16_t>(x != x ? 0x7fc0U : rounded);
}

template <class T>
void put_row(const float* from, std::int64_t d, T* to) noexcept {
    for (std::int64_t i = 0; i < d; ++i) {
        put(from[i], to[i]);
    }
}

// sigmoid(x) and sigmoid(-x), each with all its digits
struct Gate {
    float open, shut;
};

template <class F>
Gate gate_of(F x) noexcept {
    const F e = std::exp(-std::abs(x));
    const F large = F{1} / (F{1} + e);
    const F small = e * large;
    return x < 0 ? Gate{static_cast<float>(small), static_cast<float>(large)}
                 : Gate{static_cast<float>(large), static_cast<float>(small)};
}

// The work of one call. `weigh` turns each row's gates and incoming gradients
// into three numbers; `part` then takes a range of rows beside a range of keys.
template <class T>
class Backward {
   public:
    Backward(const BackwardArgs<T>& args, const Extents& e, int threads) noexcept
        : a_(args),
          f_(args.forward),
          e_(e),
          group_(e.h / e.g),
          rows_(group_ * e.t),
          heads_(e.b * e.g),
          threads_(threads),
          kernel_(grad_kernel<T>()),
          chunks_((rows_ + kGradRows - 1) / kGradRows),
          key_blocks_((e.s + kGradKeys - 1) / kGradKeys),
          parts_(pick_parts()),
          padded_(kernel_.padded(e.d)) {}

    [[nodiscard]] Status run() noexcept {
        if (!reserve()) {
            return no_memory("workspace", e_.b * e_.h * e_.t * 16);
        }
        count_tokens();
        const std::int64_t strips = (e_.t + kStrip - 1) / kStrip;
        parallel_for(e_.b * e_.h * strips, threads_, [&](std::int64_t i) noexcept {
            weigh(i / strips / e_.h, i / strips % e_.h, i % strips, strips);
        });
        for (std::int64_t h = 0; a_.dsinks.present() && h < e_.h; ++h) {
            double sum = 0.0;
            for (std::int64_t b = 0; b < e_.b; ++b) {
                for (std::int64_t i = 0; i < strips; ++i) {
                    sum += sink_shares_[static_cast<std::size_t>((b * e_.h + h) * strips + i)];
                }
            }
            *a_.dsinks.at(h) = static_cast<float>(sum);
        }
        // Row part i meets key part i - step: each row meets its keys from last
        // to first, each key its rows from first to last, however many the parts.
        for (std::int64_t step = 1 - parts_; step < parts_; ++step) {
            const std::int64_t pairs = parts_ - std::abs(step);
            parallel_for(heads_ * pairs, threads_, [&](std::int64_t i) noexcept {
                const std::int64_t row_part = std::max(step, std::int64_t{0}) + i / heads_;
                part(i % heads_, row_part, row_part - step);
            });
        }
        if (starved_.load()) {
            return no_memory("workspace", static_cast<std::int64_t>(workspace_bytes()));
        }
        if (kRounds && parts_ > 1) {
            parallel_for(heads_, threads_, [&](std::int64_t i) noexcept { round(i); });
        }
        return {};
    }

   private:
    static constexpr bool kRounds = sizeof(T) < sizeof(float);
    static constexpr std::int64_t kStrip = 256;

    // One part a head where there are heads for all threads; else enough that
    // few threads wait at the end of a step.
    [[nodiscard]] std::int64_t pick_parts() const noexcept {
        if (threads_ <= 1 || heads_ >= 4 * threads_ || heads_ % threads_ == 0) {
            return 1;
        }
        const std::int64_t wanted = (std::int64_t{4} * threads_ + heads_ - 1) / heads_;
        return std::max<std::int64_t>(1, std::min({wanted, chunks_, key_blocks_}));
    }

    [[nodiscard]] std::size_t workspace_bytes() const noexcept {
        const std::int64_t dq = kRounds && parts_ == 1 ? rows_ * e_.d : 0;
        return (kernel_.scratch_bytes(e_.d) + 63) / 64 * 64 +
               static_cast<std::size_t>(2 * kGradKeys * padded_ + dq) * sizeof(float);
    }

    [[nodiscard]] bool reserve() noexcept {
        const std::int64_t rows = e_.b * e_.h * e_.t;
        const bool first = f_.gate_logit.present() && a_.dimportance.present();
        weights_ = floats((first ? 3 : 2) * rows);
        shifts_ = weights_.get() + rows;
        first_shifts_ = first ? shifts_ + rows : shifts_;
        bool ok = weights_ != nullptr;
        if (a_.dsinks.present()) {
            const std::int64_t strips = (e_.t + kStrip - 1) / kStrip;
            const auto n = static_cast<std::size_t>(e_.b * e_.h * strips);
            sink_shares_.reset(new (std::nothrow) double[n]());
            ok = ok && sink_shares_ != nullptr;
        }
        if (kRounds && parts_ > 1) {
            dq_ = floats(heads_ * rows_ * e_.d);
            dk_ = floats(heads_ * e_.s * e_.d);
            dv_ = floats(heads_ * e_.s * e_.d);
            ok = ok && dq_ && dk_ && dv_;
        }
        return ok;
    }

    static std::unique_ptr<float[]> floats(std::int64_t n) noexcept {
        return std::unique_ptr<float[]>(new (std::nothrow) float[static_cast<std::size_t>(n)]());
    }

    [[nodiscard]] bool counts(const Visibility<T>& visible, std::int64_t b,
                              std::int64_t t) const noexcept {
        const auto range = visible.of(t);
        const std::int32_t lo =
            f_.kind == Kind::kVanilla ? std::max(range.lo, visible.after_first()) : range.lo;
        return lo < range.hi && (!f_.token_mask.present() || *f_.token_mask.at(b, t) != 0);
    }

    void count_tokens() noexcept {
        for (std::int64_t b = 0; a_.dimportance.present() && b < e_.b; ++b) {
            const Visibility<T> visible(f_, e_, b);
            for (std::int64_t t = 0; t < e_.t; ++t) {
                tokens_ += counts(visible, b, t) ? 1 : 0;
            }
        }
    }

    [[nodiscard]] std::size_t index(std::int64_t b, std::int64_t h, std::int64_t t) const noexcept {
        return static_cast<std::size_t>((b * e_.h + h) * e_.t + t);
    }

    void weigh(std::int64_t b, std::int64_t h, std::int64_t strip, std::int64_t strips) noexcept {
        const Visibility<T> visible(f_, e_, b);
        const float dimportance = a_.dimportance.present() && tokens_ > 0
                                      ? *a_.dimportance.at(h) / static_cast<float>(tokens_)
                                      : 0.0F;
        double dsink = 0.0;
        const std::int64_t end = std::min((strip + 1) * kStrip, e_.t);
        for (std::int64_t t = strip * kStrip; t < end; ++t) {
            const auto range = visible.of(t);
            const bool blind = range.lo >= range.hi;
            const float dgate_mean =
                a_.dimportance.present() && counts(visible, b, t) ? dimportance : 0.0F;
            const float delta = blind ? 0.0F : dot(b, h, t);
            const float lse = blind ? 0.0F : *f_.lse.at(b, h, t);
            const float dlse = a_.dlse.present() && !blind ? *a_.dlse.at(b, h, t) : 0.0F;
            float& weight = weights_[index(b, h, t)];
            float& shift = shifts_[index(b, h, t)];
            float& first_shift = first_shifts_[index(b, h, t)];
            weight = 1.0F;
            shift = dlse - delta;
            if (f_.kind == Kind::kSink) {
                if (!blind) {
                    // Far from the logits a sink leaves few digits to an fp32 difference.
                    const Gate gate =
                        gate_of(static_cast<double>(lse) - static_cast<double>(*f_.sinks.at(h)));
                    weight = gate.open;
                    shift = dlse + gate.open * (gate.shut * dgate_mean - delta);
                    dsink -= static_cast<double>(gate.shut * (delta + gate.open * dgate_mean));
                }
            } else if (f_.kind == Kind::kGated) {
                weigh_gate(b, h, t, delta, blind, dgate_mean, weight);
            } else if (first_shifts_ != shifts_) {
                const Gate gate = gate_of(*f_.gate_logit.at(b, h, t));
                first_shift = shift - gate.open * dgate_mean;
                shift += gate.shut * dgate_mean;
            }
        }
        if (a_.dsinks.present()) {
            sink_shares_[static_cast<std::size_t>((b * e_.h + h) * strips + strip)] = dsink;
        }
    }

    // dgate of one row, and the weight of a gate that has one number a row
    void weigh_gate(std::int64_t b, std::int64_t h, std::int64_t t, float delta, bool blind,
                    float dgate_mean, float& weight) const noexcept {
        const std::int64_t width = f_.gate.extent[3];
        const T* gate = f_.gate.at(b, h, t, 0);
        T* dgate = a_.dgate.at(b, h, t, 0);
        if (width == 1) {
            const Gate g = gate_of(as_float(*gate));
            weight = g.open;
            put(blind ? 0.0F : g.shut * (delta + g.open * dgate_mean), *dgate);
            return;
        }
        if (blind) {
            std::fill_n(dgate, width, T{});
            return;
        }
        GateRow row{};
        row.gate = gate;
        row.out = f_.out.at(b, h, t, 0);
        row.dout = a_.dout.at(b, h, t, 0);
        row.dgate = dgate;
        row.gate_col = f_.gate.stride[3];
        row.out_col = f_.out.stride[3];
        row.dout_col = a_.dout.stride[3];
        row.width = width;
        row.mean = dgate_mean / static_cast<float>(width);
        kernel_.gate(row);
    }

    // dout . out
    [[nodiscard]] float dot(std::int64_t b, std::int64_t h, std::int64_t t) const noexcept {
        const T* x = f_.out.at(b, h, t, 0);
        const T* y = a_.dout.at(b, h, t, 0);
        const std::int64_t x_col = f_.out.stride[3];
        const std::int64_t y_col = a_.dout.stride[3];
        constexpr std::int64_t kChains = 16;
        float sums[kChains] = {};
        std::int64_t i = 0;
        for (; i + kChains <= e_.d; i += kChains) {
            for (std::int64_t c = 0; c < kChains; ++c) {
                sums[c] += as_float(x[(i + c) * x_col]) * as_float(y[(i + c) * y_col]);
            }
        }
        for (; i < e_.d; ++i) {
            sums[i % kChains] += as_float(x[i * x_col]) * as_float(y[i * y_col]);
        }
        double sum = 0.0;
        for (const float s : sums) {
            sum += static_cast<double>(s);
        }
        return static_cast<float>(sum);
    }

    void part(std::int64_t head, std::int64_t row_part, std::int64_t key_part) noexcept {
        std::byte* scratch = Scratch::of_this_thread().reserve(workspace_bytes());
        if (scratch == nullptr) {
            starved_.store(true, std::memory_order_relaxed);
            return;
        }
        auto* dk = reinterpret_cast<float*>(scratch + (kernel_.scratch_bytes(e_.d) + 63) / 64 * 64);
        float* dv = dk + kGradKeys * padded_;
        float* dq = dv + kGradKeys * padded_;
        const std::int64_t b = head / e_.g;
        const std::int64_t g = head % e_.g;
        if constexpr (kRounds) {
            if (parts_ > 1) {
                dq = dq_.get() + head * rows_ * e_.d;
            } else {
                std::fill_n(dq, rows_ * e_.d, 0.0F);
            }
        } else if (key_part == parts_ - 1) {
            for (std::int64_t c = chunks_ * row_part / parts_;
                 c < chunks_ * (row_part + 1) / parts_; ++c) {
                const std::int64_t end = std::min((c + 1) * kGradRows, rows_);
                for (std::int64_t r = c * kGradRows; r < end; ++r) {
                    std::fill_n(a_.dq.at(b, g * group_ + r % group_, r / group_, 0), e_.d, 0.0F);
                }
            }
        }
        const std::int64_t first_block = key_blocks_ * key_part / parts_;
        for (std::int64_t i = key_blocks_ * (key_part + 1) / parts_ - 1; i >= first_block; --i) {
            key_block(b, g, i, row_part, scratch, dq, dk, dv);
        }
        if constexpr (kRounds) {
            if (parts_ == 1) {
                round_queries(b, g, dq);
            }
        }
        Scratch::of_this_thread().release_large();
    }

    void key_block(std::int64_t b, std::int64_t g, std::int64_t index, std::int64_t row_part,
                   std::byte* scratch, float* dq, float* dk, float* dv) const noexcept {
        GradBlock block{};
        block.k = f_.k.at(b, g, 0, 0);
        block.v = f_.v.at(b, g, 0, 0);
        block.q_col = f_.q.stride[3];
        block.dout_col = a_.dout.stride[3];
        block.gate_col = f_.gate.stride[3];
        block.k_row = f_.k.stride[2];
        block.k_col = f_.k.stride[3];
        block.v_row = f_.v.stride[2];
        block.v_col = f_.v.stride[3];
        block.width = e_.d;
        block.begin = index * kGradKeys;
        block.end = std::min(block.begin + kGradKeys, e_.s);
        block.dk = dk;
        block.dv = dv;
        block.scale = f_.scale;
        const Visibility<T> visible(f_, e_, b);
        block.seen_begin = visible.of(0).lo;
        block.seen_end = visible.of(e_.t - 1).hi;
        block.first_key = first_shifts_ != shifts_ ? visible.first() : -1;
        const std::int64_t n = block.end - block.begin;
        if (row_part == 0) {
            std::fill_n(dk, n * padded_, 0.0F);
            std::fill_n(dv, n * padded_, 0.0F);
        } else {
            keys(b, g, block,
                 [&](float* sum, const float* kept) noexcept { std::copy_n(kept, e_.d, sum); });
        }
        kernel_.load(block, scratch);
        const std::int64_t last_chunk = chunks_ * (row_part + 1) / parts_;
        for (std::int64_t c = chunks_ * row_part / parts_; c < last_chunk; ++c) {
            const std::int64_t begin = c * kGradRows;
            const std::int64_t count = std::min(kGradRows, rows_ - begin);
            if (visible.of(begin / group_).lo >= block.end ||
                visible.of((begin + count - 1) / group_).hi <= block.begin) {
                continue;
            }
            GradRow rows[kGradRows];
            for (std::int64_t r = 0; r < count; ++r) {
                rows[r] = row(b, g, begin + r, visible, dq);
            }
            kernel_.rows(block, rows, count, scratch);
        }
        if (kRounds && parts_ == 1) {
            for (std::int64_t j = 0; j < n; ++j) {
                put_row(dk + j * padded_, e_.d, a_.dk.at(b, g, block.begin + j, 0));
                put_row(dv + j * padded_, e_.d, a_.dv.at(b, g, block.begin + j, 0));
            }
            return;
        }
        keys(b, g, block,
             [&](const float* sum, float* kept) noexcept { std::copy_n(sum, e_.d, kept); });
    }

    // f(sum in the block, where the sums of all parts are kept) for dk and dv of each key
    template <class F>
    void keys(std::int64_t b, std::int64_t g, const GradBlock& block, F&& f) const noexcept {
        for (std::int64_t j = block.begin; j < block.end; ++j) {
            const std::int64_t at = (j - block.begin) * padded_;
            f(block.dk + at, kept(a_.dk, dk_.get(), b, g, j));
            f(block.dv + at, kept(a_.dv, dv_.get(), b, g, j));
        }
    }

    float* kept(const View<T, 4>& out, float* sums, std::int64_t b, std::int64_t g,
                std::int64_t j) const noexcept {
        if constexpr (kRounds) {
            return sums + ((b * e_.g + g) * e_.s + j) * e_.d;
        } else {
            return out.at(b, g, j, 0);
        }
    }

    GradRow row(std::int64_t b, std::int64_t g, std::int64_t r, const Visibility<T>& visible,
                float* dq) const noexcept {
        const std::int64_t t = r / group_;
        const std::int64_t h = g * group_ + r % group_;
        const auto range = visible.of(t);
        GradRow out{};
        out.q = f_.q.at(b, h, t, 0);
        out.dout = a_.dout.at(b, h, t, 0);
        out.gate = f_.gate.present() && f_.gate.extent[3] != 1 ? f_.gate.at(b, h, t, 0) : nullptr;
        if constexpr (kRounds) {
            out.dq = dq + r * e_.d;
        } else {
            out.dq = a_.dq.at(b, h, t, 0);
        }
        out.lse = *f_.lse.at(b, h, t);
        const std::size_t i = index(b, h, t);
        out.weight = weights_[i];
        out.shift = shifts_[i];
        out.first_shift = first_shifts_[i];
        out.lo = range.lo;
        out.hi = range.hi;
        return out;
    }

    void round_queries(std::int64_t b, std::int64_t g, const float* dq) const noexcept {
        for (std::int64_t r = 0; r < rows_; ++r) {
            put_row(dq + r * e_.d, e_.d, a_.dq.at(b, g * group_ + r % group_, r / group_, 0));
        }
    }

    // The fp32 sums of one key head to the outputs.
    void round(std::int64_t head) const noexcept {
        const std::int64_t b = head / e_.g;
        const std::int64_t g = head % e_.g;
        round_queries(b, g, dq_.get() + head * rows_ * e_.d);
        for (std::int64_t j = 0; j < e_.s; ++j) {
            const std::int64_t at = (head * e_.s + j) * e_.d;
            put_row(dk_.get() + at, e_.d, a_.dk.at(b, g, j, 0));
            put_row(dv_.get() + at, e_.d, a_.dv.at(b, g, j, 0));
        }
    }

    const BackwardArgs<T>& a_;
    const ForwardArgs<T>& f_;
    Extents e_;
    std::int64_t group_, rows_;  // rows of one key head: group x t, query-major
    std::int64_t heads_;         // key heads of all batches
    int threads_;
    const GradKernel& kernel_;
    std::int64_t chunks_, key_blocks_, parts_, padded_;
    std::int64_t tokens_ = 0;
    std::unique_ptr<float[]> weights_;
    float* shifts_ = nullptr;
    float* first_shifts_ = nullptr;  // shifts_ where no key is special
    std::unique_ptr<double[]> sink_shares_;
    std::unique_ptr<float[]> dq_, dk_, dv_;  // [head][row or key][d], bf16 in parts only
    std::atomic<bool> starved_{false};
};

}  // namespace

template <class T>
Status backward(const BackwardArgs<T>& args, int threads) noexcept {
    const Extents e = extents(args.forward);
    QS_TRY(check(args.forward, e));
    return Backward<T>(args, e, threads).run();
}

template Status backward(const BackwardArgs<float>&, int) noexcept;
template Status backward(const BackwardArgs<bf16>&, int) noexcept;

}  // namespace quernstone::attention
