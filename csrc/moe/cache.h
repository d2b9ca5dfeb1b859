#pragma once

#include <cstdint>
#include <span>

#include "common/status.h"
#include "common/view.h"

// Caches of experts replayed on a routing trace: the fast twin of the classes
// in quernstone/moe/cache, which say what each policy does. Hit for hit the
// same: both add and multiply doubles in the same order.
//
// Axes: n requests (an expert that a step needs), s steps, e experts of a layer.
namespace quernstone::moe::cache {

enum class Policy : std::uint8_t { kLru, kLfu, kLfru, kS3Fifo, kArc, kMrs, kReuse, kBelady };

struct ReplayArgs {
    Policy policy = Policy::kLru;
    std::int64_t base = 0;  // number of the first step; replay takes no other
    std::int64_t slots = 0;
    std::int64_t keys = 0;                  // keys are 0 to keys - 1
    std::span<const std::int64_t> needed;   // [n] keys, each once in a step
    std::span<const std::int64_t> offsets;  // [s + 1] step i is needed[offsets[i], offsets[i + 1])
    std::span<const std::int64_t> first;    // [s] key of the step's expert 0
    // [s, e] what the policy makes of the router's scores; kMrs: the reduced
    // TopP, kReuse: the logs. Absent for the others.
    View<const double, 2> scores;
    std::span<const std::int64_t> next;  // [n] next step of the same key, or s; kBelady only

    bool remember = true;          // kLfu
    std::int64_t halve_every = 0;  // kLfu; 0: never
    double alpha = 0.5;            // kMrs

    std::span<std::uint8_t> hit;  // [n] 1 where the expert was resident, else 0
};

// Runs the steps through a cache that is empty at first. Checks extents and
// keys before it reads by them.
[[nodiscard]] Status replay(const ReplayArgs& args) noexcept;

}  // namespace quernstone::moe::cache
