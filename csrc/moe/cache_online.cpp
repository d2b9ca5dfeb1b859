#include "moe/cache_online.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "moe/cache_lists.h"
#include "moe/cache_reuse.h"
#include "moe/cache_scored.h"

namespace quernstone::moe::cache {
namespace {

constexpr double kFloor = 0.1;  // of a score in shares of the uniform one, as in reuse.py

template <class P>
class Online final : public OnlineCache {
   public:
    Online(Policy policy, std::int64_t slots, std::int64_t keys)
        : args_(arguments(policy, slots, keys)),
          row_(static_cast<std::size_t>(keys), 0.0),
          residents_(keys),
          policy_(with_row(), residents_) {}

    void begin(std::span<const Key> needed, View<const float, 2> scores,
               std::int64_t top_k) override {
        needed_.assign(needed.begin(), needed.end());
        offsets_[1] = static_cast<std::int64_t>(needed_.size());
        args_.base = step_;
        args_.needed = needed_;
        if (needs_scores(args_.policy)) {
            read(scores, top_k);
        }
        residents_.begin_step(++epoch_);
        for (const Key key : needed_) {
            residents_.use(key);
        }
        policy_.begin(step_++);
        for (const Key key : needed_) {
            if (residents_.has(key)) {
                policy_.touch(key);
            }
        }
    }

    void release() override { residents_.begin_step(++epoch_); }

    bool take(Key key, Key& victim) override {
        victim = kNone;
        const bool full = residents_.size() >= args_.slots;
        const auto& members = residents_.members();
        if (full && std::all_of(members.begin(), members.end(),
                                [this](Key x) { return residents_.in_use(x); })) {
            return false;
        }
        policy_.miss(key);
        if (full) {
            victim = policy_.victim(key);
            residents_.remove(victim);
        }
        residents_.add(key);
        residents_.use(key);
        policy_.admit(key);
        return true;
    }

    void forget(Key key) override {
        residents_.remove(key);
        policy_.forget(key);
    }

    [[nodiscard]] bool has(Key key) const override { return residents_.has(key); }

   private:
    ReplayArgs arguments(Policy policy, std::int64_t slots, std::int64_t keys) {
        ReplayArgs args;
        args.policy = policy;
        args.slots = std::min(slots, keys);
        args.keys = keys;
        args.offsets = offsets_;
        args.first = first_;
        return args;
    }

    const ReplayArgs& with_row() {
        const auto count = static_cast<std::int64_t>(row_.size());
        args_.scores = {row_.data(), {1, count}, {count, 1}};
        return args_;
    }

    // What the policy makes of a step's scores: the mean over tokens, of the largest or of all.
    void read(View<const float, 2> scores, std::int64_t top_k) {
        std::fill(row_.begin(), row_.end(), 0.0);
        const auto experts = static_cast<std::int64_t>(row_.size());
        const std::int64_t keep =
            args_.policy == Policy::kMrs ? std::min(2 * top_k, experts) : experts;
        const auto tokens = static_cast<double>(scores.extent[0]);
        for (std::int64_t t = 0; t < scores.extent[0]; ++t) {
            if (keep == experts) {
                for (std::int64_t e = 0; e < experts; ++e) {
                    at(row_, e) += static_cast<double>(*scores.at(t, e));
                }
                continue;
            }
            order_.resize(static_cast<std::size_t>(experts));
            for (std::int64_t e = 0; e < experts; ++e) {
                at(order_, e) = e;
            }
            std::partial_sort(order_.begin(), order_.begin() + keep, order_.end(),
                              [&](Key a, Key b) {
                                  const float x = *scores.at(t, a), y = *scores.at(t, b);
                                  return x != y ? x > y : a < b;
                              });
            for (std::int64_t i = 0; i < keep; ++i) {
                at(row_, at(order_, i)) += static_cast<double>(*scores.at(t, at(order_, i)));
            }
        }
        for (double& value : row_) {
            value /= std::max(tokens, 1.0);
            if (args_.policy == Policy::kReuse) {
                value = std::log(static_cast<double>(experts) * value + kFloor);
            }
        }
    }

    std::array<std::int64_t, 2> offsets_{};
    std::array<std::int64_t, 1> first_{};
    std::vector<Key> needed_, order_;
    ReplayArgs args_;
    std::vector<double> row_;
    Residents residents_;
    P policy_;
    std::int64_t step_ = 0, epoch_ = 0;
};

template <class P>
std::unique_ptr<OnlineCache> make(Policy policy, std::int64_t slots, std::int64_t keys) {
    return std::make_unique<Online<P>>(policy, slots, keys);
}

}  // namespace

std::unique_ptr<OnlineCache> make_online(Policy policy, std::int64_t slots, std::int64_t keys) {
    switch (policy) {
        case Policy::kLru:
            return make<Lru>(policy, slots, keys);
        case Policy::kLfu:
            return make<Scored<Frequency>>(policy, slots, keys);
        case Policy::kLfru:
            return make<Scored<FrequencyByAge>>(policy, slots, keys);
        case Policy::kS3Fifo:
            return make<S3Fifo>(policy, slots, keys);
        case Policy::kArc:
            return make<Arc>(policy, slots, keys);
        case Policy::kMrs:
            return make<Scored<RecentScore>>(policy, slots, keys);
        case Policy::kReuse:
        case Policy::kBelady:
            return make<Scored<Reuse>>(policy, slots, keys);
    }
    return nullptr;
}

}  // namespace quernstone::moe::cache
