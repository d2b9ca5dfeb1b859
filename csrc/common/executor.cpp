#include "common/executor.h"

#include <algorithm>
#include <memory>
#include <new>
#include <system_error>

#include "common/parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>

#include <csignal>
#endif

namespace quernstone {
namespace {

std::atomic<int>& workers_in_step() noexcept {
    static std::atomic<int> count{0};
    return count;
}

long this_process() noexcept {
#if defined(__unix__) || defined(__APPLE__)
    return getpid();
#else
    return 0;
#endif
}

// A thread inherits the mask of the one that starts it.
class NoSignals {
   public:
    NoSignals() noexcept {
#if defined(__unix__) || defined(__APPLE__)
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
#endif
    }
    ~NoSignals() {
#if defined(__unix__) || defined(__APPLE__)
        pthread_sigmask(SIG_SETMASK, &before_, nullptr);
#endif
    }
    NoSignals(const NoSignals&) = delete;
    NoSignals& operator=(const NoSignals&) = delete;

   private:
#if defined(__unix__) || defined(__APPLE__)
    sigset_t before_{};
#endif
};

}  // namespace

int threads_left() noexcept {
    return std::max(1, num_threads() - workers_in_step().load(std::memory_order_relaxed));
}

// The count and the number of the parked are each written before the other is read, both in one
// order for all threads: either the one who parks sees the count, or this sees somebody parked.
void Progress::advance(std::uint64_t to) noexcept {
    value_.store(to);
    if (parked_.load() > 0) {
        nudge();
    }
}

void Progress::nudge() noexcept {
    {
        const std::lock_guard lock(mutex_);
    }
    wake_.notify_all();
}

// To destroy a condition would wait for those who are parked there.
void Progress::renew() noexcept {
    std::construct_at(&mutex_);
    std::construct_at(&wake_);
}

bool Worker::forked() const noexcept { return running() && process_ != this_process(); }

Worker::~Worker() {
    end_step();
    if (forked()) {
        std::construct_at(&thread_);  // there is none to join
        arrivals_.renew();
        done_.renew();
    } else if (running()) {
        dropping_.store(true, std::memory_order_release);
        stopping_.store(true, std::memory_order_release);
        arrivals_.nudge();
        thread_.join();
    }
}

Status Worker::start() noexcept {
    if (running()) {
        return {};
    }
    try {
        queue_ = std::make_unique<std::array<Task, kQueue>>();
        const NoSignals blocked;
        thread_ = std::thread([this] { run(); });
        process_ = this_process();
    } catch (const std::bad_alloc&) {
        return no_memory("queue of a worker", static_cast<std::int64_t>(kQueue * sizeof(Task)));
    } catch (const std::system_error&) {
        return {Code::kNoMemory, "worker", "no thread", 0, "one more thread", 0, false};
    }
    return {};
}

void Worker::begin_step() noexcept {
    if (!forked() && !in_step_.exchange(true)) {
        workers_in_step().fetch_add(1);
        arrivals_.nudge();  // from its park, while the work is still being chosen
    }
}

void Worker::end_step() noexcept {
    if (in_step_.exchange(false)) {
        workers_in_step().fetch_sub(1);
    }
}

std::uint64_t Worker::post(const Task& task) noexcept {
    const std::uint64_t index = posted_.load(std::memory_order_relaxed);
    if (forked()) {
        return index;
    }
    if (index >= kQueue) {
        await(index - kQueue + 1);
    }
    (*queue_)[index % kQueue] = task;
    posted_.store(index + 1, std::memory_order_relaxed);
    arrivals_.advance(index + 1);
    return index + 1;
}

void Worker::await(std::uint64_t ticket) noexcept {
    static_cast<void>(await_for(ticket, Clock::duration::max()));
}

bool Worker::await_for(std::uint64_t ticket, Clock::duration most) noexcept {
    return forked() || done_.wait(ticket, true, most, [] { return false; });
}

Status Worker::finish() noexcept {
    await(posted());
    dropping_.store(false, std::memory_order_release);
    if (forked()) {
        return invalid("worker", "a process that was forked", "the one that started it");
    }
    if (!failed()) {
        return {};
    }
    const Status told = error_;
    failed_.store(false, std::memory_order_release);
    return told;
}

void Worker::sleep_until(Clock::time_point time) const noexcept {
    wait_until(time, [this] { return dropping(); });
}

void Worker::run() noexcept {
    for (std::uint64_t next = 0;;) {
        const auto called = [&] {
            return stopping_.load(std::memory_order_acquire) || arrivals_.value() > next;
        };
        const bool spin = in_step_.load(std::memory_order_relaxed);
        // A step that begins wakes it too, so that it spins when the first task arrives.
        static_cast<void>(arrivals_.wait(next + 1, spin, Clock::duration::max(), [&] {
            return stopping_.load(std::memory_order_acquire) ||
                   (!spin && in_step_.load(std::memory_order_relaxed));
        }));
        if (!called()) {
            continue;
        }
        if (arrivals_.value() <= next) {
            return;
        }
        perform((*queue_)[next % kQueue]);
        done_.advance(++next);
    }
}

void Worker::perform(const Task& task) noexcept {
    if (dropping() || failed()) {
        return;
    }
    Status status;
    try {
        status = task();
    } catch (const std::bad_alloc&) {
        status = no_memory("worker", 0);
    } catch (...) {
        status = invalid("worker", "an exception", "none");
    }
    if (!status.ok()) {
        error_ = status;
        failed_.store(true, std::memory_order_release);
    }
}

}  // namespace quernstone
