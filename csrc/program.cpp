#include "program.hpp"

#include <sys/mman.h>

#include <new>

namespace puna {

Program::~Program() {
  if (memory_) munmap(memory_, memory_bytes_);
}

void Program::reserve(size_t bytes) {
  if (bytes <= memory_bytes_) return;
  if (memory_) munmap(memory_, memory_bytes_);
  memory_ = nullptr;
  memory_bytes_ = 0;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);  // best effort
#endif
  memory_ = static_cast<uint8_t*>(memory);
  memory_bytes_ = bytes;
}

void Program::run(Native& native, const StepArgs& args, float* result) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<size_t> offsets;
  size_t bytes = 0;
  for (const ProgramBuffer& buffer : buffers_) {
    offsets.push_back(bytes);
    const int64_t rows = buffer.of_logit_rows ? args.logit_rows : args.tokens;
    if (int(offsets.size()) - 1 != result_) bytes += (size_t(rows * buffer.columns) * sizeof(float) + 63) / 64 * 64;
  }
  reserve(bytes);
  std::vector<float*> memory;
  for (const size_t offset : offsets) memory.push_back(reinterpret_cast<float*>(memory_ + offset));
  memory[size_t(result_)] = result;
  const ProgramRun run{native, args, buffers_, memory};
  for (const Step& step : steps_) step(run);
}

}  // namespace puna
