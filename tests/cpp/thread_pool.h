#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#include "common/parallel.h"

// Stands in for torch's pool while it lives: as many threads as asked for, started for every call.
class ThreadPool {
   public:
    explicit ThreadPool(int threads) {
        count() = threads;
        quernstone::pool() = {run, [] { return count(); }};
    }
    ~ThreadPool() { quernstone::pool() = {}; }
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

   private:
    static int& count() {
        static int value = 1;
        return value;
    }

    static void run(std::int64_t begin, std::int64_t end, std::int64_t grain,
                    quernstone::Pool::Body body, void* context) {
        std::vector<std::jthread> workers;
        for (std::int64_t i = begin; i < end; i += grain) {
            workers.emplace_back(body, i, i + grain < end ? i + grain : end, context);
        }
    }
};
