#include <atomic>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "common/executor.h"
#include "common/parallel.h"
#include "runtime_stress.h"
#include "thread_pool.h"

using namespace quernstone;

TEST(a_worker_runs_tasks_in_the_order_in_which_they_were_posted) {
    Worker worker;
    CHECK(worker.start().ok());
    std::vector<int> seen;
    for (int i = 0; i < 1000; ++i) {
        if (i % 100 == 0) {
            worker.begin_step();
        } else if (i % 100 == 50) {
            worker.end_step();
        }
        worker.post(Task([&seen, i] {
            seen.push_back(i);
            return Status{};
        }));
    }
    CHECK(worker.finish().ok());
    CHECK_EQ(seen.size(), std::size_t{1000});
    for (int i = 0; i < 1000; ++i) {
        CHECK_EQ(seen[static_cast<std::size_t>(i)], i);
    }
}

TEST(more_tasks_than_the_queue_holds_wait_for_their_turn) {
    Worker worker;
    CHECK(worker.start().ok());
    std::int64_t count = 0;
    const auto many = static_cast<std::int64_t>(3 * Worker::kQueue + 7);
    for (std::int64_t i = 0; i < many; ++i) {
        worker.post(Task([&count] {
            ++count;
            return Status{};
        }));
    }
    CHECK(worker.finish().ok());
    CHECK_EQ(count, many);
}

TEST(a_failure_drops_what_is_queued_and_is_told_once) {
    Worker worker;
    CHECK(worker.start().ok());
    int ran = 0;
    const auto count = [&ran] {
        ++ran;
        return Status{};
    };
    worker.post(Task(count));
    worker.post(Task([] { return invalid("task", 3, "not", 3); }));
    worker.post(Task(count));
    const Status status = worker.finish();
    CHECK(!status.ok());
    CHECK_EQ(status.got, 3);
    CHECK_EQ(ran, 1);
    worker.post(Task(count));
    CHECK(worker.finish().ok());
    CHECK_EQ(ran, 2);
}

TEST(an_exception_of_a_task_becomes_a_status) {
    Worker worker;
    CHECK(worker.start().ok());
    worker.post(Task([]() -> Status { throw std::runtime_error("no"); }));
    CHECK(worker.finish().code == Code::kInvalid);
    worker.post(Task([]() -> Status { throw std::bad_alloc(); }));
    CHECK(worker.finish().code == Code::kNoMemory);
}

TEST(a_worker_that_waits_ends_early_when_its_queue_is_dropped) {
    Worker worker;
    CHECK(worker.start().ok());
    std::atomic<bool> began{false};
    std::atomic<int> ran{0};
    const auto begin = Clock::now();
    worker.post(Task([&worker, &began] {
        began = true;
        worker.sleep_until(Clock::now() + std::chrono::hours(1));
        return Status{};
    }));
    worker.post(Task([&ran] {
        ++ran;
        return Status{};
    }));
    while (!began) {
    }
    worker.drop();
    CHECK(worker.finish().ok());
    CHECK_EQ(ran.load(), 0);
    CHECK(Clock::now() - begin < std::chrono::minutes(10));
}

TEST(a_worker_is_joined_with_tasks_in_its_queue) {
    std::atomic<int> ran{0};
    {
        Worker worker;
        CHECK(worker.start().ok());
        worker.begin_step();
        worker.post(Task([&worker] {
            worker.sleep_until(Clock::now() + std::chrono::hours(1));
            return Status{};
        }));
        for (int i = 0; i < 100; ++i) {
            worker.post(Task([&ran] {
                ++ran;
                return Status{};
            }));
        }
    }
    CHECK_EQ(ran.load(), 0);
}

TEST(workers_in_a_step_are_taken_from_the_threads_of_the_pool) {
    const ThreadPool pool(4);
    Worker first, second;
    CHECK_EQ(threads_left(), 4);
    first.begin_step();
    first.begin_step();
    CHECK_EQ(threads_left(), 3);
    second.begin_step();
    CHECK_EQ(threads_left(), 2);
    first.end_step();
    second.end_step();
    CHECK_EQ(threads_left(), 4);
    Worker more[6];
    for (Worker& worker : more) {
        worker.begin_step();
    }
    CHECK_EQ(threads_left(), 1);
}

TEST(workers_wait_for_one_another_by_ticket) {
    Worker first, second;
    CHECK(first.start().ok());
    CHECK(second.start().ok());
    std::int64_t value = 0;
    for (int i = 0; i < 500; ++i) {
        const std::uint64_t ticket = first.post(Task([&value] {
            ++value;
            return Status{};
        }));
        const std::uint64_t back = second.post(Task([&first, &value, ticket] {
            first.await(ticket);
            value *= 2;
            value %= 1009;
            return Status{};
        }));
        first.post(Task([&second, back] {
            second.await(back);
            return Status{};
        }));
    }
    CHECK(first.finish().ok());
    CHECK(second.finish().ok());
    std::int64_t want = 0;
    for (int i = 0; i < 500; ++i) {
        want = (want + 1) * 2 % 1009;
    }
    CHECK_EQ(value, want);
}

TEST(every_plan_gives_the_bits_of_the_cpu_alone) { CHECK_EQ(stress::run(3000, 1), 0); }
