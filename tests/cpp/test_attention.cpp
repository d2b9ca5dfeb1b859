#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "attention_problem.h"
#include "check.h"
#include "common/cpu.h"
#include "thread_pool.h"

using namespace quernstone;
using namespace quernstone::attention;
using namespace attention_test;

namespace {

// One output row in double precision, straight from the definition (README.md).
template <class T>
std::vector<double> exact_row(const ForwardArgs<T>& a, std::int64_t b, std::int64_t h,
                              std::int64_t t) {
    const std::int64_t s = a.k.extent[2];
    const std::int64_t d = a.q.extent[3];
    const std::int64_t g = h / (a.q.extent[1] / a.k.extent[1]);
    const std::int64_t p = t + s - a.q.extent[2];
    const std::int64_t start = a.key_start.present() ? *a.key_start.at(b) : 0;
    const std::int64_t end = a.key_lengths.present() ? *a.key_lengths.at(b) : s;
    std::vector<double> out(static_cast<std::size_t>(d), 0.0);
    double total = 0.0;
    for (std::int64_t j = start; j < end; ++j) {
        const bool near = a.window == 0 || (j > p - a.window && j < p + a.window);
        if (!near || (a.causal && j > p)) {
            continue;
        }
        double logit = 0.0;
        for (std::int64_t i = 0; i < d; ++i) {
            logit += double{widen(*a.q.at(b, h, t, i))} * double{widen(*a.k.at(b, g, j, i))};
        }
        const double weight = std::exp(logit * double{a.scale});
        total += weight;
        for (std::int64_t i = 0; i < d; ++i) {
            out[static_cast<std::size_t>(i)] += weight * double{widen(*a.v.at(b, g, j, i))};
        }
    }
    double gate = 1.0;
    if (a.kind == Kind::kGated) {
        gate = 1.0 / (1.0 + std::exp(-double{widen(*a.gate.at(b, h, t, 0))}));
    } else if (a.kind == Kind::kSink) {
        gate = total / (total + std::exp(double{*a.sinks.at(h)}));
    }
    for (double& x : out) {
        x = total > 0.0 ? gate * x / total : 0.0;
    }
    return out;
}

// Distance to the exact result over that result's length.
template <class T>
double relative_error(const ForwardArgs<T>& a) {
    double difference = 0.0;
    double length = 0.0;
    for (std::int64_t b = 0; b < a.q.extent[0]; ++b) {
        for (std::int64_t h = 0; h < a.q.extent[1]; ++h) {
            for (std::int64_t t = 0; t < a.q.extent[2]; ++t) {
                const std::vector<double> want = exact_row(a, b, h, t);
                for (std::size_t i = 0; i < want.size(); ++i) {
                    const double got{widen(*a.out.at(b, h, t, static_cast<std::int64_t>(i)))};
                    difference += (got - want[i]) * (got - want[i]);
                    length += want[i] * want[i];
                }
            }
        }
    }
    return std::sqrt(difference / length);
}

template <class T>
void compare_with_the_definition(double tolerance) {
    const Isa before = active_isa();
    for (const Isa isa : available_isas()) {
        CHECK(set_isa(isa_name(isa)));
        for (const Shape& shape : kShapes) {
            for (const Kind kind : {Kind::kSink, Kind::kVanilla, Kind::kGated}) {
                for (const std::int64_t window : {0, 5, 33}) {
                    Problem<T> problem(shape, kind);
                    problem.args.window = window;
                    problem.args.causal = window != 33;
                    CHECK(forward(problem.args, 1).ok());
                    const double error = relative_error(problem.args);
                    if (!(error <= tolerance)) {
                        std::cerr << isa_name(isa) << " s " << shape.s << " d " << shape.d
                                  << " kind " << static_cast<int>(kind) << " window " << window
                                  << ": ";
                        CHECK_EQ(error, 0.0);
                    }
                }
            }
        }
    }
    CHECK(set_isa(isa_name(before)));
}

}  // namespace

// A relative error of a few half-ulps: sums of d and s terms of N(0, 1) grow like their square root.
TEST(fp32_agrees_with_the_definition_at_every_level) { compare_with_the_definition<float>(5e-7); }

// Rounding the result to 8 bits gives 2^-9 / sqrt(3); weights rounded for a bf16 product as much.
TEST(bf16_agrees_with_the_definition_at_every_level) { compare_with_the_definition<bf16>(3e-3); }

// Queries as [b, t, h, d], keys as [b, g, d, s], values running backwards.
TEST(any_layout_is_read_in_place_at_every_level) {
    const Isa before = active_isa();
    for (const Isa isa : available_isas()) {
        CHECK(set_isa(isa_name(isa)));
        for (const auto& [b, h, g, t, s, d] : kShapes) {
            Problem<float> problem({b, h, g, t, s, d}, Kind::kSink);
            problem.args.q.stride = {t * h * d, d, h * d, 1};
            problem.args.k.stride = {g * d * s, d * s, 1, s};
            problem.args.v.data = problem.v.data() + problem.v.size() - 1;
            for (std::int64_t& stride : problem.args.v.stride) {
                stride = -stride;
            }
            CHECK(forward(problem.args, 1).ok());
            CHECK(relative_error(problem.args) <= 5e-7);
        }
    }
    CHECK(set_isa(isa_name(before)));
}

TEST(results_do_not_depend_on_the_number_of_threads) {
    for (const Kind kind : {Kind::kSink, Kind::kVanilla, Kind::kGated}) {
        Problem<float> alone({2, 4, 2, 150, 150, 48}, kind);
        CHECK(forward(alone.args, 1).ok());
        for (const int threads : {2, 3, 7}) {
            const ThreadPool pool(threads);
            Problem<float> together({2, 4, 2, 150, 150, 48}, kind);
            CHECK(forward(together.args, threads).ok());
            CHECK(alone.out == together.out);
            CHECK(alone.lse == together.lse);
            CHECK(alone.importance == together.importance);
        }
    }
}

TEST(a_row_that_sees_no_key_is_zero_and_its_lse_minus_infinity) {
    for (const Kind kind : {Kind::kSink, Kind::kVanilla, Kind::kGated}) {
        Problem<float> problem({1, 2, 1, 5, 3, 16}, kind);  // queries 0 and 1 come before any key
        CHECK(forward(problem.args, 1).ok());
        for (std::int64_t h = 0; h < 2; ++h) {
            for (std::int64_t t = 0; t < 5; ++t) {
                const bool blind = t < 2;
                CHECK_EQ(*problem.args.out.at(0, h, t, 15) == 0.0F, blind);
                CHECK_EQ(*problem.args.lse.at(0, h, t) == -std::numeric_limits<float>::infinity(),
                         blind);
            }
        }
    }
}

TEST(empty_batches_queries_and_keys_are_right) {
    for (const Shape& shape :
         {Shape{0, 2, 1, 4, 4, 16}, Shape{2, 2, 1, 0, 4, 16}, Shape{1, 2, 1, 4, 0, 16}}) {
        Problem<float> problem(shape, Kind::kSink);
        CHECK(forward(problem.args, 1).ok());
        for (const float x : problem.out) {
            CHECK_EQ(x, 0.0F);
        }
        for (const float x : problem.importance) {
            CHECK_EQ(x, 0.0F);
        }
    }
}

// The memory does not exist: reading any of it would end the process.
TEST(a_wrong_extent_is_named_before_memory_is_read) {
    using Args = ForwardArgs<float>;
    const auto nowhere = [] { return std::bit_cast<float*>(std::uintptr_t{64}); };
    const auto valid = [&](Kind kind) {
        Args a;
        a.kind = kind;
        a.q = contiguous<const float>(nowhere(), 2, 4, 5, 32);
        a.k = a.v = contiguous<const float>(nowhere(), 2, 2, 7, 32);
        a.out = contiguous<float>(nowhere(), 2, 4, 5, 32);
        if (kind == Kind::kSink) {
            a.sinks = {nowhere(), {4}, {1}};
        }
        if (kind == Kind::kGated) {
            a.gate = contiguous<const float>(nowhere(), 2, 4, 5, 32);
        }
        return a;
    };
    const View<const std::int64_t, 1> three{
        std::bit_cast<const std::int64_t*>(std::uintptr_t{64}), {3}, {1}};
    struct Case {
        const char* named;
        Kind kind;
        std::function<void(Args&)> spoil;
    };
    const std::vector<Case> cases = {
        {"k.shape[0]", Kind::kSink, [](Args& a) { a.k.extent[0] = 3; }},
        {"v.shape[0]", Kind::kSink, [](Args& a) { a.v.extent[0] = 1; }},
        {"v.shape[1]", Kind::kSink, [](Args& a) { a.v.extent[1] = 1; }},
        {"v.shape[2]", Kind::kSink, [](Args& a) { a.v.extent[2] = 6; }},
        {"k.shape[3]", Kind::kSink, [](Args& a) { a.k.extent[3] = 31; }},
        {"v.shape[3]", Kind::kSink, [](Args& a) { a.v.extent[3] = 33; }},
        {"q.shape[3]", Kind::kSink,
         [](Args& a) { a.q.extent[3] = a.k.extent[3] = a.v.extent[3] = 15; }},
        {"q.shape[3]", Kind::kSink,
         [](Args& a) { a.q.extent[3] = a.k.extent[3] = a.v.extent[3] = 257; }},
        {"q.shape[1]", Kind::kSink, [](Args& a) { a.q.extent[1] = 5; }},
        {"q.shape[1]", Kind::kSink, [](Args& a) { a.k.extent[1] = a.v.extent[1] = 0; }},
        {"scale", Kind::kSink, [](Args& a) { a.scale = std::numeric_limits<float>::quiet_NaN(); }},
        {"scale", Kind::kSink, [](Args& a) { a.scale = -std::numeric_limits<float>::infinity(); }},
        {"window", Kind::kSink, [](Args& a) { a.window = -1; }},
        {"sinks", Kind::kSink, [](Args& a) { a.sinks = {}; }},
        {"sinks.shape[0]", Kind::kSink, [](Args& a) { a.sinks.extent[0] = 2; }},
        {"sinks", Kind::kVanilla, [&](Args& a) { a.sinks = {nowhere(), {4}, {1}}; }},
        {"gate", Kind::kGated, [](Args& a) { a.gate = {}; }},
        {"gate", Kind::kSink, [&](Args& a) { a.gate = valid(Kind::kGated).gate; }},
        {"gate.shape[0]", Kind::kGated, [](Args& a) { a.gate.extent[0] = 1; }},
        {"gate.shape[1]", Kind::kGated, [](Args& a) { a.gate.extent[1] = 2; }},
        {"gate.shape[2]", Kind::kGated, [](Args& a) { a.gate.extent[2] = 7; }},
        {"gate.shape[3]", Kind::kGated, [](Args& a) { a.gate.extent[3] = 16; }},
        {"key_start.shape[0]", Kind::kSink, [&](Args& a) { a.key_start = three; }},
        {"key_lengths.shape[0]", Kind::kSink, [&](Args& a) { a.key_lengths = three; }},
        {"token_mask.shape[0]", Kind::kSink,
         [](Args& a) {
             a.token_mask = {std::bit_cast<std::uint8_t*>(std::uintptr_t{64}), {1, 5}, {5, 1}};
         }},
        {"token_mask.shape[1]", Kind::kSink,
         [](Args& a) {
             a.token_mask = {std::bit_cast<std::uint8_t*>(std::uintptr_t{64}), {2, 7}, {7, 1}};
         }},
    };
    for (const Case& c : cases) {
        Args args = valid(c.kind);
        c.spoil(args);
        const Status status = forward(args, 1);
        CHECK(!status.ok());
        CHECK(status.what != nullptr && std::string(status.what).starts_with(c.named));
        if (status.what != nullptr && !std::string(status.what).starts_with(c.named)) {
            std::cerr << "  expected " << c.named << ", named " << status.what << "\n";
        }
    }
}

TEST(positions_outside_the_keys_are_refused_with_their_value) {
    for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{8}}) {
        const std::int64_t positions[2] = {3, bad};
        Problem<float> problem({2, 2, 1, 5, 7, 16}, Kind::kSink);
        problem.args.key_start = {positions, {2}, {1}};
        Status status = forward(problem.args, 1);
        CHECK_EQ(std::string(status.what), "key_start");
        CHECK_EQ(status.got, bad);
        problem.args.key_start = {};
        problem.args.key_lengths = {positions, {2}, {1}};
        status = forward(problem.args, 1);
        CHECK_EQ(std::string(status.what), "key_lengths");
        CHECK_EQ(status.got, bad);
    }
}
