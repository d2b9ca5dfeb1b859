#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "bind/array.h"
#include "pim/booster.h"
#include "pim/mapper.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

template <class T>
std::span<const T> span_of(const Array<T>& x, const char* name) {
    const View<const T, 1> found = view<const T, 1>(x, name);
    if (found.extent[0] > 1 && found.stride[0] != 1) {
        raise(invalid(name, "an array with gaps", "one in one run"));
    }
    return {found.data, static_cast<std::size_t>(found.extent[0])};
}

template <class T>
std::span<T> fill(py::array_t<T>& x) {
    return {x.mutable_data(), static_cast<std::size_t>(x.size())};
}

py::tuple boost(const Array<double>& dynamic, const Array<double>& leak,
                const Array<double>& response, const Array<std::int64_t>& group,
                const Array<std::int64_t>& domain, const Array<std::int64_t>& safe,
                const Array<std::int64_t>& first, const Array<double>& volts,
                const Array<double>& hertz, const Array<double>& need, bool adapt,
                const std::array<std::int64_t, 5>& control, const std::array<double, 2>& nominal,
                std::int64_t most_changes) {
    const pim::BoosterArgs args{
        view<const double, 2>(dynamic, "dynamic"),
        view<const double, 1>(leak, "leak"),
        view<const double, 2>(response, "response"),
        span_of(group, "group"),
        span_of(domain, "domain"),
        span_of(safe, "safe"),
        span_of(first, "first"),
        {span_of(volts, "volts"), span_of(hertz, "hertz"), span_of(need, "need")},
        {adapt, control[0], control[1], control[2], control[3], control[4]},
        nominal[0],
        nominal[1]};
    if (most_changes < 0 || most_changes > std::int64_t{1} << 24) {
        raise(invalid("most_changes", most_changes, "0 to 2^24"));
    }
    const auto groups = static_cast<py::ssize_t>(args.domain.size());
    const auto levels = static_cast<py::ssize_t>(args.levels.volts.size());
    const auto zeros = [](auto& x) { std::fill_n(x.mutable_data(), x.size(), 0); };
    py::array_t<double> seconds(groups), joules(groups), worst(args.dynamic.extent[1]);
    py::array_t<std::int64_t> cycles(groups), failures(groups), beyond(groups);
    py::array_t<std::int64_t> at_level({groups, levels});
    zeros(seconds), zeros(joules), zeros(worst), zeros(cycles), zeros(failures), zeros(beyond);
    zeros(at_level);
    std::vector<pim::Change> changes(static_cast<std::size_t>(most_changes));
    pim::BoosterResult out{fill(seconds), fill(joules),
                           fill(cycles),  fill(failures),
                           fill(beyond),  {at_level.mutable_data(), {groups, levels}, {levels, 1}},
                           fill(worst),   changes};
    Status status;
    {
        const py::gil_scoped_release release;
        status = pim::boost(args, out);
    }
    raise(status);
    py::list events;
    for (std::int64_t i = 0; i < std::min(out.changed, most_changes); ++i) {
        const pim::Change& x = changes[static_cast<std::size_t>(i)];
        static constexpr const char* kNames[] = {"level", "failure", "done"};
        events.append(
            py::make_tuple(x.time, x.group, x.level, kNames[static_cast<std::size_t>(x.event)]));
    }
    return py::make_tuple(seconds, joules, cycles, failures, beyond, at_level, worst, events,
                          out.changed);
}

pim::Mapping mapping(const Array<std::int64_t>& level, const Array<std::int64_t>& set,
                     const Array<std::int64_t>& pinned, const Array<double>& weight,
                     const Array<double>& volts, const Array<double>& hertz, std::int64_t groups,
                     std::int64_t places, const std::string& objective) {
    if (objective != "energy" && objective != "latency") {
        raise(invalid("objective", objective.c_str(), "'energy' or 'latency'"));
    }
    return {span_of(level, "level"),
            span_of(set, "set"),
            span_of(pinned, "pinned"),
            span_of(weight, "weight"),
            span_of(volts, "volts"),
            span_of(hertz, "hertz"),
            groups,
            places,
            objective == "energy" ? pim::Objective::kEnergy : pim::Objective::kLatency};
}

}  // namespace

void register_pim_chip(py::module_& m) {
    const auto array = [](const char* name) { return py::arg(name).noconvert(); };
    m.def("boost", &boost, array("dynamic"), array("leak"), array("response"), array("group"),
          array("domain"), array("safe"), array("first"), array("volts"), array("hertz"),
          array("need"), py::arg("adapt"), py::arg("control"), py::arg("nominal"),
          py::arg("most_changes"),
          "seconds, joules, cycles, failures, beyond, at_level, worst, events, number of events. "
          "`control`: patience, relapse, recompute, stall, backoff; `nominal`: V, Hz.");
    using Ints = Array<std::int64_t>;
    using Floats = Array<double>;
    m.def(
        "map_tasks",
        [](const Ints& level, const Ints& set, const Ints& pinned, const Floats& weight,
           const Floats& volts, const Floats& hertz, std::int64_t groups, std::int64_t places,
           const std::string& objective, std::int64_t moves, std::uint64_t seed) {
            const pim::Mapping problem =
                mapping(level, set, pinned, weight, volts, hertz, groups, places, objective);
            py::array_t<std::int64_t> group(level.size());
            const std::span<std::int64_t> out = fill(group);
            double cost = 0.0;
            Status status;
            {
                const py::gil_scoped_release release;
                status = moves < 0 ? pim::solve(problem, out, cost)
                                   : pim::anneal(problem, moves, seed, out, cost);
            }
            raise(status);
            return py::make_tuple(group, cost);
        },
        array("level"), array("set"), array("pinned"), array("weight"), array("volts"),
        array("hertz"), py::arg("groups"), py::arg("places"), py::arg("objective"),
        py::arg("moves"), py::arg("seed"), "Group of each task, cost; moves < 0: the optimum.");
    m.def(
        "mapping_cost",
        [](const Ints& level, const Ints& set, const Ints& pinned, const Floats& weight,
           const Floats& volts, const Floats& hertz, std::int64_t groups, std::int64_t places,
           const std::string& objective, const Ints& group) {
            const pim::Mapping problem =
                mapping(level, set, pinned, weight, volts, hertz, groups, places, objective);
            double cost = 0.0;
            raise(pim::cost(problem, span_of(group, "group"), cost));
            return cost;
        },
        array("level"), array("set"), array("pinned"), array("weight"), array("volts"),
        array("hertz"), py::arg("groups"), py::arg("places"), py::arg("objective"), array("group"),
        "What a mapping costs.");
}

}  // namespace quernstone::bind
