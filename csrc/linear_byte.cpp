// The linear kernels of byte panels.
#include "linear.hpp"

namespace puna::PUNA_ISA {

const LinearType* find_byte_type(int type) { return LinearTypes<kQ5_0, kQ5_1, kQ8_0, kQ2_K, kQ3_K, kQ5_K, kQ6_K, kQ8_K>::find(type); }

}  // namespace puna::PUNA_ISA
