#include "pim/booster.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

namespace quernstone::pim {
namespace {

constexpr std::int64_t kMostMacros = 4096;
// No work is done without end: a group that fails at its last level for so many cycles of work on
// average has a supply that does not carry it.
constexpr std::int64_t kMostCyclesEach = 64;
constexpr std::int64_t kMostPatience = std::int64_t{1} << 40;

using Index = std::size_t;

constexpr Index at(std::int64_t i) noexcept { return static_cast<Index>(i); }

Status check_numbers(std::span<const double> x, const char* what, double least) noexcept {
    for (const double value : x) {
        if (!std::isfinite(value) || value < least) {
            return invalid(what, "a number that is negative, zero or not finite",
                           "finite numbers in range");
        }
    }
    return {};
}

Status check_indices(std::span<const std::int64_t> x, std::int64_t count,
                     const char* what) noexcept {
    for (const std::int64_t value : x) {
        if (value < 0 || value >= count) {
            return invalid(what, value, "0 or more and below", count);
        }
    }
    return {};
}

Status check(const BoosterArgs& a) noexcept {
    const std::int64_t macros = a.dynamic.extent[1];
    const auto groups = static_cast<std::int64_t>(a.domain.size());
    const auto levels = static_cast<std::int64_t>(a.levels.volts.size());
    if (macros < 1 || macros > kMostMacros) {
        return invalid("dynamic.shape[1] (macros)", macros, "1 to", kMostMacros);
    }
    QS_TRY(same("leak.shape[0]", a.leak.extent[0], "macros,", macros));
    QS_TRY(same("response.shape[0]", a.response.extent[0], "macros,", macros));
    QS_TRY(same("response.shape[1]", a.response.extent[1], "macros,", macros));
    QS_TRY(same("group.shape[0]", static_cast<std::int64_t>(a.group.size()), "macros,", macros));
    QS_TRY(check_indices(a.group, groups, "group"));
    QS_TRY(check_indices(a.domain, groups, "domain"));
    QS_TRY(same("safe.shape[0]", static_cast<std::int64_t>(a.safe.size()), "groups,", groups));
    QS_TRY(same("first.shape[0]", static_cast<std::int64_t>(a.first.size()), "groups,", groups));
    if (levels < 1) {
        return invalid("levels", levels, "at least", 1);
    }
    QS_TRY(same("hertz.shape[0]", static_cast<std::int64_t>(a.levels.hertz.size()), "levels,",
                levels));
    QS_TRY(
        same("need.shape[0]", static_cast<std::int64_t>(a.levels.need.size()), "levels,", levels));
    QS_TRY(check_indices(a.safe, levels, "safe"));
    QS_TRY(check_indices(a.first, levels, "first"));
    constexpr double kLeast = std::numeric_limits<double>::min();
    QS_TRY(check_numbers(a.levels.volts, "volts", kLeast));
    QS_TRY(check_numbers(a.levels.hertz, "hertz", kLeast));
    QS_TRY(check_numbers(a.levels.need, "need", 0.0));
    for (std::size_t l = 1; l < a.levels.hertz.size(); ++l) {
        if (a.levels.hertz[l] > a.levels.hertz[l - 1]) {
            return invalid("hertz: level", static_cast<std::int64_t>(l),
                           "no more than at the one before");
        }
    }
    const double nominal[] = {a.nominal_volts, a.nominal_hertz};
    QS_TRY(check_numbers(nominal, "nominal", kLeast));
    const Control& c = a.control;
    for (const auto& [what, value] : {std::pair{"patience", c.patience},
                                      {"relapse", c.relapse},
                                      {"recompute", c.recompute},
                                      {"stall", c.stall},
                                      {"backoff", c.backoff}}) {
        if (value < 0 || value > (std::int64_t{1} << 40)) {
            return invalid(what, value, "0 to 2^40");
        }
    }
    for (std::int64_t m = 0; m < macros; ++m) {
        if (!std::isfinite(*a.leak.at(m)) || *a.leak.at(m) < 0.0) {
            return invalid("leak", "a number that is negative or not finite", "0 or more");
        }
        for (std::int64_t k = 0; k < macros; ++k) {
            if (!std::isfinite(*a.response.at(m, k))) {
                return invalid("response", "a number that is not finite", "finite numbers");
            }
        }
    }
    for (std::int64_t t = 0; t < a.dynamic.extent[0]; ++t) {
        for (std::int64_t m = 0; m < macros; ++m) {
            const double x = *a.dynamic.at(t, m);
            if (!std::isfinite(x) || x < 0.0) {
                return invalid("dynamic", "a number that is negative or not finite", "0 or more");
            }
        }
    }
    return {};
}

struct Group {
    std::vector<std::int64_t> macros;
    double time = 0.0;
    std::int64_t done = 0;      // cycles of work
    std::int64_t standing = 0;  // cycles still to stand
    std::int64_t level = 0, aim = 0;
    std::int64_t clock = 0;  // the level whose clock it runs at in this cycle
    std::int64_t calm = 0;   // cycles since the last failure or change of level
    std::int64_t since = 0;  // cycles of work since the level was taken up
    std::int64_t wait = 0;   // good cycles before it aims further
};

class Booster {
   public:
    Booster(const BoosterArgs& args, BoosterResult& out) : a_(args), out_(out) {
        work_ = a_.dynamic.extent[0];
        groups_.resize(a_.domain.size());
        amperes_.resize(a_.group.size());
        slowest_.resize(a_.domain.size());
        turn_.reserve(a_.domain.size());
        for (std::size_t m = 0; m < a_.group.size(); ++m) {
            groups_[at(a_.group[m])].macros.push_back(static_cast<std::int64_t>(m));
            amperes_[m] = *a_.leak.at(m);
        }
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            groups_[g].level = groups_[g].aim = a_.first[g];
            groups_[g].wait = a_.control.patience;
        }
        find_slowest();
    }

    Status run() {
        const std::int64_t most = kMostCyclesEach * (work_ + a_.control.stall + 1);
        while (take_turn()) {
            for (const std::int64_t g : turn_) {
                if (out_.cycles[at(g)] >= most) {
                    return invalid("group", g,
                                   "one whose supply carries it at the last level: it fails again "
                                   "and again");
                }
                draw(g);
            }
            // All that begin a cycle at once draw before anybody's drop is looked at.
            for (const std::int64_t g : turn_) {
                judge(g);
            }
            find_slowest();
        }
        return {};
    }

   private:
    // The groups whose next cycle begins first; false: all are done.
    [[nodiscard]] bool take_turn() noexcept {
        turn_.clear();
        double begin = std::numeric_limits<double>::infinity();
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            const Group& group = groups_[g];
            if (group.done >= work_ || group.macros.empty() || group.time > begin) {
                continue;
            }
            if (group.time < begin) {
                begin = group.time;
                turn_.clear();
            }
            turn_.push_back(static_cast<std::int64_t>(g));
        }
        return !turn_.empty();
    }

    // Levels rise with the margin: the slowest clock of a domain is that of its last level.
    void find_slowest() noexcept {
        std::fill(slowest_.begin(), slowest_.end(), 0);
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            std::int64_t& most = slowest_[at(a_.domain[g])];
            if (groups_[g].done < work_) {
                most = std::max(most, groups_[g].level);
            }
        }
    }

    void draw(std::int64_t g) noexcept {
        Group& group = groups_[at(g)];
        group.clock = slowest_[at(a_.domain[at(g)])];
        const double hertz = a_.levels.hertz[at(group.clock)];
        const double volts = a_.levels.volts[at(group.level)];
        const double up = volts / a_.nominal_volts;
        double joules = 0.0;
        for (const std::int64_t m : group.macros) {
            const double leak = *a_.leak.at(m) * up;
            const double moving = group.standing == 0 ? *a_.dynamic.at(group.done, m) * up : 0.0;
            amperes_[at(m)] = leak + moving * (hertz / a_.nominal_hertz);
            joules += volts * (leak / hertz + moving / a_.nominal_hertz);
        }
        group.time += 1.0 / hertz;
        out_.joules[at(g)] += joules;
        ++out_.cycles[at(g)];
        ++*out_.at_level.at(g, group.level);
    }

    void judge(std::int64_t g) noexcept {
        Group& group = groups_[at(g)];
        const double volts = a_.levels.volts[at(group.level)];
        const bool works = group.standing == 0;
        const bool failed = drops(group, volts, a_.levels.need[at(group.clock)]) && works;
        if (!works) {
            --group.standing;
        } else if (failed) {
            fail(g);
        } else {
            ++group.done;
            ++group.calm;
            ++group.since;
            if (group.since == a_.control.relapse) {
                group.wait = a_.control.patience;
            }
            const bool back = group.level > group.aim;
            if (a_.control.adapt && group.calm >= (back ? a_.control.patience : group.wait)) {
                relax(g);
            }
        }
        if (group.done >= work_) {
            out_.seconds[at(g)] = group.time;
            for (const std::int64_t m : group.macros) {
                amperes_[at(m)] = *a_.leak.at(m) * (volts / a_.nominal_volts);
            }
            note(g, Event::kDone);
        }
    }

    // Whether a macro of the group gets less than it needs.
    [[nodiscard]] bool drops(const Group& group, double volts, double need) noexcept {
        bool below = false;
        for (const std::int64_t m : group.macros) {
            double drop = 0.0;
            for (std::size_t k = 0; k < amperes_.size(); ++k) {
                drop += *a_.response.at(m, static_cast<std::int64_t>(k)) * amperes_[k];
            }
            out_.worst[at(m)] = std::max(out_.worst[at(m)], drop);
            below = below || volts - drop < need - kRounding * need;
        }
        return below;
    }

    void fail(std::int64_t g) noexcept {
        Group& group = groups_[at(g)];
        const std::int64_t safe = a_.safe[at(g)];
        const auto last = static_cast<std::int64_t>(a_.levels.volts.size()) - 1;
        ++out_.failures[at(g)];
        out_.beyond[at(g)] += group.level >= safe;
        if (a_.control.adapt) {
            if (group.level < safe && group.since < a_.control.relapse) {
                group.aim = std::min(safe, group.aim + 1);
                const std::int64_t most = kMostPatience / std::max<std::int64_t>(1, group.wait);
                group.wait *= std::min(most, a_.control.backoff);
            }
            // What is safe by its own weights is not, beside neighbours that draw more.
            group.level = group.level < safe ? safe : std::min(last, group.level + 1);
        }
        group.done = std::max<std::int64_t>(0, group.done - a_.control.recompute);
        group.standing = a_.control.stall;
        group.calm = group.since = 0;
        note(g, Event::kFailure);
    }

    void relax(std::int64_t g) noexcept {
        Group& group = groups_[at(g)];
        group.calm = 0;
        const std::int64_t before = group.level;
        if (group.level > group.aim) {
            group.level = group.level > a_.safe[at(g)] ? group.level - 1 : group.aim;
        } else if (group.aim > 0) {
            group.level = --group.aim;
        }
        if (group.level != before) {
            group.since = 0;
            note(g, Event::kLevel);
        }
    }

    void note(std::int64_t g, Event event) noexcept {
        const Group& group = groups_[at(g)];
        if (at(out_.changed) < out_.changes.size()) {
            out_.changes[at(out_.changed)] = {group.time, static_cast<std::int32_t>(g),
                                              static_cast<std::int32_t>(group.level), event};
        }
        ++out_.changed;
    }

    // Of a sum over the macros: a drop that is exactly the margin does not fail.
    static constexpr double kRounding = 1e-12;

    const BoosterArgs& a_;
    BoosterResult& out_;
    std::int64_t work_ = 0;
    std::vector<Group> groups_;
    std::vector<std::int64_t> turn_;     // groups that begin a cycle now
    std::vector<double> amperes_;        // [m] now
    std::vector<std::int64_t> slowest_;  // [domain] level
};

}  // namespace

Status boost(const BoosterArgs& args, BoosterResult& out) noexcept {
    QS_TRY(check(args));
    try {
        return Booster(args, out).run();
    } catch (const std::bad_alloc&) {
        return no_memory("groups", static_cast<std::int64_t>(args.group.size()));
    }
}

}  // namespace quernstone::pim
