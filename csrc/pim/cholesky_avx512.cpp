#include "pim/cholesky_kernel.h"

namespace quernstone::pim {
namespace cholesky_avx512 {

constexpr int kLanes = 8;
constexpr int kTileRows = 6;

#include "pim/cholesky_kernel.inl"

}  // namespace cholesky_avx512

const CholeskyKernels kCholeskyAvx512 = {&cholesky_avx512::eliminate, &cholesky_avx512::solve_one,
                                         &cholesky_avx512::solve_together};

}  // namespace quernstone::pim
