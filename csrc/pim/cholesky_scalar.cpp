#include "pim/cholesky_kernel.h"

namespace quernstone::pim {
namespace scalar {

constexpr int kLanes = 2;
constexpr int kTileRows = 1;

#include "pim/cholesky_kernel.inl"

}  // namespace scalar

const CholeskyKernels kCholeskyScalar = {&scalar::eliminate, &scalar::solve_one, &scalar::solve_together};

}  // namespace quernstone::pim
