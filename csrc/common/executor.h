#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>

#include "common/status.h"

// Owned asynchronous workers, for what torch's pool cannot do: work that goes on beside the thread
// that asked for it.
namespace quernstone {

using Clock = std::chrono::steady_clock;

// Whoever waits inside a step spins so long before it parks: parking and waking cost about as much.
inline constexpr std::chrono::microseconds kSpin{100};

// Something to do, by value: a callable of at most kRoom bytes that a copy of its bytes copies.
class Task {
   public:
    static constexpr std::size_t kRoom = 64;

    Task() = default;
    template <class Body>
    explicit Task(const Body& body) noexcept {
        static_assert(sizeof(Body) <= kRoom && std::is_trivially_copyable_v<Body>);
        std::memcpy(room_.data(), &body, sizeof body);
        run_ = [](const std::byte* at) {
            alignas(Body) std::array<std::byte, sizeof(Body)> copy;
            std::memcpy(copy.data(), at, sizeof(Body));
            return (*std::launder(reinterpret_cast<Body*>(copy.data())))();
        };
    }
    [[nodiscard]] Status operator()() const { return run_(room_.data()); }

   private:
    Status (*run_)(const std::byte*) = nullptr;
    alignas(8) std::array<std::byte, kRoom> room_{};
};

// A count that rises; threads wait for it to reach a number. Spins within kSpin, then parks.
class Progress {
   public:
    [[nodiscard]] std::uint64_t value() const noexcept { return value_.load(); }
    void advance(std::uint64_t to) noexcept;
    // Wakes the parked, to look at whatever else they wait for.
    void nudge() noexcept;
    // As new, where those who are parked are no more.
    void renew() noexcept;
    // True when the count is `least`; false after `most`, or as soon as `enough()` after a nudge.
    template <class Enough>
    bool wait(std::uint64_t least, bool spin, Clock::duration most, const Enough& enough) noexcept;

   private:
    std::atomic<std::uint64_t> value_{0};
    std::atomic<int> parked_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// One thread that runs tasks in the order in which they are posted.
//
// Between steps it is parked. From `begin_step` to `end_step` it spins for kSpin before it parks, and
// takes one from the threads that parallel_for may use (threads_left). One thread posts at a time.
// A task that fails, or throws, ends what is queued: the rest is dropped until `finish` has told.
// A process that is forked has the object without the thread: it drops all, and `finish` tells so.
class Worker {
   public:
    static constexpr std::size_t kQueue = 4096;

    Worker() = default;
    ~Worker();  // drops what is queued and joins
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    // Signals are left to the other threads. kNoMemory where the system gives no thread.
    [[nodiscard]] Status start() noexcept;
    [[nodiscard]] bool running() const noexcept { return thread_.joinable(); }

    void begin_step() noexcept;
    void end_step() noexcept;

    // The number of the task, by which others wait for it. Waits where the queue is full.
    std::uint64_t post(const Task& task) noexcept;

    // Until task `ticket` is done or dropped. For tasks of other workers.
    void await(std::uint64_t ticket) noexcept;
    // The same for `most` at most: whether it is.
    [[nodiscard]] bool await_for(std::uint64_t ticket, Clock::duration most) noexcept;
    [[nodiscard]] std::uint64_t posted() const noexcept {
        return posted_.load(std::memory_order_relaxed);
    }
    [[nodiscard]] bool done(std::uint64_t ticket) const noexcept { return done_.value() >= ticket; }

    // Waits for all that is posted, or drops it; the first failure since the last call.
    [[nodiscard]] Status finish() noexcept;
    // Drops what has not begun and asks what has to end, until `finish`.
    void drop() noexcept { dropping_.store(true, std::memory_order_release); }
    // A task that takes long asks whether it should end early.
    [[nodiscard]] bool dropping() const noexcept {
        return dropping_.load(std::memory_order_acquire);
    }
    // Within a task: waits for a time, unless what is queued is dropped. It spins for the last bit.
    void sleep_until(Clock::time_point time) const noexcept;

    // A task has failed that `finish` has not told of yet.
    [[nodiscard]] bool failed() const noexcept { return failed_.load(std::memory_order_acquire); }

   private:
    [[nodiscard]] bool forked() const noexcept;
    void run() noexcept;
    void perform(const Task& task) noexcept;

    std::unique_ptr<std::array<Task, kQueue>> queue_;
    std::atomic<std::uint64_t> posted_{0};
    Progress arrivals_, done_;
    std::atomic<bool> in_step_{false}, stopping_{false}, dropping_{false}, failed_{false};
    Status error_;  // of the first failure; failed_ says whether it is there
    std::thread thread_;
    long process_ = 0;  // that started the thread
};

// Threads for parallel_for beside the workers whose steps are on: one at least.
[[nodiscard]] int threads_left() noexcept;

// Waits for a time and spins for the last bit. `stop()` is asked now and then and ends it early.
template <class Stop>
void wait_until(Clock::time_point time, const Stop& stop) noexcept {
    constexpr std::chrono::milliseconds kSlice{10};
    for (auto now = Clock::now(); now < time && !stop(); now = Clock::now()) {
        const auto left = time - now;
        if (left > kSpin) {
            std::this_thread::sleep_for(left - kSpin < kSlice ? left - kSpin
                                                              : Clock::duration(kSlice));
        }
    }
}

template <class Enough>
bool Progress::wait(std::uint64_t least, bool spin, Clock::duration most,
                    const Enough& enough) noexcept {
    const auto reached = [&] { return value() >= least || enough(); };
    if (reached()) {
        return true;
    }
    if (spin) {
        const auto end = Clock::now() + (most < kSpin ? most : Clock::duration(kSpin));
        do {
            for (int i = 0; i < 64; ++i) {
                if (reached()) {
                    return true;
                }
            }
            std::this_thread::yield();  // whoever it waits for may need this core
        } while (Clock::now() < end);
    }
    std::unique_lock lock(mutex_);
    parked_.fetch_add(1);
    // Without a limit, in long spells: a wait without any needs a newer libstdc++ than wheels may.
    const bool endless = most == Clock::duration::max();
    bool found = wake_.wait_for(lock, endless ? std::chrono::hours(1) : most, reached);
    while (endless && !found) {
        found = wake_.wait_for(lock, std::chrono::hours(1), reached);
    }
    parked_.fetch_sub(1);
    return found;
}

}  // namespace quernstone
