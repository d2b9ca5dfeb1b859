#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "moe/cache.h"
#include "moe/cache_residents.h"

// LRU, S3-FIFO and ARC. A policy is told of every step (begin), use (touch) and
// load (miss, then victim where the cache is full, then admit), and of a load that is given up
// (forget).
namespace quernstone::moe::cache {

class Lru {
   public:
    Lru(const ReplayArgs& args, const Residents& residents)
        : residents_(residents), links_(args.keys) {}

    void begin(std::int64_t /*step*/) {}
    void touch(Key key) {
        queue_.erase(links_, key);
        queue_.push(links_, key);
    }
    void miss(Key /*key*/) {}
    void admit(Key key) { queue_.push(links_, key); }
    void forget(Key key) { queue_.erase(links_, key); }
    Key victim(Key /*key*/) {
        const Key victim = queue_.oldest(links_, residents_);
        queue_.erase(links_, victim);
        return victim;
    }

   private:
    const Residents& residents_;
    Links links_;
    Queue queue_;
};

class S3Fifo {
   public:
    S3Fifo(const ReplayArgs& args, const Residents& residents)
        : residents_(residents),
          links_(args.keys),
          uses_(static_cast<std::size_t>(args.keys), 0),
          where_(static_cast<std::size_t>(args.keys), kNowhere),
          main_slots_(args.slots - std::max<std::int64_t>(1, args.slots / 10)),
          small_slots_(std::max<std::int64_t>(1, args.slots / 10)),
          most_ghosts_(args.slots * 9 / 10) {}

    void begin(std::int64_t /*step*/) {}
    void touch(Key key) { at(uses_, key) = std::min(at(uses_, key) + 1, 3); }
    void miss(Key key) {
        knew_it_ = at(where_, key) == kGhosts;
        if (knew_it_) {
            queues_[kGhosts].erase(links_, key);
            at(where_, key) = kNowhere;
        }
    }
    void admit(Key key) {
        const bool overflow = !evicting_ && queues_[kSmall].size >= small_slots_;
        put(knew_it_ || overflow ? kMain : kSmall, key, 0);
    }
    void forget(Key key) {
        queues_[at(where_, key)].erase(links_, key);
        at(where_, key) = kNowhere;
    }
    Key victim(Key /*key*/) {
        evicting_ = true;
        for (;;) {
            const bool main_first = queues_[kMain].size > main_slots_;
            Key victim = main_first ? victim_of_main() : victim_of_small();
            if (victim == kNone) {
                victim = main_first ? victim_of_small() : victim_of_main();
            }
            if (victim != kNone) {
                return victim;
            }
        }
    }

   private:
    enum Where : std::uint8_t { kSmall, kMain, kGhosts, kNowhere };

    void put(Where where, Key key, int uses) {
        queues_[where].push(links_, key);
        at(where_, key) = where;
        at(uses_, key) = uses;
    }

    Key take(Where where) {
        const Key key = queues_[where].oldest(links_, residents_);
        if (key != kNone) {
            queues_[where].erase(links_, key);
            at(where_, key) = kNowhere;
        }
        return key;
    }

    Key victim_of_small() {
        for (Key key = take(kSmall); key != kNone; key = take(kSmall)) {
            if (at(uses_, key) < 2) {
                bury(key);
                return key;
            }
            put(kMain, key, 0);
        }
        return kNone;
    }

    Key victim_of_main() {
        for (Key key = take(kMain); key != kNone; key = take(kMain)) {
            if (at(uses_, key) == 0) {
                return key;
            }
            put(kMain, key, at(uses_, key) - 1);
        }
        return kNone;
    }

    void bury(Key key) {
        if (most_ghosts_ == 0) {
            return;
        }
        Queue& ghosts = queues_[kGhosts];
        if (ghosts.size >= most_ghosts_) {
            const Key oldest = ghosts.head;
            ghosts.erase(links_, oldest);
            at(where_, oldest) = kNowhere;
        }
        put(kGhosts, key, 0);
    }

    const Residents& residents_;
    Links links_;
    std::vector<int> uses_;
    std::vector<Where> where_;
    Queue queues_[3];
    std::int64_t main_slots_, small_slots_, most_ghosts_;
    bool knew_it_ = false, evicting_ = false;
};

class Arc {
   public:
    Arc(const ReplayArgs& args, const Residents& residents)
        : residents_(residents),
          links_(args.keys),
          where_(static_cast<std::size_t>(args.keys), kNowhere),
          slots_(args.slots) {}

    void begin(std::int64_t /*step*/) {}
    void touch(Key key) {
        remove(key);
        put(kT2, key);
    }
    void miss(Key key) {
        const double b1 = size(kB1), b2 = size(kB2);
        if (at(where_, key) == kB1) {
            p_ = std::min(p_ + std::max(b2 / b1, 1.0), static_cast<double>(slots_));
        } else if (at(where_, key) == kB2) {
            p_ = std::max(p_ - std::max(b1 / b2, 1.0), 0.0);
        }
    }
    Key victim(Key key) {
        const double t1 = size(kT1);
        const bool from_t1 = t1 > p_ || (t1 == p_ && at(where_, key) == kB2);
        Where from = from_t1 ? kT1 : kT2;
        if (queues_[from].oldest(links_, residents_) == kNone) {
            from = from_t1 ? kT2 : kT1;
        }
        const Key victim = queues_[from].oldest(links_, residents_);
        remove(victim);
        put(from == kT1 ? kB1 : kB2, victim);
        return victim;
    }
    void admit(Key key) {
        const bool ghost = at(where_, key) != kNowhere;
        if (ghost) {
            remove(key);
        }
        put(ghost ? kT2 : kT1, key);
        while (queues_[kT1].size + queues_[kB1].size > slots_) {
            remove(queues_[kB1].head);
        }
        while (queues_[kT1].size + queues_[kB1].size + queues_[kT2].size + queues_[kB2].size >
               2 * slots_) {
            remove(queues_[kB2].head);
        }
    }
    void forget(Key key) { remove(key); }

   private:
    enum Where : std::uint8_t { kT1, kT2, kB1, kB2, kNowhere };

    [[nodiscard]] double size(Where where) const {
        return static_cast<double>(queues_[where].size);
    }
    void put(Where where, Key key) {
        queues_[where].push(links_, key);
        at(where_, key) = where;
    }
    void remove(Key key) {
        queues_[at(where_, key)].erase(links_, key);
        at(where_, key) = kNowhere;
    }

    const Residents& residents_;
    Links links_;
    std::vector<Where> where_;
    Queue queues_[4];
    std::int64_t slots_;
    double p_ = 0.0;
};

}  // namespace quernstone::moe::cache
