#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "allocations.h"
#include "check.h"
#include "moe/schedule.h"

using namespace quernstone;
using moe::Policy;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A layer of n experts with costs that differ, and room for its schedule, preset to nonsense.
struct Fixture {
    explicit Fixture(std::size_t n)
        : loads(n),
          ready(n),
          cpu(n),
          gpu(n),
          transfer(n),
          device(n, 7),
          order(n, -1),
          times(4 * n, kNaN) {
        std::uint64_t state = 88172645463325252ULL + n;
        const auto next = [&] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            return static_cast<double>(1 + state % 255) / 64.0;
        };
        for (std::size_t i = 0; i < n; ++i) {
            loads[i] = static_cast<std::int64_t>(1 + i % 5);
            ready[i] = i % 2 == 0 ? 0.0 : moe::kNotCached;
            cpu[i] = next();
            gpu[i] = next();
            transfer[i] = next();
        }
    }

    [[nodiscard]] moe::Layer layer() const { return {loads, ready, cpu, gpu, transfer}; }

    [[nodiscard]] moe::Schedule out() {
        const std::span<double> all(times);
        const std::size_t n = loads.size();
        return {device,
                order,
                all.subspan(0, n),
                all.subspan(n, n),
                all.subspan(2 * n, n),
                all.subspan(3 * n, n)};
    }

    std::vector<std::int64_t> loads;
    std::vector<double> ready, cpu, gpu, transfer;
    std::vector<std::uint8_t> device;
    std::vector<std::int32_t> order;
    std::vector<double> times;
};

double makespan(Fixture& fixture, Policy policy, moe::Workspace& workspace) {
    moe::Ends ends;
    CHECK(moe::schedule(fixture.layer(), policy, workspace, fixture.out(), ends).ok());
    return ends.makespan;
}

}  // namespace

TEST(an_expert_schedule_is_made_without_allocating) {
    moe::Workspace workspace;
    CHECK(workspace.ready());
    for (const std::size_t n : {0, 1, 8, 64, 1024}) {
        Fixture fixture(n);
        for (int policy = 0; policy <= static_cast<int>(Policy::kHybrid); ++policy) {
            const std::int64_t before = allocations();
            moe::Ends ends;
            const Status status = moe::schedule(fixture.layer(), static_cast<Policy>(policy),
                                                workspace, fixture.out(), ends);
            CHECK_EQ(allocations() - before, 0);
            CHECK(status.ok());
        }
    }
    // The count does see what kExact may do.
    const std::int64_t before = allocations();
    Fixture fixture(8);
    const std::int64_t made = allocations();
    CHECK(made > before);
    makespan(fixture, Policy::kExact, workspace);
    CHECK(allocations() > made);
}

TEST(an_expert_schedule_writes_every_output_and_ends_with_its_last_expert) {
    moe::Workspace workspace;
    for (const std::size_t n : {1, 2, 7, 30}) {
        for (int policy = 0; policy <= static_cast<int>(Policy::kExact); ++policy) {
            Fixture fixture(n);
            const double end = makespan(fixture, static_cast<Policy>(policy), workspace);
            const moe::Schedule out = fixture.out();
            double last = 0.0;
            for (std::size_t i = 0; i < n; ++i) {
                CHECK(out.device[i] <= 1);
                CHECK(out.order[i] >= 0 && out.order[i] < static_cast<std::int32_t>(n));
                CHECK(out.start[i] <= out.end[i]);
                const bool moved = out.device[i] == 1 && fixture.ready[i] != 0.0;
                CHECK_EQ(std::isnan(out.transfer_start[i]), !moved);
                CHECK(!moved || out.transfer_end[i] <= out.start[i]);
                last = std::max(last, out.end[i]);
            }
            CHECK_EQ(end, last);
        }
    }
}

TEST(the_exact_expert_schedule_is_the_best_of_all_partitions) {
    moe::Workspace workspace;
    for (const std::size_t n : {1, 3, 6, 10}) {
        Fixture fixture(n);
        double best = 1e300;
        for (std::uint32_t on_gpu = 0; on_gpu < (1U << n); ++on_gpu) {
            // What the CPU may not take costs it too much, and the other way round.
            Fixture forced = fixture;
            double cpu = 0.0;
            for (std::size_t i = 0; i < n; ++i) {
                if ((on_gpu >> i & 1U) != 0) {
                    forced.cpu[i] = 1e6;
                } else {
                    cpu += fixture.cpu[i];
                    forced.gpu[i] = forced.transfer[i] = 0.0;
                    forced.ready[i] = 0.0;
                }
            }
            best = std::min(best, std::max(cpu, makespan(forced, Policy::kGpuOnly, workspace)));
        }
        const double exact = makespan(fixture, Policy::kExact, workspace);
        CHECK_EQ(exact, best);
        CHECK(makespan(fixture, Policy::kHybrid, workspace) >= exact);
    }
}

TEST(an_expert_schedule_names_what_is_wrong_before_it_writes) {
    moe::Workspace workspace;
    const auto refused = [&](auto change) {
        Fixture fixture(3);
        moe::Layer layer = fixture.layer();
        moe::Schedule out = fixture.out();
        change(fixture, layer, out);
        moe::Ends ends;
        const Status status = moe::schedule(layer, Policy::kHybrid, workspace, out, ends);
        CHECK(!status.ok());
        CHECK_EQ(fixture.device[0], 7);
        return std::string(status.what != nullptr ? status.what : "");
    };
    using Layer = moe::Layer;
    using Out = moe::Schedule;
    CHECK_EQ(refused([](Fixture& f, Layer&, Out&) { f.loads[1] = 0; }), "loads");
    CHECK_EQ(refused([](Fixture& f, Layer&, Out&) { f.cpu[1] = kNaN; }), "cpu");
    CHECK_EQ(refused([](Fixture& f, Layer&, Out&) { f.gpu[2] = -1.0; }), "gpu");
    CHECK_EQ(refused([](Fixture& f, Layer&, Out&) { f.transfer[0] = 1e101; }), "transfer");
    CHECK_EQ(refused([](Fixture& f, Layer&, Out&) { f.ready[0] = -moe::kNotCached; }), "ready");
    CHECK_EQ(refused([](Fixture&, Layer& l, Out&) { l.cpu_free = kNaN; }), "cpu_free");
    CHECK_EQ(refused([](Fixture&, Layer& l, Out&) { l.cpu = l.cpu.first(2); }), "cpu");
    CHECK_EQ(refused([](Fixture&, Layer&, Out& o) { o.order = o.order.first(2); }),
             "order.shape[0] (experts)");
    CHECK_EQ(refused([](Fixture&, Layer&, Out& o) { o.end = o.end.first(1); }),
             "end.shape[0] (experts)");
}

TEST(a_prefetch_fills_what_it_is_given_and_stays_in_its_budget) {
    moe::Workspace workspace;
    Fixture fixture(12);
    for (std::size_t i = 0; i < 12; ++i) {  // what is not cached is dear
        fixture.cpu[i] *= 8.0;
        fixture.transfer[i] *= 8.0;
    }
    const std::vector<double> sure(12, 1.0);
    const std::vector<moe::Predicted> layers(3, {fixture.layer(), sure});
    for (const std::size_t room : {0, 1, 4, 40}) {
        std::vector<moe::Prefetch> found(room);
        std::int64_t count = -1;
        const std::int64_t before = allocations();
        const Status status = moe::prefetch(layers, 20.0, Policy::kHybrid, workspace, found, count);
        CHECK_EQ(allocations() - before, 0);
        CHECK(status.ok());
        CHECK(count >= 0 && count <= static_cast<std::int64_t>(room));
        double bus = 0.0;
        for (std::size_t k = 0; k < static_cast<std::size_t>(count); ++k) {
            CHECK_EQ(found[k].start, bus);
            CHECK(found[k].drop > 0.0);
            bus = found[k].end;
        }
        CHECK(bus <= 20.0);
        CHECK(room < 4 || count > 0);
    }
}

TEST(a_queue_of_transfers_is_cut_at_the_end_of_a_tile) {
    const std::vector<double> transfer{2.0, 1.0, 1.0};
    const std::vector<std::uint8_t> needed{0, 0, 1};
    std::vector<std::uint8_t> keep(3, 7);
    std::vector<double> arrival(3, kNaN);
    double free = kNaN;
    CHECK(moe::cancel({transfer, needed, 0.75, 4, 10.0}, {keep, arrival}, free).ok());
    CHECK((keep == std::vector<std::uint8_t>{0, 0, 1}));
    CHECK_EQ(arrival[0], moe::kNotCached);
    CHECK_EQ(arrival[2], 11.25);
    CHECK_EQ(free, 11.25);
    CHECK(!moe::cancel({transfer, needed, 0.0, 0, 0.0}, {keep, arrival}, free).ok());
    CHECK(!moe::cancel({transfer, needed, 3.0, 1, 0.0}, {keep, arrival}, free).ok());
}
