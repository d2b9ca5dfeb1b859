#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
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

// A forward pass and its gradients. Outputs start as NaN, so that what is not written shows.
template <class T>
struct Step : Problem<T> {
    using Problem<T>::e;
    using Problem<T>::args;

    Step(Shape shape, Kind kind)
        : Problem<T>(shape, kind),
          dout(normal<T>(e.b * e.h * e.t * e.d, 6)),
          dlse(normal<float>(e.b * e.h * e.t, 7)),
          dimportance(normal<float>(e.h, 8)),
          gate_logit(dlse.size(), kNan),
          dq(this->q.size(), narrow<T>(kNan)),
          dk(this->k.size(), narrow<T>(kNan)),
          dv(this->v.size(), narrow<T>(kNan)),
          dgate(this->gate.size(), narrow<T>(kNan)),
          dsinks(this->sinks.size(), kNan) {
        for (float& x : dimportance) {
            x *= 10.0F;
        }
    }

    void run(int threads) {
        const View<float, 3> rows{gate_logit.data(), {e.b, e.h, e.t}, {e.h * e.t, e.t, 1}};
        args.gate_logit = args.kind == Kind::kVanilla ? rows : View<float, 3>{};
        CHECK(forward(args, threads).ok());
        BackwardArgs<T> back;
        back.forward = args;
        back.forward.importance = {};
        back.dout = contiguous<const T>(dout.data(), e.b, e.h, e.t, e.d);
        back.dlse = {dlse.data(), {e.b, e.h, e.t}, {e.h * e.t, e.t, 1}};
        back.dimportance = {dimportance.data(), {e.h}, {1}};
        back.dq = contiguous<T>(dq.data(), e.b, e.h, e.t, e.d);
        back.dk = contiguous<T>(dk.data(), e.b, e.g, e.s, e.d);
        back.dv = contiguous<T>(dv.data(), e.b, e.g, e.s, e.d);
        if (args.kind == Kind::kSink) {
            back.dsinks = {dsinks.data(), {e.h}, {1}};
        } else if (args.kind == Kind::kGated) {
            back.dgate = contiguous<T>(dgate.data(), e.b, e.h, e.t, 1);
        }
        CHECK(backward(back, threads).ok());
    }

    static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    std::vector<T> dout;
    std::vector<float> dlse, dimportance, gate_logit;
    std::vector<T> dq, dk, dv, dgate;
    std::vector<float> dsinks;
};

struct Exact {
    std::vector<double> dq, dk, dv, dgate, dsinks;
};

// The gradients in double precision, by the chain rule and without what the kernels fuse: the
// gate's gradient comes from its own definition, 1 - A_0 for the vanilla kind.
template <class T>
Exact differentiate(const Step<T>& step) {
    const Shape e = step.e;
    const ForwardArgs<T>& a = step.args;
    Exact x;
    x.dq.resize(step.dq.size());
    x.dk.resize(step.dk.size());
    x.dv.resize(step.dv.size());
    x.dgate.resize(step.dgate.size());
    x.dsinks.resize(step.dsinks.size());
    const auto sees = [&](std::int64_t t, std::int64_t j) {
        const std::int64_t p = t + e.s - e.t;
        const bool near = a.window == 0 || (j > p - a.window && j < p + a.window);
        return near && (!a.causal || j <= p);
    };
    const auto row_counts = [&](std::int64_t t) {
        for (std::int64_t j = a.kind == Kind::kVanilla ? 1 : 0; j < e.s; ++j) {
            if (sees(t, j)) {
                return true;
            }
        }
        return false;
    };
    double tokens = 0.0;
    for (std::int64_t t = 0; t < e.t; ++t) {
        tokens += row_counts(t) ? static_cast<double>(e.b) : 0.0;
    }
    for (std::int64_t b = 0; b < e.b; ++b) {
        for (std::int64_t h = 0; h < e.h; ++h) {
            const std::int64_t g = h / (e.h / e.g);
            const auto n = static_cast<std::size_t>(e.s);
            for (std::int64_t t = 0; t < e.t; ++t) {
                const std::int64_t row = (b * e.h + h) * e.t + t;
                std::vector<double> weights(n, 0.0);
                double total = 0.0;
                for (std::int64_t j = 0; j < e.s; ++j) {
                    double logit = 0.0;
                    for (std::int64_t i = 0; i < e.d; ++i) {
                        logit += double{widen(*a.q.at(b, h, t, i))} * widen(*a.k.at(b, g, j, i));
                    }
                    weights[static_cast<std::size_t>(j)] =
                        sees(t, j) ? std::exp(logit * double{a.scale}) : 0.0;
                    total += weights[static_cast<std::size_t>(j)];
                }
                if (total == 0.0) {
                    continue;
                }
                double gate = 1.0;
                if (a.kind == Kind::kSink) {
                    gate = total / (total + std::exp(double{*a.sinks.at(h)}));
                } else if (a.kind == Kind::kGated) {
                    gate = 1.0 / (1.0 + std::exp(-double{widen(*a.gate.at(b, h, t, 0))}));
                }
                double dgate = row_counts(t) && tokens > 0.0
                                   ? double{step.dimportance[static_cast<std::size_t>(h)]} / tokens
                                   : 0.0;
                std::vector<double> dweights(n, 0.0);
                double mean = 0.0;
                for (std::int64_t j = 0; j < e.s; ++j) {
                    const auto at = static_cast<std::size_t>(j);
                    weights[at] /= total;
                    double product = 0.0;
                    for (std::int64_t i = 0; i < e.d; ++i) {
                        const double dout{
                            widen(step.dout[static_cast<std::size_t>(row * e.d + i)])};
                        product += dout * double{widen(*a.v.at(b, g, j, i))};
                        x.dv[static_cast<std::size_t>(((b * e.g + g) * e.s + j) * e.d + i)] +=
                            gate * weights[at] * dout;
                    }
                    dweights[at] = gate * product;
                    if (a.kind != Kind::kVanilla) {
                        dgate += weights[at] * product;
                    } else if (j == 0) {
                        dweights[at] -= dgate;
                    }
                    mean += weights[at] * dweights[at];
                }
                double dtotal{step.dlse[static_cast<std::size_t>(row)]};
                if (a.kind == Kind::kSink) {
                    dtotal += gate * (1.0 - gate) * dgate;
                    x.dsinks[static_cast<std::size_t>(h)] -= gate * (1.0 - gate) * dgate;
                } else if (a.kind == Kind::kGated) {
                    x.dgate[static_cast<std::size_t>(row)] = gate * (1.0 - gate) * dgate;
                }
                for (std::int64_t j = 0; j < e.s; ++j) {
                    const auto at = static_cast<std::size_t>(j);
                    const double dlogit =
                        double{a.scale} * weights[at] * (dweights[at] - mean + dtotal);
                    for (std::int64_t i = 0; i < e.d; ++i) {
                        x.dq[static_cast<std::size_t>(row * e.d + i)] +=
                            dlogit * double{widen(*a.k.at(b, g, j, i))};
                        x.dk[static_cast<std::size_t>(((b * e.g + g) * e.s + j) * e.d + i)] +=
                            dlogit * double{widen(*a.q.at(b, h, t, i))};
                    }
                }
            }
        }
    }
    return x;
}

template <class T>
double distance(const std::vector<T>& got, const std::vector<double>& want) {
    double difference = 0.0;
    double length = 0.0;
    for (std::size_t i = 0; i < want.size(); ++i) {
        const double x{widen(got[i])};
        difference += (x - want[i]) * (x - want[i]);
        length += want[i] * want[i];
    }
    return std::sqrt(difference / length);
}

template <class T>
void compare_with_the_chain_rule(double tolerance) {
    const Isa before = active_isa();
    for (const Isa isa : available_isas()) {
        CHECK(set_isa(isa_name(isa)));
        for (const Shape& shape : kShapes) {
            for (const Kind kind : {Kind::kSink, Kind::kVanilla, Kind::kGated}) {
                for (const std::int64_t window : {0, 33}) {
                    Step<T> step(shape, kind);
                    step.args.window = window;
                    step.args.causal = window == 0;
                    step.run(1);
                    const Exact exact = differentiate(step);
                    double worst = 0.0;
                    for (const double error :
                         {distance(step.dq, exact.dq), distance(step.dk, exact.dk),
                          distance(step.dv, exact.dv),
                          kind == Kind::kSink ? distance(step.dsinks, exact.dsinks) : 0.0,
                          kind == Kind::kGated ? distance(step.dgate, exact.dgate) : 0.0}) {
                        worst = error <= worst ? worst : error;  // NaN is the worst
                    }
                    if (!(worst <= tolerance)) {
                        std::cerr << isa_name(isa) << " s " << shape.s << " d " << shape.d
                                  << " kind " << static_cast<int>(kind) << " window " << window
                                  << ": ";
                        CHECK_EQ(worst, 0.0);
                    }
                }
            }
        }
    }
    CHECK(set_isa(isa_name(before)));
}

}  // namespace

// The promise of csrc/attention: a relative error of 2e-6 for every input.
TEST(fp32_gradients_agree_with_the_chain_rule_at_every_level) {
    compare_with_the_chain_rule<float>(2e-6);
}

// Output, weights and result are rounded to 8 bits, 2^-9 / sqrt(3) each, and meet in sums.
TEST(bf16_gradients_agree_with_the_chain_rule_at_every_level) {
    compare_with_the_chain_rule<bf16>(6e-3);
}

template <class T>
void compare_threads() {
    const Isa before = active_isa();
    for (const Isa isa : available_isas()) {
        CHECK(set_isa(isa_name(isa)));
        for (const Kind kind : {Kind::kSink, Kind::kVanilla, Kind::kGated}) {
            const Shape shape{1, 6, 3, 150, 300, 48};
            Step<T> alone(shape, kind);
            alone.run(1);
            for (const int threads : {2, 4}) {
                const ThreadPool pool(threads);
                Step<T> together(shape, kind);
                together.run(threads);
                const auto same = [](const std::vector<T>& x, const std::vector<T>& y) {
                    return std::equal(x.begin(), x.end(), y.begin(),
                                      [](T p, T q) { return widen(p) == widen(q); });
                };
                CHECK(same(alone.dq, together.dq));
                CHECK(same(alone.dk, together.dk));
                CHECK(same(alone.dv, together.dv));
                CHECK(kind != Kind::kGated || same(alone.dgate, together.dgate));
                CHECK(kind != Kind::kSink || alone.dsinks == together.dsinks);
            }
        }
    }
    CHECK(set_isa(isa_name(before)));
}

TEST(fp32_gradients_do_not_depend_on_the_number_of_threads) { compare_threads<float>(); }
TEST(bf16_gradients_do_not_depend_on_the_number_of_threads) { compare_threads<bf16>(); }

TEST(gradients_of_empty_batches_queries_and_keys_are_zero) {
    for (const Shape& shape :
         {Shape{0, 2, 1, 4, 4, 16}, Shape{2, 2, 1, 0, 4, 16}, Shape{1, 2, 1, 4, 0, 16}}) {
        Step<float> step(shape, Kind::kSink);
        step.run(1);
        for (const auto& gradient : {step.dq, step.dk, step.dv, step.dsinks}) {
            for (const float x : gradient) {
                CHECK_EQ(x, 0.0F);
            }
        }
    }
}
