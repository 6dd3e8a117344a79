// Scratch memory for the time of one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace puna::PUNA_ISA {

// An uninitialised, aligned array of plain data. Throws std::bad_alloc.
template <typename T>
struct Buffer {
  T* data;

  explicit Buffer(int64_t count) : data(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace puna::PUNA_ISA
