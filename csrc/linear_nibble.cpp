// The linear kernels of 4-bit panels.
#include "linear.hpp"

namespace puna::PUNA_ISA {

const LinearType* find_nibble_type(int type) { return LinearTypes<kQ4_0, kQ4_1, kQ4_K, kIQ4_NL, kIQ4_XS>::find(type); }

}  // namespace puna::PUNA_ISA
