#include "pim/cholesky_kernel.h"

namespace quernstone::pim {
namespace cholesky_scalar {

constexpr int kLanes = 2;
constexpr int kTileRows = 1;

#include "pim/cholesky_kernel.inl"

}  // namespace cholesky_scalar

const CholeskyKernels kCholeskyScalar = {&cholesky_scalar::eliminate, &cholesky_scalar::solve_one,
                                         &cholesky_scalar::solve_together};

}  // namespace quernstone::pim
