#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bind/moe_names.h"
#include "bind/packed.h"
#include "common/executor.h"
#include "common/parallel.h"
#include "moe/emulated.h"
#include "moe/runtime.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

using Ids = Array<std::int64_t>;
using Curve = std::pair<std::vector<double>, std::vector<double>>;

// A Python signal handler has raised: Ctrl-C, for one.
bool signalled(void*) {
    const py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

[[noreturn]] void raise_set_error() { throw py::error_already_set(); }

void raise_or_set(const Status& status) {
    if (PyErr_Occurred() != nullptr) {
        raise_set_error();
    }
    raise(status);
}

moe::CostCurve curve(const Curve& points) { return {points.first, points.second}; }

// Waits for the rows of a step, unless a signal handler raises, and ends the step.
Status collect(moe::EmulatedDevice& device, View<const float, 2>& rows) {
    while (!device.wait(std::chrono::milliseconds(20))) {
        if (signalled(nullptr)) {
            return invalid("step", "an interrupt", "none");
        }
    }
    const Status status = device.collect(rows);
    device.end_step();
    return status;
}

// The device with the arrays that its copies read.
class Emulated {
   public:
    Emulated(const std::vector<std::pair<moe::Experts, Array<std::uint8_t>>>& layers,
             const std::vector<std::int64_t>& slots, std::int64_t staging,
             const std::string& compute) {
        std::vector<moe::Experts> used;
        for (const auto& [layout, packed] : layers) {
            used.push_back(layout);
            used.back().data = packed_bytes(packed, layout.bytes(), "packed");
            kept_.push_back(packed);
        }
        if (slots.size() != layers.size()) {
            raise(invalid("slots", static_cast<std::int64_t>(slots.size()), "as many as layers,",
                          static_cast<std::int64_t>(layers.size())));
        }
        raise(device_.open(used, slots, staging, parse_compute(compute)));
    }

    void load(std::int64_t layer, std::int64_t expert, std::int64_t slot, double seconds) {
        raise(device_.load(layer, expert, slot, seconds));
    }

    void compute(std::int64_t layer, std::int64_t expert, std::int64_t slot, const Array<float>& x,
                 const Ids& tokens, double seconds) {
        const auto rows = rows_of<const float>(x, "x");
        const auto which = view<const std::int64_t, 1>(tokens, "tokens");
        const py::gil_scoped_release release;  // it may wait for room
        raise(device_.compute(layer, expert, slot, rows,
                              {which.data, static_cast<std::size_t>(which.extent[0])}, seconds));
    }

    Array<float> collect() {
        Status status;
        View<const float, 2> rows;
        {
            const py::gil_scoped_release release;
            status = bind::collect(device_, rows);
        }
        raise_or_set(status);
        // Borrowed: `self` is alive as long as the array, and the next step writes there.
        return Array<float>({rows.extent[0], rows.extent[1]}, rows.data,
                            py::cast(this, py::return_value_policy::reference));
    }

    void abort() {
        const py::gil_scoped_release release;
        device_.abort();
        device_.end_step();
    }

    py::list times() {
        py::list out;
        for (const moe::Record& record : device_.take_records()) {
            out.append(py::make_tuple(record.transfer ? "pcie" : "gpu", record.start, record.end,
                                      record.layer, record.expert));
        }
        return out;
    }

   private:
    std::vector<Array<std::uint8_t>> kept_;  // until the device, which reads there, is gone

   public:
    moe::EmulatedDevice device_;
};

// A planner with the memory of the step that it plans.
class Runtime {
   public:
    Runtime(const std::vector<std::pair<std::int64_t, std::int64_t>>& layers, std::int64_t staging,
            const Curve& cpu, const Curve& gpu, double cpu_first, double transfer,
            const std::string& policy, const std::string& cache)
        : planner_(setups(layers), staging, {curve(cpu), curve(gpu), cpu_first, transfer},
                   parse_schedule_policy(policy), parse_cache_policy(cache)),
          transfer_(transfer) {}

    // (load, expert, slot, tokens) for the device; tokens is None for a load.
    py::list plan(std::int64_t layer, const Ids& ids, const Array<float>& weights,
                  const std::optional<Array<float>>& scores, double now) {
        const auto id = view<const std::int64_t, 2>(ids, "ids");
        const auto weight = view<const float, 2>(weights, "weights");
        const auto score =
            scores ? view<const float, 2>(*scores, "scores") : View<const float, 2>{};
        raise(planner_.plan(layer, id, weight, score, now, plan_));
        py::list out;
        for (const moe::Command& command : plan_.commands) {
            const auto i = static_cast<std::size_t>(command.active);
            if (command.load) {
                out.append(py::make_tuple(true, plan_.expert[i], command.slot, py::none()));
                continue;
            }
            const auto begin = static_cast<std::size_t>(plan_.first[i]);
            const Ids tokens(plan_.loads[i], plan_.token.data() + begin);
            out.append(py::make_tuple(false, plan_.expert[i], command.slot, tokens));
        }
        return out;
    }

    py::list look_ahead(const std::vector<std::tuple<std::int64_t, std::int64_t, Ids>>& guesses) {
        std::vector<moe::Guess> given;
        for (const auto& [layer, distance, ids] : guesses) {
            given.push_back({layer, distance, view<const std::int64_t, 2>(ids, "ids")});
        }
        raise(planner_.look_ahead(plan_, given, loads_));
        return listed();
    }

    [[nodiscard]] bool room_ahead() const { return planner_.room_ahead(plan_); }

    py::list needless(std::int64_t layer, const Ids& ids, double now) {
        raise(planner_.needless(layer, view<const std::int64_t, 2>(ids, "ids"), now, loads_));
        return listed();
    }

    void cancelled(std::int64_t layer, std::int64_t expert, std::int64_t slot) {
        expect(layer, expert);
        planner_.cancelled({layer, expert, slot});
    }

    void compute(const moe::Experts& layout, const Array<std::uint8_t>& packed,
                 const Array<float>& x, const std::string& compute, bool paced) {
        moe::Experts experts = layout;
        experts.data = packed_bytes(packed, layout.bytes(), "packed");
        const moe::CpuArgs args{&experts, rows_of<const float>(x, "x"), parse_compute(compute),
                                paced,    paced ? signalled : nullptr,  nullptr};
        Status status;
        {
            const py::gil_scoped_release release;
            status = moe::compute_on_cpu(plan_, args, threads_left(), bench_);
        }
        raise_or_set(status);
    }

    void combine(const std::optional<Array<float>>& rows, Array<float>& out) {
        const auto there = rows ? rows_of<const float>(*rows, "rows") : View<const float, 2>{};
        const auto to = output<float, 2>(out, "out");
        expect_rows(to, "out");
        const py::gil_scoped_release release;
        raise(moe::combine(plan_, bench_, there, to, threads_left()));
    }

    void finish() { planner_.finish(plan_); }

    // From `plan` to `finish` in one call, with nothing guessed about layers to come.
    void step(Emulated& device, std::int64_t layer, const Ids& ids, const Array<float>& weights,
              const std::optional<Array<float>>& scores, double now, const moe::Experts& layout,
              const Array<std::uint8_t>& packed, const Array<float>& x, const std::string& compute,
              Array<float>& out) {
        const auto id = view<const std::int64_t, 2>(ids, "ids");
        const auto weight = view<const float, 2>(weights, "weights");
        const auto score =
            scores ? view<const float, 2>(*scores, "scores") : View<const float, 2>{};
        moe::Experts experts = layout;
        experts.data = packed_bytes(packed, layout.bytes(), "packed");
        const moe::CpuArgs args{
            &experts, rows_of<const float>(x, "x"), parse_compute(compute), true, signalled,
            nullptr};
        const auto to = output<float, 2>(out, "out");
        expect_rows(to, "out");
        Status status;
        {
            const py::gil_scoped_release release;
            status = planner_.plan(layer, id, weight, score, now, plan_);
            if (status.ok()) {
                status = run(device.device_, layer, args, to);
            }
        }
        raise_or_set(status);
    }

    std::int64_t place(std::int64_t layer, std::int64_t expert) {
        expect(layer, expert);
        const std::int64_t slot = planner_.place(layer, expert);
        if (slot == moe::Planner::kNowhere) {
            raise(invalid("expert", expert, "one that finds a slot"));
        }
        return slot;
    }

    void clear(std::int64_t layer) {
        expect(layer, 0);
        planner_.clear(layer);
    }

    std::vector<std::int64_t> resident(std::int64_t layer) {
        expect(layer, 0);
        return planner_.resident(layer);
    }

    // Resource, start, end, expert, kind, from the start of the layer on.
    py::list predicted() const {
        py::list out;
        for (std::size_t i = 0; i < plan_.expert.size(); ++i) {
            const bool there = plan_.device[i] != 0;
            out.append(py::make_tuple(there ? "gpu" : "cpu", plan_.start[i], plan_.end[i],
                                      plan_.expert[i], "compute"));
            if (there && plan_.ready[i] == moe::kNotCached) {
                out.append(py::make_tuple("pcie", plan_.sent[i], plan_.arrived[i], plan_.expert[i],
                                          "transfer"));
            }
        }
        return out;
    }

    // Experts, start, end of each stretch of the CPU.
    py::list spans() const {
        py::list out;
        for (const moe::CpuSpan& span : bench_.spans) {
            std::vector<std::int64_t> experts;
            for (std::size_t i = span.first; i < span.last; ++i) {
                experts.push_back(plan_.expert[static_cast<std::size_t>(plan_.on_cpu[i])]);
            }
            out.append(py::make_tuple(experts, span.start, span.end));
        }
        return out;
    }

    [[nodiscard]] double makespan() const { return plan_.ends.makespan; }
    [[nodiscard]] std::int64_t hits() const { return plan_.hits; }
    [[nodiscard]] std::size_t active() const { return plan_.expert.size(); }
    [[nodiscard]] bool on_cpu() const { return !plan_.on_cpu.empty(); }
    [[nodiscard]] bool on_device() const { return plan_.gpu_rows > 0; }
    [[nodiscard]] double right_share(std::int64_t distance) const {
        if (distance < 1 || distance > moe::kMaxDistance) {
            raise(invalid("distance", distance, "1 to", moe::kMaxDistance));
        }
        return planner_.right_share(distance);
    }

   private:
    // What is planned.
    [[nodiscard]] Status run(moe::EmulatedDevice& device, std::int64_t layer,
                             const moe::CpuArgs& args, View<float, 2> out) {
        for (const moe::Command& command : plan_.commands) {
            const auto i = static_cast<std::size_t>(command.active);
            if (command.load) {
                QS_TRY(device.load(layer, plan_.expert[i], command.slot, transfer_));
                continue;
            }
            const std::span tokens(plan_.token.data() + plan_.first[i],
                                   static_cast<std::size_t>(plan_.loads[i]));
            QS_TRY(
                device.compute(layer, plan_.expert[i], command.slot, args.x, tokens, plan_.gpu[i]));
        }
        QS_TRY(planner_.look_ahead(plan_, {}, loads_));
        for (const moe::Load& load : loads_) {
            QS_TRY(device.load(load.layer, load.expert, load.slot, transfer_));
        }
        if (on_cpu()) {
            QS_TRY(moe::compute_on_cpu(plan_, args, threads_left(), bench_));
        }
        View<const float, 2> there;
        QS_TRY(collect(device, there));
        QS_TRY(moe::combine(plan_, bench_, on_device() ? there : View<const float, 2>{}, out,
                            threads_left()));
        planner_.finish(plan_);
        return {};
    }

    static std::vector<moe::LayerSetup> setups(
        const std::vector<std::pair<std::int64_t, std::int64_t>>& layers) {
        std::vector<moe::LayerSetup> out;
        for (const auto& [experts, slots] : layers) {
            out.push_back({experts, slots});
        }
        return out;
    }

    void expect(std::int64_t layer, std::int64_t expert) const {
        if (layer < 0 || layer >= planner_.layers()) {
            raise(invalid("layer", layer, "0 or more and below", planner_.layers()));
        }
        if (expert < 0 || expert >= planner_.experts(layer)) {
            raise(invalid("expert", expert, "0 or more and below", planner_.experts(layer)));
        }
    }

    py::list listed() const {
        py::list out;
        for (const moe::Load& load : loads_) {
            out.append(py::make_tuple(load.layer, load.expert, load.slot));
        }
        return out;
    }

    moe::Planner planner_;
    double transfer_;  // seconds of an expert
    moe::LayerPlan plan_;
    moe::Workbench bench_;
    std::vector<moe::Load> loads_;
};

// Seconds of each round trip to a worker that is parked when its task is posted.
std::vector<double> seconds_of_round_trips(std::int64_t count) {
    Worker worker;
    raise(worker.start());
    std::vector<double> found;
    for (std::int64_t i = 0; i < count; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        const auto begin = Clock::now();
        worker.await(worker.post(Task([] { return Status{}; })));
        found.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    }
    return found;
}

}  // namespace

void register_moe_runtime(py::module_& m) {
    m.def("seconds_of_round_trips", &seconds_of_round_trips, py::arg("count"),
          py::call_guard<py::gil_scoped_release>(), "To a worker that is parked, each by itself.");

    py::class_<Emulated>(m, "EmulatedDevice", "Two workers that copy and compute, and wait.")
        .def(py::init<const std::vector<std::pair<moe::Experts, Array<std::uint8_t>>>&,
                      const std::vector<std::int64_t>&, std::int64_t, const std::string&>(),
             py::arg("layers"), py::arg("slots"), py::arg("staging"), py::arg("compute"))
        .def("begin", [](Emulated& self) { self.device_.begin_step(); })
        .def("load", &Emulated::load, py::arg("layer"), py::arg("expert"), py::arg("slot"),
             py::arg("seconds"))
        .def("cancel", [](Emulated& self, std::int64_t layer,
                          std::int64_t slot) { return self.device_.cancel(layer, slot); })
        .def("compute", &Emulated::compute, py::arg("layer"), py::arg("expert"), py::arg("slot"),
             py::arg("x").noconvert(), py::arg("tokens").noconvert(), py::arg("seconds"))
        .def("collect", &Emulated::collect)
        .def("abort", &Emulated::abort)
        .def("times", &Emulated::times)
        .def_property_readonly("late", [](const Emulated& self) { return self.device_.late(); });

    py::class_<Runtime>(m, "Runtime", "Plans steps and computes the CPU's share of them.")
        .def(py::init<const std::vector<std::pair<std::int64_t, std::int64_t>>&, std::int64_t,
                      const Curve&, const Curve&, double, double, const std::string&,
                      const std::string&>(),
             py::arg("layers"), py::arg("staging"), py::arg("cpu"), py::arg("gpu"),
             py::arg("cpu_first"), py::arg("transfer"), py::arg("policy"), py::arg("cache"))
        .def("plan", &Runtime::plan, py::arg("layer"), py::arg("ids").noconvert(),
             py::arg("weights").noconvert(), py::arg("scores").noconvert().none(true),
             py::arg("now"), "Commands for the device: (load, expert, slot, tokens).")
        .def("look_ahead", &Runtime::look_ahead, py::arg("guesses"), "(layer, expert, slot)")
        .def("needless", &Runtime::needless, py::arg("layer"), py::arg("ids").noconvert(),
             py::arg("now"), "(layer, expert, slot)")
        .def("cancelled", &Runtime::cancelled, py::arg("layer"), py::arg("expert"), py::arg("slot"))
        .def("compute", &Runtime::compute, py::arg("layout"), py::arg("packed").noconvert(),
             py::arg("x").noconvert(), py::arg("compute"), py::arg("paced"))
        .def("combine", &Runtime::combine, py::arg("rows").noconvert().none(true),
             py::arg("out").noconvert())
        .def("finish", &Runtime::finish)
        .def("step", &Runtime::step, py::arg("device"), py::arg("layer"),
             py::arg("ids").noconvert(), py::arg("weights").noconvert(),
             py::arg("scores").noconvert().none(true), py::arg("now"), py::arg("layout"),
             py::arg("packed").noconvert(), py::arg("x").noconvert(), py::arg("compute"),
             py::arg("out").noconvert(), "All of the above, without prefetching.")
        .def("place", &Runtime::place, py::arg("layer"), py::arg("expert"))
        .def("clear", &Runtime::clear, py::arg("layer"))
        .def("resident", &Runtime::resident, py::arg("layer"))
        .def("predicted", &Runtime::predicted)
        .def("spans", &Runtime::spans)
        .def("right_share", &Runtime::right_share, py::arg("distance"))
        .def_property_readonly("makespan", &Runtime::makespan)
        .def_property_readonly("hits", &Runtime::hits)
        .def_property_readonly("active", &Runtime::active)
        .def_property_readonly("on_cpu", &Runtime::on_cpu)
        .def_property_readonly("on_device", &Runtime::on_device)
        .def_property_readonly("room_ahead", &Runtime::room_ahead);
}

}  // namespace quernstone::bind
