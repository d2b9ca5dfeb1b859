#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

// Runs CUDA kernels on the host, one block after another, each CUDA thread as a fiber that runs until
// its next barrier or shuffle. What a GPU would leave undefined ends the launch with a message:
//
//   - threads of a block, or lanes of a mask, that wait at different places, or have ended while
//     others wait; a mask without the lane that names it
//   - more shared memory than was asked for, or than the smallest GPU we build for has
//   - a copy to shared memory that is not aligned, or that nobody waited for
//
// Races show as results: the order of threads and blocks is that of `set_schedule`, and a missing
// barrier gives other bits in ascending than in descending order. Shared memory is filled with the
// schedule's poison when a block starts, and closed to AddressSanitizer beyond what was asked for.
//
// One launch at a time in a process.
namespace emulation {

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

enum class Order : std::uint8_t { kAscending, kDescending, kShuffled };

struct Schedule {
    Order order = Order::kAscending;
    std::uint64_t seed = 0;       // of kShuffled
    unsigned char poison = 0xff;  // each byte of fresh shared memory: NaN in every type
};

void set_schedule(const Schedule& schedule);

struct Shape {
    dim3 grid, block;
    std::size_t shared_bytes;
};

// Bytes of dynamic shared memory that a kernel may ask for from now on, instead of 48 KiB.
void allow_shared(const void* kernel, std::size_t bytes);

// False: see last_error(). What the kernel wrote until then stays.
[[nodiscard]] bool launch(const Shape& shape, const void* kernel,
                          const std::function<void()>& body);
[[nodiscard]] const char* last_error();

// The calls below are for fibers.

struct Wait {
    enum Kind : std::uint8_t { kBlock, kWarp } kind;
    unsigned mask;    // kWarp: lanes that wait for one another
    unsigned source;  // kWarp: the lane whose bits come back
    std::uint64_t bits;
};

std::uint64_t wait(const Wait& wait, const std::source_location& where);
[[nodiscard]] unsigned lane();

void copy_later(void* to, const void* from, std::size_t bytes, std::size_t zeros);
void commit_copies();
void finish_copies(std::size_t but_the_last);

}  // namespace emulation
