#include "pim/cholesky_kernel.h"

namespace quernstone::pim {
namespace avx2 {

constexpr int kLanes = 4;
constexpr int kTileRows = 2;

#include "pim/cholesky_kernel.inl"

}  // namespace avx2

const CholeskyKernels kCholeskyAvx2 = {&avx2::eliminate, &avx2::solve_one, &avx2::solve_together};

}  // namespace quernstone::pim
