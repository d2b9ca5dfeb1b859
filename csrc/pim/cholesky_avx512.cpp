#include "pim/cholesky_kernel.h"

namespace quernstone::pim {
namespace avx512 {

constexpr int kLanes = 8;
constexpr int kTileRows = 6;

#include "pim/cholesky_kernel.inl"

}  // namespace avx512

const CholeskyKernels kCholeskyAvx512 = {&avx512::eliminate, &avx512::solve_one, &avx512::solve_together};

}  // namespace quernstone::pim
