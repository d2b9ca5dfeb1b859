#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "moe/cache.h"
#include "moe/cache_residents.h"

// LFU, LFRU, MRS and Belady, and the frame of all that value experts: the smallest value is evicted, among
// equals the one used or loaded longest ago.
namespace quernstone::moe::cache {

template <class Value>
class Scored {
   public:
    Scored(const ReplayArgs& args, const Residents& residents)
        : value_(args), residents_(residents), last_(static_cast<std::size_t>(args.keys), 0) {}

    void begin(std::int64_t step) { value_.begin(step); }
    void touch(Key key) {
        at(last_, key) = ticks_++;
        value_.touch(key);
    }
    void miss(Key /*key*/) {}
    void admit(Key key) {
        at(last_, key) = ticks_++;
        value_.admit(key);
    }
    void forget(Key /*key*/) {}
    Key victim(Key /*key*/) {
        Key victim = kNone;
        double least = 0.0;
        for (const Key key : residents_.members()) {
            if (residents_.in_use(key)) {
                continue;
            }
            const double value = value_(key);
            if (victim == kNone || value < least ||
                (value == least && at(last_, key) < at(last_, victim))) {
                victim = key;
                least = value;
            }
        }
        return victim;
    }

    // Of Belady: the keys of a step in the order of their next use.
    void sort_by_value(std::vector<Key>& keys) const {
        std::stable_sort(keys.begin(), keys.end(),
                         [this](Key a, Key b) { return value_(a) > value_(b); });
    }

   private:
    Value value_;
    const Residents& residents_;
    std::vector<std::int64_t> last_;  // in ticks
    std::int64_t ticks_ = 0;
};

inline std::span<const Key> keys_of(const ReplayArgs& args, std::int64_t step) {
    const auto row = static_cast<std::size_t>(step - args.base);
    const auto start = static_cast<std::size_t>(args.offsets[row]);
    const auto end = static_cast<std::size_t>(args.offsets[row + 1]);
    return args.needed.subspan(start, end - start);
}

class Frequency {
   public:
    explicit Frequency(const ReplayArgs& args)
        : args_(args), uses_(static_cast<std::size_t>(args.keys), 0.0) {}

    void begin(std::int64_t step) {
        if (args_.halve_every > 0 && step > 0 && step % args_.halve_every == 0) {
            for (double& uses : uses_) {
                uses /= 2.0;
            }
        }
        if (args_.remember) {
            for (const Key key : keys_of(args_, step)) {
                at(uses_, key) += 1.0;
            }
        }
    }
    void touch(Key key) { at(uses_, key) += args_.remember ? 0.0 : 1.0; }
    void admit(Key key) {
        if (!args_.remember) {
            at(uses_, key) = 1.0;
        }
    }
    double operator()(Key key) const { return at(uses_, key); }

   private:
    const ReplayArgs& args_;
    std::vector<double> uses_;
};

class FrequencyByAge {
   public:
    explicit FrequencyByAge(const ReplayArgs& args)
        : uses_(static_cast<std::size_t>(args.keys), 0), last_(uses_) {}

    void begin(std::int64_t step) { now_ = step; }
    void touch(Key key) {
        ++at(uses_, key);
        at(last_, key) = now_;
    }
    void admit(Key key) {
        at(uses_, key) = 1;
        at(last_, key) = now_;
    }
    double operator()(Key key) const {
        return static_cast<double>(at(uses_, key)) / static_cast<double>(now_ - at(last_, key) + 1);
    }

   private:
    std::vector<std::int64_t> uses_, last_;
    std::int64_t now_ = 0;
};

class RecentScore {
   public:
    explicit RecentScore(const ReplayArgs& args)
        : args_(args), score_(static_cast<std::size_t>(args.keys), 0.0) {}

    void begin(std::int64_t step) {
        const std::int64_t row = step - args_.base;
        const Key first = args_.first[static_cast<std::size_t>(row)];
        for (std::int64_t i = 0; i < args_.scores.extent[1]; ++i) {
            double& score = at(score_, first + i);
            score = args_.alpha * *args_.scores.at(row, i) + (1.0 - args_.alpha) * score;
        }
    }
    void touch(Key /*key*/) {}
    void admit(Key /*key*/) {}
    double operator()(Key key) const { return at(score_, key); }

   private:
    const ReplayArgs& args_;
    std::vector<double> score_;
};

class NextUse {
   public:
    explicit NextUse(const ReplayArgs& args)
        : args_(args), next_(static_cast<std::size_t>(args.keys), 0) {}

    void begin(std::int64_t step) {
        const std::int64_t start = args_.offsets[static_cast<std::size_t>(step)];
        std::int64_t i = start;
        for (const Key key : keys_of(args_, step)) {
            at(next_, key) = args_.next[static_cast<std::size_t>(i++)];
        }
    }
    void touch(Key /*key*/) {}
    void admit(Key /*key*/) {}
    double operator()(Key key) const { return -static_cast<double>(at(next_, key)); }

   private:
    const ReplayArgs& args_;
    std::vector<std::int64_t> next_;
};

}  // namespace quernstone::moe::cache
