#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace quernstone {

// torch's own thread pool, found when the extension is imported. Absent (a C++
// test binary), everything runs on the calling thread. No pool of ours and no
// OpenMP runtime: two pools in one process starve each other.
struct Pool {
    using Body = void (*)(std::int64_t begin, std::int64_t end, void* context);
    void (*run)(std::int64_t begin, std::int64_t end, std::int64_t grain, Body body,
                void* context) = nullptr;
    int (*threads)() = nullptr;
};

[[nodiscard]] Pool& pool() noexcept;

// Threads that a call from here may use: torch.set_num_threads rules.
[[nodiscard]] int num_threads() noexcept;

// Calls task(i) once for every i in [0, n), each on some thread of the pool,
// in the order of i as threads come free. An exception that left a parallel
// region would end the process, hence nothrow. Results may not depend on who
// takes which i: a task writes only what is its own.
template <class Task>
void parallel_for(std::int64_t n, int threads, Task&& task) noexcept {
    static_assert(std::is_nothrow_invocable_v<Task&, std::int64_t>,
                  "a task that throws would end the process");
    const Pool& p = pool();
    if (n <= 1 || threads <= 1 || p.run == nullptr) {
        for (std::int64_t i = 0; i < n; ++i) {
            task(i);
        }
        return;
    }
    struct Context {
        std::remove_reference_t<Task>* task;
        std::int64_t n;
        std::atomic<std::int64_t> next{0};
    } context{&task, n};
    const auto drain = [](std::int64_t, std::int64_t, void* opaque) {
        auto* c = static_cast<Context*>(opaque);
        for (std::int64_t i = c->next++; i < c->n; i = c->next++) {
            (*c->task)(i);
        }
    };
    p.run(0, threads < n ? threads : n, 1, drain, &context);
}

}  // namespace quernstone
