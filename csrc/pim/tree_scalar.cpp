#include "pim/tree_kernel.h"

namespace quernstone::pim {
namespace tree_scalar {

#include "pim/tree_kernel.inl"

}  // namespace tree_scalar

const TreeKernels kTreeScalar = {&tree_scalar::add, &tree_scalar::accumulate};

}  // namespace quernstone::pim
