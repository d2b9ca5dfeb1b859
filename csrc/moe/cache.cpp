#include "moe/cache.h"

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#include "moe/cache_lists.h"
#include "moe/cache_reuse.h"
#include "moe/cache_scored.h"

namespace quernstone::moe::cache {
namespace {

using Belady = Scored<NextUse>;

// After a step larger than the cache, those of its experts that are needed first are resident.
void keep_the_nearest(const ReplayArgs& args, std::int64_t step, Residents& residents,
                      Belady& policy) {
    const auto keys = keys_of(args, step);
    std::vector<Key> keep(keys.begin(), keys.end());
    policy.sort_by_value(keep);
    keep.resize(static_cast<std::size_t>(args.slots));
    while (residents.size() > 0) {
        residents.remove(residents.members().back());
    }
    for (const Key key : keep) {
        residents.add(key);
        policy.admit(key);
    }
}

template <class P>
void run(const ReplayArgs& args) {
    Residents residents(args.keys);
    P policy(args, residents);
    const auto steps = static_cast<std::int64_t>(args.first.size());
    for (std::int64_t step = 0; step < steps; ++step) {
        const auto keys = keys_of(args, step);
        residents.begin_step(step);
        std::uint8_t* hit =
            args.hit.data() + args.offsets[static_cast<std::size_t>(step)];  // of this step
        std::int64_t kept = 0;  // residents that are in use
        for (std::size_t i = 0; i < keys.size(); ++i) {
            residents.use(keys[i]);
            hit[i] = residents.has(keys[i]) ? 1 : 0;
            kept += hit[i];
        }
        policy.begin(step);
        if constexpr (std::is_same_v<P, Belady>) {
            if (static_cast<std::int64_t>(keys.size()) > args.slots) {
                keep_the_nearest(args, step, residents, policy);
                continue;
            }
        }
        for (std::size_t i = 0; i < keys.size(); ++i) {
            if (hit[i] != 0) {
                policy.touch(keys[i]);
                continue;
            }
            const bool full = residents.size() >= args.slots;
            if (full && residents.size() == kept) {
                continue;  // it streams through
            }
            policy.miss(keys[i]);
            if (full) {
                residents.remove(policy.victim(keys[i]));
            }
            residents.add(keys[i]);
            ++kept;
            policy.admit(keys[i]);
        }
    }
}

Status check(const ReplayArgs& args) {
    const auto requests = static_cast<std::int64_t>(args.needed.size());
    const auto steps = static_cast<std::int64_t>(args.first.size());
    if (args.slots < 0) {
        return invalid("slots", args.slots, "at least 0");
    }
    if (static_cast<std::int64_t>(args.offsets.size()) != steps + 1) {
        return invalid("offsets.shape[0]", static_cast<std::int64_t>(args.offsets.size()),
                       "one more than the steps,", steps);
    }
    if (static_cast<std::int64_t>(args.hit.size()) != requests) {
        return invalid("hit.shape[0]", static_cast<std::int64_t>(args.hit.size()),
                       "needed.shape[0] =", requests);
    }
    if (args.offsets.front() != 0 || args.offsets.back() != requests) {
        return invalid("offsets[-1]", args.offsets.back(), "from 0 to", requests);
    }
    for (std::size_t i = 1; i < args.offsets.size(); ++i) {
        if (args.offsets[i] < args.offsets[i - 1]) {
            return invalid("offsets", args.offsets[i], "at least", args.offsets[i - 1]);
        }
    }
    for (const Key key : args.needed) {
        if (key < 0 || key >= args.keys) {
            return invalid("needed", key, "0 or more and below", args.keys);
        }
    }
    if (args.policy == Policy::kBelady) {
        if (static_cast<std::int64_t>(args.next.size()) != requests) {
            return invalid("next.shape[0]", static_cast<std::int64_t>(args.next.size()),
                           "needed.shape[0] =", requests);
        }
    }
    if (args.policy == Policy::kMrs || args.policy == Policy::kReuse) {
        if (!args.scores.present() || args.scores.extent[0] != steps) {
            return invalid("scores.shape[0]", args.scores.extent[0], "the steps,", steps);
        }
        if (args.scores.extent[1] < 1) {
            return invalid("scores.shape[1]", args.scores.extent[1], "at least", 1);
        }
        for (const Key first : args.first) {
            // A layer's keys are one run of them: kReuse finds the layer by this.
            if (first < 0 || first % args.scores.extent[1] != 0 ||
                first + args.scores.extent[1] > args.keys) {
                return invalid("first", first, "a layer within keys =", args.keys);
            }
        }
    }
    return {};
}

// Each key once in a step, and where its scores are kReuse's, one of the layer.
Status check_steps(const ReplayArgs& args) {
    Residents seen(args.keys);
    for (std::size_t step = 0; step < args.first.size(); ++step) {
        seen.begin_step(static_cast<std::int64_t>(step));
        for (const Key key : keys_of(args, static_cast<std::int64_t>(step))) {
            if (seen.in_use(key)) {
                return invalid("needed", key, "each key once in a step");
            }
            seen.use(key);
            if (args.policy == Policy::kReuse &&
                (key < args.first[step] || key >= args.first[step] + args.scores.extent[1])) {
                return invalid("needed", key, "a key of the layer that begins at",
                               args.first[step]);
            }
        }
    }
    return {};
}

void dispatch(const ReplayArgs& args) {
    switch (args.policy) {
        case Policy::kLru:
            return run<Lru>(args);
        case Policy::kLfu:
            return run<Scored<Frequency>>(args);
        case Policy::kLfru:
            return run<Scored<FrequencyByAge>>(args);
        case Policy::kS3Fifo:
            return run<S3Fifo>(args);
        case Policy::kArc:
            return run<Arc>(args);
        case Policy::kMrs:
            return run<Scored<RecentScore>>(args);
        case Policy::kReuse:
            return run<Scored<Reuse>>(args);
        case Policy::kBelady:
            return run<Belady>(args);
    }
}

}  // namespace

Status replay(const ReplayArgs& args) noexcept {
    Status status = check(args);
    if (!status.ok()) {
        return status;
    }
    try {
        status = check_steps(args);
        if (status.ok()) {
            // More slots than keys are as many, and their double does not overflow.
            ReplayArgs bounded = args;
            bounded.slots = std::min(args.slots, args.keys);
            dispatch(bounded);
        }
        return status;
    } catch (const std::bad_alloc&) {
        return no_memory("replay", args.keys * static_cast<std::int64_t>(sizeof(Key)));
    }
}

}  // namespace quernstone::moe::cache
