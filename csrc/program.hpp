// A forward as a list of op calls over numbered buffers, replayed in one native call: puna/ops/native_program.py traces it once
// from the Python forward, and the numbers of tokens and of rows with logits are those of each call.
#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "adapters.hpp"

namespace puna {

// A row-major matrix of float32 with a row for each token of the step, or for each row whose logits are wanted.
struct ProgramBuffer {
  int64_t columns;
  bool of_logit_rows;
};

// What one call brings.
struct StepArgs {
  const Cache& cache;
  int64_t tokens, logit_rows, sequences, max_blocks;
  const int32_t *token_ids, *positions, *slots, *seq_starts, *block_tables, *logit_row_index;
  const AdapterGroups& adapters;
};

// One call under way: where its buffers lie.
struct ProgramRun {
  Native& native;
  const StepArgs& args;
  const std::vector<ProgramBuffer>& buffers;
  const std::vector<float*>& memory;

  float* at(int buffer) const { return memory[size_t(buffer)]; }
  int64_t columns(int buffer) const { return buffers[size_t(buffer)].columns; }
  int64_t rows(int buffer) const { return buffers[size_t(buffer)].of_logit_rows ? args.logit_rows : args.tokens; }
};

class Program {
 public:
  // `result` is the buffer that the caller gives; the others lie in memory of the program's own, which grows to the largest step.
  Program(std::vector<ProgramBuffer> buffers, int result) : buffers_(std::move(buffers)), result_(result) {}
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  using Step = std::function<void(const ProgramRun&)>;
  void add(Step step) { steps_.push_back(std::move(step)); }
  // What a step needs of each call; throws std::invalid_argument.
  using Check = std::function<void(const StepArgs&)>;
  void add_check(Check check) { checks_.push_back(std::move(check)); }
  void check_args(const StepArgs& args) const {
    for (const Check& check : checks_) check(args);
  }
  const ProgramBuffer& buffer(int i) const { return buffers_.at(size_t(i)); }
  int result() const { return result_; }
  size_t num_buffers() const { return buffers_.size(); }
  // Throws std::bad_alloc. Calls from several threads take turns.
  void run(Native& native, const StepArgs& args, float* result);

 private:
  void reserve(size_t bytes);

  std::vector<ProgramBuffer> buffers_;
  int result_;
  std::vector<Step> steps_;
  std::vector<Check> checks_;
  std::mutex mutex_;
  uint8_t* memory_ = nullptr;
  size_t memory_bytes_ = 0;
};

void bind_program(nb::module_& m, nb::class_<Native>& native);

}  // namespace puna
