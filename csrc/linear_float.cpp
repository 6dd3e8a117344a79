// The linear kernels of float panels.
#include "linear.hpp"

namespace puna::PUNA_ISA {

const LinearType* find_float_type(int type) { return LinearTypes<kF32, kF16, kBF16>::find(type); }

}  // namespace puna::PUNA_ISA
