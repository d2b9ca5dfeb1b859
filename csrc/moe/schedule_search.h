#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "common/status.h"
#include "moe/schedule.h"

// What the files of the scheduler share; nobody else includes it.
namespace quernstone::moe {

using Index = std::int32_t;
template <class T>
using Column = std::array<T, static_cast<std::size_t>(kMaxExperts)>;
using Partition = Column<std::uint8_t>;  // by place in the list: 1 on the GPU

// The experts of a layer in the order in which the GPU takes them: those whose
// weights it has or is about to have, by arrival; then those to be moved, by
// Johnson's rule. The CPU takes from the back. All columns are by place.
struct List {
    Index n = 0;
    Index available = 0;  // places before it need no transfer
    double cpu_first = 0.0, cpu_free = 0.0, gpu_free = 0.0, bus_free = 0.0;
    Column<Index> expert;
    Column<std::int64_t> load;
    Column<double> ready;  // arrival, for available places
    Column<double> cpu, gpu, transfer;

    void make(const Layer& layer) noexcept;
    [[nodiscard]] Ends evaluate(const Partition& on_gpu) const noexcept;
};

// A partition of the places before one: where it leaves the three timelines,
// and the least makespan that the others can make of it.
struct Label {
    double cpu, gpu, bus;
    double bound;
    std::uint32_t step;  // label of the place before it, times 2, + 1: last place on the GPU
};

struct LabelMemory {
    std::size_t width = 0;                 // labels that stay at each place
    bool trims = false;                    // to the width; or else the search ends there
    std::span<Label> now, runs;            // [2 width]
    std::span<std::uint32_t> steps;        // of all labels that stayed
    std::span<std::uint32_t> order, rank;  // [2 width]
    std::span<double> tree;                // [2 width]
};

// A relaxation of what is still open, of one machine beside the CPU.
struct Relaxed {
    Column<Index> order;
    Column<double> ratio, cpu, other;
};

inline constexpr std::size_t kWidth = 16;
// A makespan that is better by less than this share is the same but for rounding.
inline constexpr double kRounding = 1e-12;

struct Search {
    List list;
    Partition best;
    Ends ends;

    // Scratch of the policies.
    Partition trial;
    Column<Index> by_load;   // places: available ones, then the others, each by load
    Column<Index> queue;     // experts that the GPU of the event simulation may take
    Column<double> arrival;  // of a place in the event simulation
    Column<Index> cheapest;  // places of each kind, cheapest for the CPU first
    // Without a of the available experts, without b of the others.
    std::array<double, kMaxExperts + 1> gpu_available, cpu_available;
    std::array<double, kMaxExperts + 1> flow, gpu_moved, cpu_moved;
    std::array<Relaxed, 2> relaxed;
    std::array<Label, 2 * kWidth> labels, label_runs;
    std::array<std::uint32_t, kMaxExperts * kWidth> steps;
    Column<std::size_t> first_step;  // of a place
    std::array<std::uint32_t, 2 * kWidth> label_order, label_rank;
    std::array<double, 2 * kWidth> label_tree;

    // Of a prefetch: arrivals as chosen so far.
    std::array<Column<double>, kMaxDistance> arrivals;
    std::array<Column<double>, kMaxDistance> drops;

    void sort_by_load() noexcept;
    // Takes `trial` where it is done earlier than `best`.
    void offer() noexcept;
};

void assign_list(Search& search) noexcept;    // to trial
void assign_event(Search& search) noexcept;   // to trial
void search_hybrid(Search& search) noexcept;  // to best
// Dynamic programming over the list, to best, which a feasible partition has to
// be in already. False where labels had to be dropped for want of room, so that
// there may be something better.
bool search_labels(Search& search, const LabelMemory& memory) noexcept;
[[nodiscard]] Status search_exact(Search& search) noexcept;

// The partition of `policy` to best and ends; the layer has been checked.
[[nodiscard]] Status choose(const Layer& layer, Policy policy, Search& search) noexcept;
[[nodiscard]] Status check(const Layer& layer) noexcept;

}  // namespace quernstone::moe
