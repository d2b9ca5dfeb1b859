#pragma once

#include <cstdint>

// What an instruction-set level gives the sparse Cholesky solver.
namespace quernstone::pim {

// Right-hand sides that are solved together, side by side in memory.
inline constexpr std::int64_t kTogether = 16;
// Rows of a front are padded to this.
inline constexpr std::int64_t kPad = 16;

// The factor as plain pointers, since the levels share no function.
struct Panels {
    std::int64_t supernodes;
    const std::int32_t* first;
    const std::int64_t* rows_begin;
    const std::int32_t* rows;
    const std::int64_t* panel_begin;
    const double* values;
};

struct CholeskyKernels {
    // Eliminates the first `columns` of a front [size, size], column by column `stride` apart with
    // rows of zero up to the stride: they become L with reciprocals on the diagonal, and the rest is
    // what they leave. Only the lower triangle means anything. Returns the column whose pivot is not
    // positive, or -1.
    std::int64_t (*eliminate)(double* front, std::int64_t stride, std::int64_t size,
                              std::int64_t columns);
    // L L^T x = x in place; `room` holds as many numbers as a panel has rows.
    void (*solve_one)(const Panels& factor, double* x, double* room);
    // The same of x [n, kTogether].
    void (*solve_together)(const Panels& factor, double* x);
};

extern const CholeskyKernels kCholeskyScalar, kCholeskyAvx2, kCholeskyAvx512;

}  // namespace quernstone::pim
