#include <cstdint>
#include <vector>

#include "check.h"
#include "moe/cache.h"

using namespace quernstone;
using moe::cache::Policy;
using moe::cache::ReplayArgs;

namespace {

constexpr Policy kAll[] = {Policy::kLru, Policy::kLfu, Policy::kLfru,  Policy::kS3Fifo,
                           Policy::kArc, Policy::kMrs, Policy::kReuse, Policy::kBelady};

// Steps of keys below eight, with scores that prefer the needed.
struct Trace {
    explicit Trace(const std::vector<std::vector<std::int64_t>>& steps) : offsets{0} {
        for (const auto& step : steps) {
            needed.insert(needed.end(), step.begin(), step.end());
            offsets.push_back(static_cast<std::int64_t>(needed.size()));
            scores.insert(scores.end(), 8, 0.05);
            for (const std::int64_t key : step) {
                scores[scores.size() - 8 + static_cast<std::size_t>(key)] = 0.3;
            }
        }
        first.assign(steps.size(), 0);
        const auto count = static_cast<std::int64_t>(steps.size());
        next.assign(needed.size(), count);
        for (std::size_t i = 0; i < needed.size(); ++i) {
            for (std::size_t j = needed.size(); j-- > i + 1;) {
                if (needed[j] == needed[i]) {
                    next[i] = step_of(j);
                }
            }
        }
    }

    [[nodiscard]] std::int64_t step_of(std::size_t request) const {
        std::int64_t step = 0;
        while (offsets[static_cast<std::size_t>(step) + 1] <= static_cast<std::int64_t>(request)) {
            ++step;
        }
        return step;
    }

    Status replay(Policy policy, std::int64_t slots, std::vector<std::uint8_t>& hit) const {
        hit.assign(needed.size(), 7);
        ReplayArgs args;
        args.policy = policy;
        args.slots = slots;
        args.keys = 8;
        args.needed = needed;
        args.offsets = offsets;
        args.first = first;
        args.scores = {scores.data(), {static_cast<std::int64_t>(first.size()), 8}, {8, 1}};
        args.next = next;
        args.hit = hit;
        return moe::cache::replay(args);
    }

    std::vector<std::int64_t> needed, offsets, first, next;
    std::vector<double> scores;
};

// Pairs of keys that come back at different distances.
std::vector<std::vector<std::int64_t>> pairs() {
    std::vector<std::vector<std::int64_t>> steps;
    for (std::int64_t i = 0; i < 200; ++i) {
        steps.push_back({i % 3, 3 + (i * i) % 5});
    }
    return steps;
}

}  // namespace

TEST(a_cache_that_holds_everything_misses_each_expert_once) {
    const Trace trace(pairs());
    for (const Policy policy : kAll) {
        std::vector<std::uint8_t> hit;
        CHECK(trace.replay(policy, 8, hit).ok());
        std::vector<bool> seen(8, false);
        for (std::size_t i = 0; i < hit.size(); ++i) {
            const auto key = static_cast<std::size_t>(trace.needed[i]);
            CHECK_EQ(hit[i] == 1, seen[key]);
            seen[key] = true;
        }
    }
}

TEST(no_policy_hits_more_often_than_the_bound) {
    const Trace trace(pairs());
    for (std::int64_t slots = 0; slots <= 8; ++slots) {
        const auto hits = [&](Policy policy) {
            std::vector<std::uint8_t> hit;
            CHECK(trace.replay(policy, slots, hit).ok());
            int count = 0;
            for (const std::uint8_t one : hit) {
                CHECK(one <= 1);
                count += one;
            }
            return count;
        };
        const int bound = hits(Policy::kBelady);
        for (const Policy policy : kAll) {
            CHECK(hits(policy) <= bound);
        }
    }
}

TEST(lru_evicts_the_least_recently_used_that_the_step_does_not_need) {
    const Trace trace({{3, 1}, {0, 2}, {1}, {5}, {3}, {0}, {1}});
    std::vector<std::uint8_t> hit;
    CHECK(trace.replay(Policy::kLru, 4, hit).ok());
    CHECK(hit == (std::vector<std::uint8_t>{0, 0, 0, 0, 1, 0, 0, 0, 1}));
}

TEST(a_cache_refuses_a_key_that_does_not_exist) {
    Trace trace({{3, 1}});
    trace.needed[1] = 8;
    std::vector<std::uint8_t> hit;
    const Status status = trace.replay(Policy::kLru, 4, hit);
    CHECK(!status.ok());
    CHECK_EQ(status.got, 8);
    CHECK_EQ(status.want, 8);
}
