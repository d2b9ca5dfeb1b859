#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// What the policies share: who is resident, who is in use, and queues of keys.
namespace quernstone::moe::cache {

using Key = std::int64_t;
inline constexpr Key kNone = -1;

template <class T>
T& at(std::vector<T>& x, Key key) {
    return x[static_cast<std::size_t>(key)];
}

template <class T>
const T& at(const std::vector<T>& x, Key key) {
    return x[static_cast<std::size_t>(key)];
}

class Residents {
   public:
    explicit Residents(std::int64_t keys)
        : place_(static_cast<std::size_t>(keys), kNone),
          step_(static_cast<std::size_t>(keys), kNone) {}

    [[nodiscard]] bool has(Key key) const { return at(place_, key) != kNone; }
    [[nodiscard]] bool in_use(Key key) const { return at(step_, key) == now_; }
    [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(members_.size()); }
    [[nodiscard]] const std::vector<Key>& members() const { return members_; }

    void begin_step(std::int64_t step) { now_ = step; }
    void use(Key key) { at(step_, key) = now_; }

    void add(Key key) {
        at(place_, key) = size();
        members_.push_back(key);
    }

    void remove(Key key) {
        const Key last = members_.back();
        at(members_, at(place_, key)) = last;
        at(place_, last) = at(place_, key);
        at(place_, key) = kNone;
        members_.pop_back();
    }

   private:
    std::vector<Key> place_;  // index in members_
    std::vector<std::int64_t> step_;
    std::vector<Key> members_;
    std::int64_t now_ = 0;
};

// Links of queues that share the keys: a key is in one of them at most.
class Links {
   public:
    explicit Links(std::int64_t keys)
        : before_(static_cast<std::size_t>(keys), kNone),
          after_(static_cast<std::size_t>(keys), kNone) {}

    std::vector<Key> before_, after_;
};

// Oldest first.
struct Queue {
    Key head = kNone, tail = kNone;
    std::int64_t size = 0;

    void push(Links& links, Key key) {
        at(links.before_, key) = tail;
        at(links.after_, key) = kNone;
        (tail == kNone ? head : at(links.after_, tail)) = key;
        tail = key;
        ++size;
    }

    void erase(Links& links, Key key) {
        const Key before = at(links.before_, key), after = at(links.after_, key);
        (before == kNone ? head : at(links.after_, before)) = after;
        (after == kNone ? tail : at(links.before_, after)) = before;
        --size;
    }

    // The oldest that may go, or kNone.
    [[nodiscard]] Key oldest(const Links& links, const Residents& residents) const {
        Key key = head;
        while (key != kNone && residents.in_use(key)) {
            key = at(links.after_, key);
        }
        return key;
    }
};

}  // namespace quernstone::moe::cache
