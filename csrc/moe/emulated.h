#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "common/executor.h"
#include "moe/experts.h"

// A GPU and its bus that are not there: two workers copy and compute real experts, and then wait
// until the time is up that a device would have taken. Queues, races and results are real, times
// are emulated.
//
// Axes: l layers, t tokens, m hidden width, k tokens of an expert, n rows of a step.
namespace quernstone::moe {

// What a worker did, in seconds of Clock.
struct Record {
    bool transfer = false;
    std::int64_t layer = 0, expert = 0;
    double start = 0.0, end = 0.0;
};

class EmulatedDevice {
   public:
    EmulatedDevice() = default;
    ~EmulatedDevice() { close(); }
    EmulatedDevice(const EmulatedDevice&) = delete;
    EmulatedDevice& operator=(const EmulatedDevice&) = delete;

    // Slots 0..slots[l] - 1 of layer l, and -1..-staging of all. `layers` keep their data, which
    // outlives the device.
    [[nodiscard]] Status open(std::span<const Experts> layers, std::span<const std::int64_t> slots,
                              std::int64_t staging, gemm::Compute compute) noexcept;
    void close() noexcept;

    void begin_step() noexcept;
    void end_step() noexcept;

    // Queues a copy that takes so many seconds; what concerns a slot keeps the order of the calls.
    [[nodiscard]] Status load(std::int64_t layer, std::int64_t expert, std::int64_t slot,
                              double seconds) noexcept;
    // Whether the last load of the slot had not begun and never will.
    [[nodiscard]] bool cancel(std::int64_t layer, std::int64_t slot) noexcept;
    // Queues an expert; rows of x that live until `collect` is done.
    [[nodiscard]] Status compute(std::int64_t layer, std::int64_t expert, std::int64_t slot,
                                 View<const float, 2> x, std::span<const std::int64_t> tokens,
                                 double seconds) noexcept;
    // Whether all that was queued by `compute` is done within a time.
    [[nodiscard]] bool wait(Clock::duration most) noexcept;
    // Waits for it: n rows in the order of the calls, in fp32.
    [[nodiscard]] Status collect(View<const float, 2>& rows) noexcept;
    void abort() noexcept;

    // What was done since the last call, in no order.
    [[nodiscard]] std::vector<Record> take_records() noexcept;
    // Work that took longer than its emulated time.
    [[nodiscard]] std::int64_t late() const noexcept { return late_.load(); }

   private:
    struct Slot {
        std::byte* data = nullptr;
        std::uint64_t loaded = 0, computed = 0;  // last ticket of either worker
        // Emulated ends of the last of each, written before its ticket is done.
        double arrival = 0.0, left = 0.0;
    };
    struct LoadJob {
        Slot* slot;
        std::int64_t layer, expert;
        std::uint64_t ticket, after;  // of this worker, of the other
        double issued, seconds;
    };
    struct ComputeJob {
        Slot* slot;
        View<const float, 2> x;
        std::vector<std::int64_t> tokens;
        std::vector<float> rows;  // [k, m]
        std::int64_t layer, expert;
        std::uint64_t after;
        double issued, seconds;
    };
    enum State : int { kQueued, kBegun, kCancelled };
    using States = std::array<std::atomic<int>, Worker::kQueue>;  // of loads, by ticket

    [[nodiscard]] Slot* find(std::int64_t layer, std::int64_t slot) noexcept;
    [[nodiscard]] std::atomic<int>& state(std::uint64_t ticket) noexcept {
        return (*states_)[ticket % Worker::kQueue];
    }
    [[nodiscard]] Status perform(const LoadJob& job);
    [[nodiscard]] Status perform(ComputeJob& job);
    // Waits until the worker's time is up, notes what was done, and gives the emulated end.
    double settle(const Worker& worker, double free, double seconds, Record record);

    struct Free {
        void operator()(std::byte* p) const noexcept;
    };
    std::vector<Experts> layers_;
    std::vector<std::vector<Slot>> slots_;
    std::vector<Slot> staging_;
    std::unique_ptr<std::byte, Free> memory_;
    std::unique_ptr<States> states_;
    gemm::Compute compute_ = gemm::Compute::kInt8;

    bool in_step_ = false;
    std::deque<ComputeJob> jobs_;  // of a step; each stays where it is until `collect`
    std::vector<float> rows_;
    std::int64_t row_count_ = 0, hidden_ = 0;
    double bus_free_ = 0.0, gpu_free_ = 0.0;  // of one worker each
    std::mutex mutex_;
    std::vector<Record> records_;
    std::atomic<std::int64_t> late_{0};

    Worker bus_, gpu_;
};

}  // namespace quernstone::moe
