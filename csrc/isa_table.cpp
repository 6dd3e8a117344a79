// The kernels of one instruction set, as a table. Compiled once per instruction set.
#include "kernels.hpp"

namespace puna::PUNA_ISA {

// Declares each kernel with the type it has in the table; its source defines it in this namespace.
template <class Pointer> struct Pointee;
template <class Function> struct Pointee<Function*> { using type = Function; };
#define PUNA_DECLARE(name) Pointee<decltype(Kernels::name)>::type name;
PUNA_KERNEL_NAMES(PUNA_DECLARE)

#define PUNA_STRING(token) #token
#define PUNA_NAME(token) PUNA_STRING(token)
#define PUNA_ENTRY(name) name,

extern const Kernels kernels;
const Kernels kernels = {PUNA_NAME(PUNA_ISA), PUNA_KERNEL_NAMES(PUNA_ENTRY)};

}  // namespace puna::PUNA_ISA
