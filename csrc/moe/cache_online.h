#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "moe/cache.h"

// The same policies for a model that runs: the cache of one layer, a step at a time. What a step
// misses comes in where somebody loads it, and not by itself.
namespace quernstone::moe::cache {

class OnlineCache {
   public:
    virtual ~OnlineCache() = default;

    // A step begins: its keys stay resident until the next or `release`. `scores` is [t, e], the
    // router's, where the policy goes by them; a token has top_k experts.
    virtual void begin(std::span<const std::int64_t> needed, View<const float, 2> scores,
                       std::int64_t top_k) = 0;
    // The step is over: its experts may give way, those that were taken since not before the next.
    virtual void release() = 0;
    // Gives a slot to a key that has none. False where none may go; victim is -1 where one was free.
    [[nodiscard]] virtual bool take(std::int64_t key, std::int64_t& victim) = 0;
    // A key that was taken and not begun to be loaded gives its slot back.
    virtual void forget(std::int64_t key) = 0;
    [[nodiscard]] virtual bool has(std::int64_t key) const = 0;
};

[[nodiscard]] constexpr bool needs_scores(Policy policy) noexcept {
    return policy == Policy::kMrs || policy == Policy::kReuse;
}

// Of any policy but kBelady. Throws std::bad_alloc.
[[nodiscard]] std::unique_ptr<OnlineCache> make_online(Policy policy, std::int64_t slots,
                                                       std::int64_t keys);

}  // namespace quernstone::moe::cache
