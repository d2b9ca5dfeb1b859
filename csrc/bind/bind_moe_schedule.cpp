#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "bind/moe_names.h"
#include "moe/schedule.h"

namespace py = pybind11;

namespace quernstone::bind {

moe::Policy parse_schedule_policy(const std::string& name) {
    static constexpr std::pair<const char*, moe::Policy> kNames[] = {
        {"fixed", moe::Policy::kFixed},      {"gpu_only", moe::Policy::kGpuOnly},
        {"cpu_only", moe::Policy::kCpuOnly}, {"fiddler", moe::Policy::kFiddler},
        {"list", moe::Policy::kList},        {"event", moe::Policy::kEvent},
        {"hybrid", moe::Policy::kHybrid},    {"exact", moe::Policy::kExact},
    };
    for (const auto& [known, policy] : kNames) {
        if (name == known) {
            return policy;
        }
    }
    raise(invalid("policy", name.c_str(),
                  "'fixed', 'gpu_only', 'cpu_only', 'fiddler', 'list', 'event', 'hybrid' or "
                  "'exact'"));
    return moe::Policy::kHybrid;
}
namespace {

using moe::Layer;
using moe::Policy;
using Times = py::array_t<double, py::array::c_style>;
using Loads = py::array_t<std::int64_t, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

template <class T>
std::span<const T> row(const py::array_t<T, py::array::c_style>& x, const char* ndim) {
    if (x.ndim() != 1) {
        raise(invalid(ndim, x.ndim(), "", 1));
    }
    return {x.data(), static_cast<std::size_t>(x.size())};
}

template <class T>
std::span<T> fill(py::array_t<T>& x) {
    return {x.mutable_data(), static_cast<std::size_t>(x.size())};
}

moe::Workspace& workspace() {
    thread_local moe::Workspace kept;
    return kept;
}

// Free times of the CPU, the GPU and the bus, after the first expert's surcharge.
using Starts = std::array<double, 4>;

Layer layer(const Loads& loads, const Times& ready, const Times& cpu, const Times& gpu,
            const Times& transfer, const Starts& starts) {
    return {row(loads, "loads.ndim"),
            row(ready, "ready.ndim"),
            row(cpu, "cpu.ndim"),
            row(gpu, "gpu.ndim"),
            row(transfer, "transfer.ndim"),
            starts[0],
            starts[1],
            starts[2],
            starts[3]};
}

py::tuple schedule(const Loads& loads, const Times& ready, const Times& cpu, const Times& gpu,
                   const Times& transfer, const Starts& starts, const std::string& policy) {
    const Layer problem = layer(loads, ready, cpu, gpu, transfer, starts);
    const Policy how = parse_schedule_policy(policy);
    const auto n = static_cast<py::ssize_t>(problem.loads.size());
    py::array_t<std::uint8_t> device(n);
    py::array_t<std::int32_t> order(n);
    py::array_t<double> start(n), end(n), transfer_start(n), transfer_end(n);
    const moe::Schedule out{fill(device), fill(order),          fill(start),
                            fill(end),    fill(transfer_start), fill(transfer_end)};
    moe::Ends ends;
    Status status;
    {
        const py::gil_scoped_release release;
        status = moe::schedule(problem, how, workspace(), out, ends);
    }
    raise(status);
    return py::make_tuple(device, order, start, end, transfer_start, transfer_end,
                          py::make_tuple(ends.cpu, ends.gpu, ends.pcie, ends.makespan));
}

// Seconds of one of `calls` schedules of the same layer, without Python.
double seconds_to_schedule(const Loads& loads, const Times& ready, const Times& cpu,
                           const Times& gpu, const Times& transfer, const Starts& starts,
                           const std::string& policy, std::int64_t calls) {
    const Layer problem = layer(loads, ready, cpu, gpu, transfer, starts);
    const Policy how = parse_schedule_policy(policy);
    if (calls < 1) {
        raise(invalid("calls", calls, "at least", 1));
    }
    const std::size_t n = problem.loads.size();
    std::vector<std::uint8_t> device(n);
    std::vector<std::int32_t> order(n);
    std::vector<double> times(4 * n);
    const std::span<double> all(times);
    const moe::Schedule out{device,
                            order,
                            all.subspan(0, n),
                            all.subspan(n, n),
                            all.subspan(2 * n, n),
                            all.subspan(3 * n, n)};
    moe::Ends ends;
    Status status;
    const py::gil_scoped_release release;
    const auto begin = std::chrono::steady_clock::now();
    for (std::int64_t call = 0; call < calls && status.ok(); ++call) {
        status = moe::schedule(problem, how, workspace(), out, ends);
    }
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    const py::gil_scoped_acquire acquire;
    raise(status);
    return spent.count() / static_cast<double>(calls);
}

using PredictedLayer = std::tuple<Loads, Times, Times, Times, Times, Starts, Times>;

py::list prefetch(const std::vector<PredictedLayer>& layers, double budget, std::int64_t limit,
                  const std::string& policy) {
    std::vector<moe::Predicted> predicted;
    std::size_t experts = 0;
    for (const auto& [loads, ready, cpu, gpu, transfer, starts, probability] : layers) {
        predicted.push_back({layer(loads, ready, cpu, gpu, transfer, starts),
                             row(probability, "probability.ndim")});
        experts += predicted.back().layer.loads.size();
    }
    const Policy how = parse_schedule_policy(policy);
    if (limit < 0) {
        raise(invalid("limit", limit, "at least", 0));
    }
    std::vector<moe::Prefetch> found(std::min(experts, static_cast<std::size_t>(limit)));
    std::int64_t count = 0;
    Status status;
    {
        const py::gil_scoped_release release;
        status = moe::prefetch(predicted, budget, how, workspace(), found, count);
    }
    raise(status);
    py::list out;
    for (std::int64_t i = 0; i < count; ++i) {
        const moe::Prefetch& x = found[static_cast<std::size_t>(i)];
        out.append(py::make_tuple(x.layer, x.expert, x.start, x.end, x.drop, x.gain));
    }
    return out;
}

py::tuple cancel(const Times& transfer, const Flags& needed, double elapsed, std::int64_t tiles,
                 double now) {
    static_assert(sizeof(bool) == sizeof(std::uint8_t));
    const std::span<const bool> flags = row(needed, "needed.ndim");
    const moe::Queue queue{row(transfer, "transfer.ndim"),
                           {reinterpret_cast<const std::uint8_t*>(flags.data()), flags.size()},
                           elapsed,
                           tiles,
                           now};
    const auto n = static_cast<py::ssize_t>(queue.transfer.size());
    py::array_t<bool> keep(n);
    py::array_t<double> arrival(n);
    double pcie_free = 0.0;
    raise(moe::cancel(
        queue,
        {{reinterpret_cast<std::uint8_t*>(keep.mutable_data()), static_cast<std::size_t>(n)},
         fill(arrival)},
        pcie_free));
    return py::make_tuple(keep, arrival, pcie_free);
}

}  // namespace

void register_moe_schedule(py::module_& m) {
    const auto array = [](const char* name) { return py::arg(name).noconvert(); };
    m.def("schedule", &schedule, array("loads"), array("ready"), array("cpu"), array("gpu"),
          array("transfer"), py::arg("starts"), py::arg("policy"),
          "Device, order, start, end, transfer_start, transfer_end, "
          "(cpu, gpu, pcie, makespan). `starts`: cpu_first, cpu_free, gpu_free, pcie_free.");
    m.def("seconds_to_schedule", &seconds_to_schedule, array("loads"), array("ready"), array("cpu"),
          array("gpu"), array("transfer"), py::arg("starts"), py::arg("policy"), py::arg("calls"),
          "Seconds of one schedule, without Python.");
    m.def("prefetch", &prefetch, py::arg("layers"), py::arg("budget"), py::arg("limit"),
          py::arg("policy"), "A list of (layer, expert, start, end, drop, gain), best first.");
    m.def("cancel", &cancel, array("transfer"), array("needed"), py::arg("elapsed"),
          py::arg("tiles"), py::arg("now"), "keep, arrival, pcie_free");
}

}  // namespace quernstone::bind
