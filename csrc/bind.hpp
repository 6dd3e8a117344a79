// What the binding sources share. Python sees one class, `Native(threads, isa)`: a thread pool and the kernels it drives.
//
// A method checks the shapes that memory safety depends on (`check`), then releases the GIL around the kernel call.
// Outputs are arrays that the caller allocated; nothing here allocates results.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "block_types.hpp"
#include "kernels.hpp"

namespace puna {

namespace nb = nanobind;

struct Native {
  ThreadPool pool;
  const Kernels* kernels;
};

template <class Scalar, int Dimensions>
using Array = nb::ndarray<Scalar, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

// Our own callers got a shape wrong: an error rather than a wild read.
inline void check(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// A packed matrix. Keeps its buffer alive; the buffer may be a part of a memory-mapped file.
struct Panels {
  Array<const uint8_t, 1> buffer;
  int type;
  int64_t rows, columns;
};

// The key/value cache of all layers. Keeps its buffer alive, which may be anyone's memory.
struct Cache {
  CacheLayout layout;
  Array<uint8_t, 1> buffer;

  uint8_t* layer(int i) const { return buffer.data() + i * layout.layer_bytes; }
};

// bind_rest.cpp: slots and block tables lead to memory, so each must lie within the cache.
void check_batch(const AttendArgs& args);

// bind_rest.cpp: everything but the linear layers.
void bind_rest(nb::module_& m, nb::class_<Native>& native);
// bind_training.cpp: what stands between the products of training.
void bind_training(nb::class_<Native>& native);
// bpe.cpp: vocabularies, which need no Native.
void bind_bpe(nb::module_& m);

}  // namespace puna
