#include "attention/attention.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <new>

#include "attention/block.h"
#include "attention/problem.h"
#include "common/cpu.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace quernstone::attention {
namespace {

// A block's keys are copied once for all its rows; its rows stay in the L2 cache.
constexpr std::int64_t kRowsPerBlock = 256;
constexpr std::int64_t kStrip = 32;  // blocks are whole strips
constexpr float kNoSink = -std::numeric_limits<float>::infinity();

thread_local double last_seconds = 0.0;

template <class T>
const Kernels& kernels() noexcept {
    constexpr bool wide = sizeof(T) == sizeof(float);
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kAvx512Amx:
        case Isa::kAvx512Bf16Vnni:
            return wide ? avx512::kF32 : avx512_bf16_vnni::kBf16;
        case Isa::kAvx512:
            return wide ? avx512::kF32 : avx512::kBf16;
        case Isa::kAvx2:
            return wide ? avx2::kF32 : avx2::kBf16;
        case Isa::kBaseline:
            break;
    }
#endif
    return wide ? baseline::kF32 : baseline::kBf16;
}

// The work of one call: blocks of query rows, longest first where causal.
template <class T>
class Forward {
   public:
    Forward(const ForwardArgs<T>& args, const Extents& e, int threads) noexcept
        : a_(args),
          e_(e),
          group_(e.h / e.g),
          rows_(group_ * e.t),
          threads_(threads),
          per_block_(pick_rows_per_block()),
          blocks_((rows_ + per_block_ - 1) / per_block_),
          strips_((rows_ + kStrip - 1) / kStrip),
          windowed_(args.window > 0 && args.window < e.s),
          kernel_(pick()),
          // The vanilla gate asks for the first key apart; plain attention does not.
          first_key_apart_(args.kind == Kind::kVanilla &&
                           (args.importance.present() || args.gate_logit.present())) {}

    [[nodiscard]] Status run() noexcept {
        const std::int64_t tasks = e_.b * e_.g * blocks_;
        if (a_.importance.present()) {
            const std::int64_t count = e_.b * e_.g * strips_ * group_;
            shares_.reset(new (std::nothrow) double[static_cast<std::size_t>(count)]());
            if (!shares_) {
                return no_memory("importance", count * std::int64_t{sizeof(double)});
            }
        }
        std::atomic<bool> starved{false};
        parallel_for(tasks, threads_, [&](std::int64_t i) noexcept {
            // Causal blocks get shorter towards the first: longest first. Windows are
            // all alike, and neighbours share keys: one after the other.
            const std::int64_t heads = e_.b * e_.g;
            const bool done = windowed_ ? run_block(i / blocks_, i % blocks_)
                                        : run_block(i % heads, blocks_ - 1 - i / heads);
            if (!done) {
                starved.store(true, std::memory_order_relaxed);
            }
        });
        if (starved.load()) {
            return no_memory("workspace",
                             static_cast<std::int64_t>(kernel_.scratch_bytes(per_block_, e_.d)));
        }
        if (a_.importance.present()) {
            reduce_importance();
        }
        return {};
    }

   private:
    // Enough blocks that no thread waits long for another at the end. Rows do
    // not depend on one another, so neither do results on this.
    [[nodiscard]] std::int64_t pick_rows_per_block() const noexcept {
        if (threads_ <= 1) {
            return kRowsPerBlock;
        }
        const std::int64_t share = e_.b * e_.g * rows_ / (std::int64_t{8} * threads_);
        return std::clamp(share / kStrip * kStrip, kStrip, kRowsPerBlock);
    }

    [[nodiscard]] const Kernel& pick() const noexcept {
        const Kernels& all = kernels<T>();
        const bool few = rows_ <= all.narrow.lanes;
        const bool thin =
            windowed_ && a_.window < 16 * all.wide.lanes && all.wide.lanes > 16 && group_ == 1;
        return few || thin ? all.narrow : all.wide;
    }

    [[nodiscard]] bool run_block(std::int64_t bg, std::int64_t block_index) noexcept {
        const std::int64_t b = bg / e_.g;
        const std::int64_t g = bg % e_.g;
        const std::int64_t begin = block_index * per_block_;
        const std::int64_t count = std::min(per_block_, rows_ - begin);
        std::byte* scratch = Scratch::of_this_thread().reserve(kernel_.scratch_bytes(count, e_.d));
        if (scratch == nullptr) {
            return false;
        }
        Row rows[kRowsPerBlock];
        float gates[kRowsPerBlock];
        const Visibility<T> visible(a_, e_, b);
        std::int64_t t = begin / group_;
        std::int64_t head = begin % group_;
        Row next = row(b, g * group_ + head, t);
        for (std::int64_t r = 0; r < count; ++r) {
            rows[r] = next;
            see(rows[r], visible, t);
            head = head + 1 == group_ ? 0 : head + 1;
            t += head == 0 ? 1 : 0;
            if (r + 1 < count && group_ == 1) {
                step(next);
            } else if (r + 1 < count) {
                next = row(b, g * group_ + head, t);
            }
        }
        Block block{};
        block.rows = rows;
        block.gates = a_.importance.present() ? gates : nullptr;
        block.row_count = count;
        block.k = a_.k.at(b, g, 0, 0);
        block.v = a_.v.at(b, g, 0, 0);
        block.q_col = a_.q.stride[3];
        block.k_row = a_.k.stride[2];
        block.k_col = a_.k.stride[3];
        block.v_row = a_.v.stride[2];
        block.v_col = a_.v.stride[3];
        block.gate_col = a_.gate.stride[3];
        block.width = e_.d;
        // By the window alone, so that a row's bits do not depend on the length of the call.
        const bool few = a_.window > 0 && a_.window <= kWindowBlockKeys;
        block.block_keys = few ? kWindowBlockKeys : kBlockKeys;
        block.scale = a_.scale;
        block.gate = a_.kind != Kind::kGated  ? GateShape::kNone
                     : a_.gate.extent[3] == 1 ? GateShape::kPerRow
                                              : GateShape::kPerElement;
        block.first_key =
            first_key_apart_ && e_.s > 0 && visible.first() < e_.s ? visible.first() : -1;
        kernel_.run(block, scratch);
        if (a_.importance.present()) {
            t = begin / group_;
            head = begin % group_;
            for (std::int64_t r = 0; r < count; ++r) {
                if (counts(b, t, rows[r])) {
                    share(bg, (begin + r) / kStrip, head) += static_cast<double>(gates[r]);
                }
                head = head + 1 == group_ ? 0 : head + 1;
                t += head == 0 ? 1 : 0;
            }
        }
        return true;
    }

    [[nodiscard]] Row row(std::int64_t b, std::int64_t h, std::int64_t t) const noexcept {
        Row r{};
        r.q = a_.q.at(b, h, t, 0);
        r.gate = a_.gate.present() ? a_.gate.at(b, h, t, 0) : nullptr;
        r.out = a_.out.at(b, h, t, 0);
        r.lse = a_.lse.present() ? a_.lse.at(b, h, t) : nullptr;
        r.gate_logit = a_.gate_logit.present() ? a_.gate_logit.at(b, h, t) : nullptr;
        if (r.gate_logit != nullptr) {
            *r.gate_logit = -kNoSink;  // unless the first key is seen to
        }
        r.sink = a_.sinks.present() ? *a_.sinks.at(h) : kNoSink;
        return r;
    }

    // To the next query of the same head.
    void step(Row& r) const noexcept {
        r.q = static_cast<const T*>(r.q) + a_.q.stride[2];
        r.gate = r.gate != nullptr ? static_cast<const T*>(r.gate) + a_.gate.stride[2] : nullptr;
        r.out = static_cast<T*>(r.out) + a_.out.stride[2];
        r.lse = r.lse != nullptr ? r.lse + a_.lse.stride[2] : nullptr;
        if (r.gate_logit != nullptr) {
            r.gate_logit += a_.gate_logit.stride[2];
            *r.gate_logit = -kNoSink;
        }
    }

    void see(Row& r, const Visibility<T>& visible, std::int64_t t) const noexcept {
        const Range range = visible.of(t);
        r.lo = range.lo;
        r.hi = range.hi;
        if (first_key_apart_) {
            r.sees_first = r.lo <= visible.first() && visible.first() < r.hi;
            r.lo = std::max(r.lo, visible.after_first());
        }
    }

    // Sum of the gates of one head in one strip: strips, unlike blocks, do not
    // depend on the number of threads, so the order of summation does not either.
    [[nodiscard]] double& share(std::int64_t bg, std::int64_t strip,
                                std::int64_t head) const noexcept {
        return shares_[static_cast<std::size_t>((bg * strips_ + strip) * group_ + head)];
    }

    // A token whose gate nobody can tell (it sees no key, or none beside the
    // first) is not part of the mean.
    [[nodiscard]] bool counts(std::int64_t b, std::int64_t t, const Row& r) const noexcept {
        return r.lo < r.hi && (!a_.token_mask.present() || *a_.token_mask.at(b, t) != 0);
    }

    void reduce_importance() const noexcept {
        std::int64_t counted = 0;
        for (std::int64_t b = 0; b < e_.b; ++b) {
            const Visibility<T> visible(a_, e_, b);
            for (std::int64_t t = 0; t < e_.t; ++t) {
                Row r{};
                const Range range = visible.of(t);
                r.lo = first_key_apart_ ? std::max(range.lo, visible.after_first()) : range.lo;
                r.hi = range.hi;
                counted += counts(b, t, r) ? 1 : 0;
            }
        }
        for (std::int64_t h = 0; h < e_.h; ++h) {
            double sum = 0.0;
            for (std::int64_t b = 0; b < e_.b; ++b) {
                for (std::int64_t i = 0; i < strips_; ++i) {
                    sum += share(b * e_.g + h / group_, i, h % group_);
                }
            }
            *a_.importance.at(h) =
                counted == 0 ? 0.0F : static_cast<float>(sum / static_cast<double>(counted));
        }
    }

    const ForwardArgs<T>& a_;
    Extents e_;
    std::int64_t group_, rows_;  // rows of one key head: group x t, query-major
    int threads_;
    std::int64_t per_block_, blocks_, strips_;
    bool windowed_;
    const Kernel& kernel_;
    bool first_key_apart_;
    std::unique_ptr<double[]> shares_;  // [b, g, strip, head of the group]
};

}  // namespace

template <class T>
Status forward(const ForwardArgs<T>& args, int threads) noexcept {
    const auto start = std::chrono::steady_clock::now();
    const Extents e = extents(args);
    QS_TRY(check(args, e));
    const Status status = Forward<T>(args, e, threads).run();
    last_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return status;
}

template Status forward(const ForwardArgs<float>&, int) noexcept;
template Status forward(const ForwardArgs<bf16>&, int) noexcept;

double last_forward_seconds() noexcept { return last_seconds; }

}  // namespace quernstone::attention
