// What the emulator promises to find, planted in kernels of a few lines.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"

extern __shared__ __align__(16) unsigned char qs_shared_memory[];

namespace {

using emulation::Order;

constexpr unsigned kThreads = 64;

float* shared() { return reinterpret_cast<float*>(qs_shared_memory); }

// What a kernel writes to out[kThreads * blocks], or nothing where the launch failed.
template <class Kernel>
std::vector<float> run(Kernel kernel, emulation::Schedule schedule = {}, unsigned blocks = 1,
                       std::size_t bytes = kThreads * sizeof(float)) {
    std::vector<float> out(kThreads * blocks, -1.0F);
    emulation::set_schedule(schedule);
    cudaLaunchConfig_t config;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    void (*entry)(float*) = kernel;
    const cudaError_t error = cudaLaunchKernelEx(&config, entry, out.data());
    emulation::set_schedule({});
    return error == cudaSuccess ? out : std::vector<float>{};
}

bool fails_saying(const std::string& text, void (*kernel)(float*)) {
    const bool failed = run(kernel).empty();
    const std::string said = emulation::last_error();
    if (failed && said.find(text) == std::string::npos) {
        std::cerr << "it says: " << said << "\n";
    }
    return failed && said.find(text) != std::string::npos;
}

__global__ void neighbours(float* out) {
    const unsigned i = threadIdx.x;
    shared()[i] = static_cast<float>(i);
    __syncthreads();
    out[blockIdx.x * kThreads + i] = shared()[(i + 1) % kThreads];
}

__global__ void neighbours_without_a_barrier(float* out) {
    const unsigned i = threadIdx.x;
    shared()[i] = static_cast<float>(i);
    out[i] = shared()[(i + 1) % kThreads];
}

__global__ void overwritten_while_it_is_read(float* out) {
    const unsigned i = threadIdx.x;
    shared()[i] = static_cast<float>(i);
    __syncthreads();
    out[i] = shared()[(i + 1) % kThreads];
    shared()[i] = 100.0F;  // a barrier is missing before
}

__global__ void each_block_on_top_of_the_last(float* out) {
    static float before;
    before = blockIdx.x == 0 ? 0.0F : before;
    out[blockIdx.x * kThreads + threadIdx.x] = before;
    before += 1.0F;
}

__global__ void half_of_a_block_at_a_barrier(float*) {
    if (threadIdx.x < kThreads / 2) {
        __syncthreads();
    }
}

__global__ void two_barriers_for_one(float*) {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void lanes_that_ended(float* out) {
    if (threadIdx.x % 32 < 16) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffU, 1.0F, 16);
    }
}

__global__ void a_lane_outside_the_mask(float* out) {
    if (threadIdx.x % 32 < 16) {
        out[threadIdx.x] = __shfl_xor_sync(0x0000ffffU, 1.0F, 16);
    }
}

__global__ void a_mask_without_its_lane(float*) { __syncwarp(0x0000ffffU); }

__global__ void sum_of_a_warp(float* out) {
    auto x = static_cast<float>(threadIdx.x);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(0xffffffffU, x, lanes);
    }
    out[threadIdx.x] = x + __shfl_sync(0xffffffffU, static_cast<float>(threadIdx.x), 3);
}

__global__ void uninitialised(float* out) { out[threadIdx.x] = shared()[threadIdx.x]; }

alignas(16) const std::array<float, 4 * kThreads> source = [] {
    std::array<float, 4 * kThreads> x{};
    x.fill(7.0F);
    return x;
}();

template <bool kWaits>
__global__ void copies(float* out) {
    float* mine = shared() + 4 * threadIdx.x;
    __pipeline_memcpy_async(mine, source.data() + 4 * threadIdx.x, 16, 8);
    __pipeline_commit();
    if (kWaits) {
        __pipeline_wait_prior(0);
    }
    out[threadIdx.x] = mine[0] + mine[3];
    __pipeline_wait_prior(0);
}

__global__ void copies_and_ends(float*) {
    __pipeline_memcpy_async(shared() + 4 * threadIdx.x, source.data(), 16);
    __pipeline_commit();
}

__global__ void copies_from_the_middle(float*) {
    __pipeline_memcpy_async(shared(), source.data() + 1, 16);
}

TEST(the_emulator_runs_a_block_with_barriers_in_any_order) {
    const std::vector<float> want = run(neighbours, {}, 3);
    CHECK_EQ(want.size(), std::size_t{3 * kThreads});
    CHECK_EQ(want[kThreads + 5], 6.0F);
    CHECK(want == run(neighbours, {Order::kDescending}, 3));
    CHECK(want == run(neighbours, {Order::kShuffled, 1}, 3));
}

TEST(the_emulator_shows_a_missing_barrier_after_a_write) {
    const auto ascending = run(neighbours_without_a_barrier);
    CHECK(std::isnan(ascending[0]));  // read before it was written: poison
    const auto descending = run(neighbours_without_a_barrier, {Order::kDescending});
    CHECK_EQ(descending[0], 1.0F);
}

TEST(the_emulator_shows_a_missing_barrier_after_a_read) {
    const auto ascending = run(overwritten_while_it_is_read);
    const auto descending = run(overwritten_while_it_is_read, {Order::kDescending});
    CHECK_EQ(ascending[0], 1.0F);
    CHECK_EQ(descending[0], 100.0F);
}

TEST(the_emulator_shows_blocks_that_depend_on_their_order) {
    CHECK(run(each_block_on_top_of_the_last, {}, 8) !=
          run(each_block_on_top_of_the_last, {Order::kShuffled, 3}, 8));
}

TEST(the_emulator_reports_divergence) {
    CHECK(
        fails_saying("thread (0, 0, 0) of block (0, 0, 0) waits for its block at "
                     "test_cuda_emulator.cpp",
                     half_of_a_block_at_a_barrier));
    CHECK(fails_saying("thread (32, 0, 0) of block (0, 0, 0) has ended",
                       half_of_a_block_at_a_barrier));
    CHECK(fails_saying("waits for its block", two_barriers_for_one));
    CHECK(fails_saying("waits for its warp", lanes_that_ended));
    CHECK(fails_saying("a lane outside its mask", a_lane_outside_the_mask));
    CHECK(fails_saying("a mask that it is not in", a_mask_without_its_lane));
}

TEST(the_emulator_exchanges_values_of_a_warp) {
    const auto sums = run(sum_of_a_warp);
    CHECK_EQ(sums[7], 499.0F);    // 0 + ... + 31, and lane 3
    CHECK_EQ(sums[40], 1555.0F);  // 32 + ... + 63, and lane 3 of the second warp
}

TEST(the_emulator_spoils_shared_memory_before_each_block) {
    for (const float x : run(uninitialised, {}, 1)) {
        CHECK(std::isnan(x));
    }
    run(neighbours);
    CHECK(std::isnan(run(uninitialised)[3]));
    const auto other = run(uninitialised, {Order::kAscending, 0, 0x11});
    CHECK(other[0] > 0.0F);
}

TEST(the_emulator_copies_when_somebody_waits) {
    constexpr std::size_t kBytes = 4 * kThreads * sizeof(float);
    CHECK_EQ(run(copies<true>, {}, 1, kBytes)[9], 7.0F);  // 7, and a zero of the last 8 bytes
    CHECK(std::isnan(run(copies<false>, {}, 1, kBytes)[9]));
    CHECK(run(copies_and_ends, {}, 1, kBytes).empty());
    CHECK(std::string(emulation::last_error()).find("before its copies") != std::string::npos);
    CHECK(fails_saying("not aligned", copies_from_the_middle));
}

TEST(the_emulator_refuses_shared_memory_that_nobody_asked_for) {
    CHECK(!run(uninitialised, {}, 1, 48 * 1024).empty());
    CHECK(run(uninitialised, {}, 1, 48 * 1024 + 1).empty());
    (void)cudaFuncSetAttribute(uninitialised, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20);
    CHECK(!run(uninitialised, {}, 1, 64 * 1024).empty());
    CHECK(run(uninitialised, {}, 1, 100 * 1024).empty());  // more than the smallest GPU has
}

}  // namespace
