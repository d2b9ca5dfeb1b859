#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <span>

#include "common/status.h"

// Which device computes each activated expert of a mixture-of-experts layer,
// in which order, and what crosses the bus for it (HybriMoE, arXiv 2504.05897).
// See README.md.
//
// Axes: n activated experts of a layer, q transfers in a queue. Every time is a
// double in one unit of the caller's.
namespace quernstone::moe {

inline constexpr std::int64_t kMaxExperts = 1024;
inline constexpr double kMaxTime = 1e100;  // no sum of kMaxExperts of them overflows
inline constexpr double kNotCached = std::numeric_limits<double>::infinity();

enum class Policy : std::uint8_t {
    kFixed,    // cached on the GPU, the others on the CPU
    kGpuOnly,  // everything on the GPU, moved on demand
    kCpuOnly,
    kFiddler,  // per expert the cheaper of CPU and transfer + GPU
    kList,     // one list, the GPU from its front and the CPU from its back
    kEvent,    // event simulation of the three timelines
    kHybrid,   // the best of kList, kEvent and sorted partitions, then local exchange
    kExact,    // the optimum; effort and memory may grow exponentially
};

enum class Device : std::uint8_t { kCpu, kGpu };

struct Layer {
    std::span<const std::int64_t> loads;  // [n] tokens, 1 or more
    // [n] when the weights are on the GPU: 0 cached, later while in flight,
    // kNotCached where they would have to be moved
    std::span<const double> ready;
    std::span<const double> cpu, gpu, transfer;  // [n] cost of each expert
    double cpu_first = 0.0;                      // on top for the first expert of the CPU
    double cpu_free = 0.0, gpu_free = 0.0;       // when the device is idle
    // When the bus is idle; never before the last arrival in flight.
    double pcie_free = 0.0;
};

// Where each timeline ends (at its *_free where it has nothing to do), and
// when the last expert is done, 0 where there is none.
struct Ends {
    double cpu = 0.0, gpu = 0.0, pcie = 0.0, makespan = 0.0;
};

struct Schedule {
    std::span<std::uint8_t> device;                  // [n] a Device
    std::span<std::int32_t> order;                   // [n] place in the queue of its device
    std::span<double> start, end;                    // [n]; cpu_first is within the first interval
    std::span<double> transfer_start, transfer_end;  // [n] NaN where nothing is moved
};

struct Search;

// Scratch of one thread: some 300 kB, made once. Only kExact allocates beside it.
class Workspace {
   public:
    Workspace() noexcept;  // check ready() before use
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    [[nodiscard]] bool ready() const noexcept { return search_ != nullptr; }
    [[nodiscard]] Search& search() const noexcept { return *search_; }

   private:
    std::unique_ptr<Search> search_;
};

// Checks every length and number first. A policy chooses the partition; every
// partition is laid out in the same order, the best for it. Depends on nothing
// but the arguments.
[[nodiscard]] Status schedule(const Layer& layer, Policy policy, Workspace& workspace,
                              const Schedule& out, Ends& ends) noexcept;

inline constexpr std::int64_t kMaxDistance = 3;

// A layer that is still to come, as its gates predict it.
struct Predicted {
    Layer layer;
    std::span<const double> probability;  // [n] that the layer will really use the expert
};

struct Prefetch {
    std::int32_t layer = 0, expert = 0;  // indices into the predictions and its experts
    double start = 0.0, end = 0.0;       // within the budget
    double drop = 0.0;                   // of the layer's makespan, if the prediction is right
    double gain = 0.0;                   // drop times probability
};

// Transfers worth their time on an idle bus, best first: the greatest gain per
// time, the layer scheduled anew by `policy` for each candidate, again after
// each choice. The transfers end within `budget` and are no more than
// out.size(). Cost: candidates x chosen in one layer x schedule().
[[nodiscard]] Status prefetch(std::span<const Predicted> layers, double budget, Policy policy,
                              Workspace& workspace, std::span<Prefetch> out,
                              std::int64_t& count) noexcept;

// Transfers queued on the bus, the first to go first.
struct Queue {
    std::span<const double> transfer;      // [q] time on the bus
    std::span<const std::uint8_t> needed;  // [q] the layer, or one after it, does use the expert
    double elapsed = 0.0;                  // what the first has spent on the bus; 0: not begun
    std::int64_t tiles = 1;                // parts after which a transfer can be stopped
    double now = 0.0;
};

struct Kept {
    std::span<std::uint8_t> keep;  // [q]
    std::span<double> arrival;     // [q] kNotCached where dropped
};

// Drops what is not needed and can still be stopped: all that has not begun, and
// the first at the end of its tile. The rest arrives in the order of the queue;
// `pcie_free` is when the bus has done it.
[[nodiscard]] Status cancel(const Queue& queue, const Kept& out, double& pcie_free) noexcept;

}  // namespace quernstone::moe
