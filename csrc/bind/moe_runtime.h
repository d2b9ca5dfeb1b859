#pragma once

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/packed.h"
#include "moe/emulated.h"
#include "moe/runtime.h"

// What a runtime of experts is to Python: who plans and computes, and a device that is not there.
namespace quernstone::bind {

using Ids = Array<std::int64_t>;
using Guessed = std::tuple<std::int64_t, std::int64_t, Ids>;  // layer, distance, [t, c]
using Curve = std::pair<std::vector<double>, std::vector<double>>;

// The device with the arrays that its copies read.
class Emulated {
   public:
    Emulated(const std::vector<std::pair<moe::Experts, Array<std::uint8_t>>>& layers,
             const std::vector<std::int64_t>& slots, std::int64_t staging,
             const std::string& compute);

    void load(std::int64_t layer, std::int64_t expert, std::int64_t slot, double seconds) {
        raise(device_.load(layer, expert, slot, seconds));
    }
    void compute(std::int64_t layer, std::int64_t expert, std::int64_t slot, const Array<float>& x,
                 const Ids& tokens, double seconds);
    Array<float> collect();
    void abort();
    pybind11::list times();

   private:
    std::vector<Array<std::uint8_t>> kept_;  // until the device, which reads there, is gone

   public:
    moe::EmulatedDevice device_;
};

// A layer of one call of the model.
struct StepArgs {
    std::int64_t layer = 0;
    View<const std::int64_t, 2> ids;  // [t, c]
    View<const float, 2> weights;     // [t, c]
    View<const float, 2> scores;      // [t, e]; may be absent
    moe::CpuArgs cpu;
    View<float, 2> out;  // [t, m]
};

// A planner with the memory of the step that it plans.
class Runtime {
   public:
    Runtime(const std::vector<std::pair<std::int64_t, std::int64_t>>& layers, std::int64_t staging,
            const Curve& cpu, const Curve& gpu, double cpu_first, double transfer,
            const std::string& policy, const std::string& cache);

    // (load, expert, slot, tokens) for the device; tokens is None for a load.
    pybind11::list plan(std::int64_t layer, const Ids& ids, const Array<float>& weights,
                        const std::optional<Array<float>>& scores, double now);
    pybind11::list look_ahead(const std::vector<Guessed>& guesses);
    [[nodiscard]] bool room_ahead() const { return planner_.room_ahead(plan_); }
    pybind11::list needless(std::int64_t layer, const Ids& ids, double now);
    void cancelled(std::int64_t layer, std::int64_t expert, std::int64_t slot);
    void compute(const moe::Experts& layout, const Array<std::uint8_t>& packed,
                 const Array<float>& x, const std::string& compute, bool paced);
    void combine(const std::optional<Array<float>>& rows, Array<float>& out);
    void finish() { planner_.finish(plan_); }

    // All of the above on an emulated device, without the lock of Python. Where it fails because
    // Python raised, `take_error` has what.
    [[nodiscard]] Status step(moe::EmulatedDevice& device, StepArgs& args);
    // A step has begun and not come to its end: nobody knows what the device does.
    [[nodiscard]] bool under_way() const { return under_way_; }
    [[nodiscard]] pybind11::object take_error();
    // Layers ahead whose experts a step may fetch, where the bus has room: those that a linear
    // router [e, m] would choose, or what `guess` says, unless it is None.
    void look_so_far(std::int64_t distance);
    void set_router(std::int64_t layer, const std::optional<Array<float>>& router);
    pybind11::object guess = pybind11::none();

    std::int64_t place(std::int64_t layer, std::int64_t expert);
    void clear(std::int64_t layer);
    std::vector<std::int64_t> resident(std::int64_t layer);

    // Resource, start, end, expert, kind, from the start of the layer on.
    [[nodiscard]] pybind11::list predicted() const;
    // Experts, start, end of each stretch of the CPU.
    [[nodiscard]] pybind11::list spans() const;
    [[nodiscard]] double makespan() const { return plan_.ends.makespan; }
    [[nodiscard]] std::int64_t hits() const { return plan_.hits; }
    [[nodiscard]] std::size_t active() const { return plan_.expert.size(); }
    [[nodiscard]] bool on_cpu() const { return !plan_.on_cpu.empty(); }
    [[nodiscard]] bool on_device() const { return plan_.gpu_rows > 0; }
    [[nodiscard]] double right_share(std::int64_t distance) const;

   private:
    [[nodiscard]] Status run(moe::EmulatedDevice& device, StepArgs& args);
    [[nodiscard]] Status look_ahead_in_step(const StepArgs& args);
    [[nodiscard]] bool signalled();
    void keep(const pybind11::error_already_set& error);
    [[nodiscard]] pybind11::list listed() const;
    void expect(std::int64_t layer, std::int64_t expert) const;

    moe::Planner planner_;
    double transfer_;  // seconds of an expert
    moe::LayerPlan plan_;
    moe::Workbench bench_;
    std::vector<moe::Load> loads_;
    std::int64_t distance_ = 0;
    std::vector<std::optional<Array<float>>> routers_;
    std::array<std::vector<std::int64_t>, moe::kMaxDistance> chosen_;
    std::vector<float> room_;
    bool under_way_ = false, asks_ = false;
    pybind11::object error_ = pybind11::none();
};

}  // namespace quernstone::bind
