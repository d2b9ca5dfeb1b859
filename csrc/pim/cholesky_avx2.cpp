#include "pim/cholesky_kernel.h"

namespace quernstone::pim {
namespace cholesky_avx2 {

constexpr int kLanes = 4;
constexpr int kTileRows = 2;

#include "pim/cholesky_kernel.inl"

}  // namespace cholesky_avx2

const CholeskyKernels kCholeskyAvx2 = {&cholesky_avx2::eliminate, &cholesky_avx2::solve_one,
                                       &cholesky_avx2::solve_together};

}  // namespace quernstone::pim
