#include "bind/moe_runtime.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <span>

#include "bind/moe_names.h"
#include "common/executor.h"
#include "common/parallel.h"
#include "moe/router.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

// A Python signal handler has raised: Ctrl-C, for one.
bool signalled(void*) {
    const py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

void raise_or_set(const Status& status) {
    if (PyErr_Occurred() != nullptr) {
        throw py::error_already_set();
    }
    raise(status);
}

moe::CostCurve curve(const Curve& points) { return {points.first, points.second}; }

std::vector<moe::LayerSetup> setups(
    const std::vector<std::pair<std::int64_t, std::int64_t>>& layers) {
    std::vector<moe::LayerSetup> out;
    for (const auto& [experts, slots] : layers) {
        out.push_back({experts, slots});
    }
    return out;
}

std::vector<moe::Guess> given(const std::vector<Guessed>& guesses) {
    std::vector<moe::Guess> out;
    for (const auto& [layer, distance, ids] : guesses) {
        out.push_back({layer, distance, view<const std::int64_t, 2>(ids, "ids")});
    }
    return out;
}

// Waits for the rows of a step, unless a signal handler raises, and ends the step.
Status collect(moe::EmulatedDevice& device, View<const float, 2>& rows, bool (*interrupted)(void*),
               void* context) {
    while (!device.wait(std::chrono::milliseconds(20))) {
        if (interrupted(context)) {
            return invalid("step", "an interrupt", "none");
        }
    }
    const Status status = device.collect(rows);
    device.end_step();
    return status;
}

}  // namespace

Emulated::Emulated(const std::vector<std::pair<moe::Experts, Array<std::uint8_t>>>& layers,
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

void Emulated::compute(std::int64_t layer, std::int64_t expert, std::int64_t slot,
                       const Array<float>& x, const Ids& tokens, double seconds) {
    const auto rows = rows_of<const float>(x, "x");
    const auto which = view<const std::int64_t, 1>(tokens, "tokens");
    const py::gil_scoped_release release;  // it may wait for room
    raise(device_.compute(layer, expert, slot, rows,
                          {which.data, static_cast<std::size_t>(which.extent[0])}, seconds));
}

Array<float> Emulated::collect() {
    Status status;
    View<const float, 2> rows;
    {
        const py::gil_scoped_release release;
        status = bind::collect(device_, rows, bind::signalled, nullptr);
    }
    raise_or_set(status);
    // Borrowed: `self` is alive as long as the array, and the next step writes there.
    return Array<float>({rows.extent[0], rows.extent[1]}, rows.data,
                        py::cast(this, py::return_value_policy::reference));
}

void Emulated::abort() {
    const py::gil_scoped_release release;
    device_.abort();
    device_.end_step();
}

py::list Emulated::times() {
    py::list out;
    for (const moe::Record& record : device_.take_records()) {
        out.append(py::make_tuple(record.transfer ? "pcie" : "gpu", record.start, record.end,
                                  record.layer, record.expert));
    }
    return out;
}

Runtime::Runtime(const std::vector<std::pair<std::int64_t, std::int64_t>>& layers,
                 std::int64_t staging, const Curve& cpu, const Curve& gpu, double cpu_first,
                 double transfer, const std::string& policy, const std::string& cache)
    : planner_(setups(layers), staging, {curve(cpu), curve(gpu), cpu_first, transfer},
               parse_schedule_policy(policy), parse_cache_policy(cache)),
      transfer_(transfer),
      routers_(layers.size()) {}

py::list Runtime::plan(std::int64_t layer, const Ids& ids, const Array<float>& weights,
                       const std::optional<Array<float>>& scores, double now) {
    const auto id = view<const std::int64_t, 2>(ids, "ids");
    const auto weight = view<const float, 2>(weights, "weights");
    const auto score = scores ? view<const float, 2>(*scores, "scores") : View<const float, 2>{};
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

py::list Runtime::look_ahead(const std::vector<Guessed>& guesses) {
    raise(planner_.look_ahead(plan_, given(guesses), loads_));
    return listed();
}

py::list Runtime::needless(std::int64_t layer, const Ids& ids, double now) {
    raise(planner_.needless(layer, view<const std::int64_t, 2>(ids, "ids"), now, loads_));
    return listed();
}

void Runtime::cancelled(std::int64_t layer, std::int64_t expert, std::int64_t slot) {
    expect(layer, expert);
    planner_.cancelled({layer, expert, slot});
}

void Runtime::compute(const moe::Experts& layout, const Array<std::uint8_t>& packed,
                      const Array<float>& x, const std::string& compute, bool paced) {
    moe::Experts experts = layout;
    experts.data = packed_bytes(packed, layout.bytes(), "packed");
    const moe::CpuArgs args{&experts, rows_of<const float>(x, "x"),      parse_compute(compute),
                            paced,    paced ? bind::signalled : nullptr, nullptr};
    Status status;
    {
        const py::gil_scoped_release release;
        status = moe::compute_on_cpu(plan_, args, threads_left(), bench_);
    }
    raise_or_set(status);
}

void Runtime::combine(const std::optional<Array<float>>& rows, Array<float>& out) {
    const auto there = rows ? rows_of<const float>(*rows, "rows") : View<const float, 2>{};
    const auto to = output<float, 2>(out, "out");
    expect_rows(to, "out");
    const py::gil_scoped_release release;
    raise(moe::combine(plan_, bench_, there, to, threads_left()));
}

std::int64_t Runtime::place(std::int64_t layer, std::int64_t expert) {
    expect(layer, expert);
    const std::int64_t slot = planner_.place(layer, expert);
    if (slot == moe::Planner::kNowhere) {
        raise(invalid("expert", expert, "one that finds a slot"));
    }
    return slot;
}

void Runtime::clear(std::int64_t layer) {
    expect(layer, 0);
    planner_.clear(layer);
    under_way_ = false;
}

std::vector<std::int64_t> Runtime::resident(std::int64_t layer) {
    expect(layer, 0);
    return planner_.resident(layer);
}

py::list Runtime::predicted() const {
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

py::list Runtime::spans() const {
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

double Runtime::right_share(std::int64_t distance) const {
    if (distance < 1 || distance > moe::kMaxDistance) {
        raise(invalid("distance", distance, "1 to", moe::kMaxDistance));
    }
    return planner_.right_share(distance);
}

Status Runtime::step(moe::EmulatedDevice& device, StepArgs& args) {
    device.begin_step();
    asks_ = !guess.is_none();
    const double now = std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
    if (distance_ > 0) {
        // What is wrong with the ids, `plan` says.
        const Status found = planner_.needless(args.layer, args.ids, now, loads_);
        for (const moe::Load& load : loads_) {
            if (found.ok() && device.cancel(load.layer, load.slot)) {
                planner_.cancelled(load);
            }
        }
    }
    const Status planned =
        planner_.plan(args.layer, args.ids, args.weights, args.scores, now, plan_);
    if (planned.code == Code::kInvalid) {
        device.end_step();
        return planned;
    }
    under_way_ = true;
    QS_TRY(planned);
    QS_TRY(run(device, args));
    planner_.finish(plan_);
    under_way_ = false;
    return {};
}

// What is planned.
Status Runtime::run(moe::EmulatedDevice& device, StepArgs& args) {
    for (const moe::Command& command : plan_.commands) {
        const auto i = static_cast<std::size_t>(command.active);
        if (command.load) {
            QS_TRY(device.load(args.layer, plan_.expert[i], command.slot, transfer_));
            continue;
        }
        const std::span tokens(plan_.token.data() + plan_.first[i],
                               static_cast<std::size_t>(plan_.loads[i]));
        QS_TRY(device.compute(args.layer, plan_.expert[i], command.slot, args.cpu.x, tokens,
                              plan_.gpu[i]));
    }
    QS_TRY(look_ahead_in_step(args));
    for (const moe::Load& load : loads_) {
        QS_TRY(device.load(load.layer, load.expert, load.slot, transfer_));
    }
    const auto stop = [](void* self) { return static_cast<Runtime*>(self)->signalled(); };
    if (on_cpu()) {
        args.cpu.interrupted = stop;
        args.cpu.context = this;
        QS_TRY(moe::compute_on_cpu(plan_, args.cpu, threads_left(), bench_));
    }
    View<const float, 2> there;
    QS_TRY(bind::collect(device, there, stop, this));
    return moe::combine(plan_, bench_, on_device() ? there : View<const float, 2>{}, args.out,
                        threads_left());
}

Status Runtime::look_ahead_in_step(const StepArgs& args) {
    if (distance_ == 0 || !room_ahead()) {
        return planner_.look_ahead(plan_, {}, loads_);
    }
    if (asks_) {
        const py::gil_scoped_acquire acquire;
        try {
            const auto guesses = guess().cast<std::vector<Guessed>>();
            return planner_.look_ahead(plan_, given(guesses), loads_);
        } catch (const py::error_already_set& error) {
            keep(error);
            return invalid("router", "an exception", "none");
        }
    }
    const std::int64_t tokens = args.ids.extent[0], choices = args.ids.extent[1];
    std::vector<moe::Guess> guesses;
    const std::int64_t last = std::min(args.layer + distance_, planner_.layers() - 1);
    for (std::int64_t layer = args.layer + 1; layer <= last; ++layer) {
        const auto& router = routers_[static_cast<std::size_t>(layer)];
        if (!router) {
            continue;
        }
        const auto rows = view<const float, 2>(*router, "router");
        QS_TRY(same("router.shape[1]", rows.extent[1], "", args.cpu.x.extent[1]));
        const std::int64_t distance = layer - args.layer;
        auto& ids = chosen_[static_cast<std::size_t>(distance - 1)];
        ids.resize(static_cast<std::size_t>(tokens * choices));
        const View<std::int64_t, 2> to{ids.data(), {tokens, choices}, {choices, 1}};
        room_.resize(static_cast<std::size_t>(rows.extent[0]));
        moe::choose(rows, args.cpu.x, planner_.experts(layer), to, room_);
        guesses.push_back({layer, distance, {ids.data(), to.extent, to.stride}});
    }
    return planner_.look_ahead(plan_, guesses, loads_);
}

void Runtime::look_so_far(std::int64_t distance) {
    if (distance < 0 || distance > moe::kMaxDistance) {
        raise(invalid("distance", distance, "0 to", moe::kMaxDistance));
    }
    distance_ = distance;
}

void Runtime::set_router(std::int64_t layer, const std::optional<Array<float>>& router) {
    expect(layer, 0);
    if (router) {
        const auto rows = rows_of<const float>(*router, "router");
        if (rows.extent[0] < 1 || rows.extent[0] > planner_.experts(layer)) {
            raise(invalid("router.shape[0]", rows.extent[0], "1 to", planner_.experts(layer)));
        }
    }
    routers_[static_cast<std::size_t>(layer)] = router;
}

bool Runtime::signalled() {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() == 0) {
        return false;
    }
    keep(py::error_already_set());
    return true;
}

void Runtime::keep(const py::error_already_set& error) {
    error_ = error.value();
    if (error.trace()) {
        PyException_SetTraceback(error_.ptr(), error.trace().ptr());
    }
}

py::object Runtime::take_error() { return std::exchange(error_, py::none()); }

py::list Runtime::listed() const {
    py::list out;
    for (const moe::Load& load : loads_) {
        out.append(py::make_tuple(load.layer, load.expert, load.slot));
    }
    return out;
}

void Runtime::expect(std::int64_t layer, std::int64_t expert) const {
    if (layer < 0 || layer >= planner_.layers()) {
        raise(invalid("layer", layer, "0 or more and below", planner_.layers()));
    }
    if (expert < 0 || expert >= planner_.experts(layer)) {
        raise(invalid("expert", expert, "0 or more and below", planner_.experts(layer)));
    }
}

namespace {

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
        .def("look_so_far", &Runtime::look_so_far, py::arg("distance"))
        .def("set_router", &Runtime::set_router, py::arg("layer"),
             py::arg("router").noconvert().none(true), "[e, m], or None.")
        .def_readwrite("guess", &Runtime::guess, "() -> [(layer, distance, ids)], or None.")
        .def("take_error", &Runtime::take_error, "What was raised within a step, or None.")
        .def_property_readonly("under_way", &Runtime::under_way)
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
