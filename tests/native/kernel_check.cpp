// The kernels on their own, for machines without this Python: cross compiled ones, and emulators.
//
//   kernel_check                          prints the instruction sets this machine can run, best first
//   kernel_check ISA CASES RESULTS        runs every case with 2 threads
//
// A case is its operation's number, the fields that the functions below read in order (int32 or float32 numbers, then arrays),
// and nothing else; results are float32 arrays, one after another. Cases come from test_kernel_check.py and are trusted.
#include <cstdio>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "block_types.hpp"
#include "kernels.hpp"

namespace puna {
namespace {

using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;
using Bytes = std::vector<uint8_t>;

class Cases {
 public:
  explicit Cases(const char* path) : file_(std::fopen(path, "rb"), std::fclose) {
    if (!file_) throw std::runtime_error("the cases cannot be read");
  }

  template <class T>
  std::vector<T> array(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    if (std::fread(values.data(), sizeof(T), values.size(), file_.get()) != values.size()) throw std::runtime_error("the cases end early");
    return values;
  }
  int number() { return array<int32_t>(1)[0]; }
  float real() { return array<float>(1)[0]; }
  bool more() {
    const int next = std::fgetc(file_.get());
    return next != EOF && std::ungetc(next, file_.get()) != EOF;
  }

 private:
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

// As panels and caches are aligned, filled with bytes that make NaN.
struct Memory {
  uint8_t* data;
  explicit Memory(int64_t bytes) : data(static_cast<uint8_t*>(::operator new(size_t(bytes), std::align_val_t(64)))) {
    std::memset(data, 0xff, size_t(bytes));
  }
  ~Memory() { ::operator delete(data, std::align_val_t(64)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

Bytes encoded(Cases& cases, int type, int64_t rows, int64_t columns) {
  const BlockShape shape = block_shape(type);
  return cases.array<uint8_t>(rows * (columns / shape.numbers * shape.bytes));
}

Floats linear(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int type = cases.number(), rows = cases.number(), columns = cases.number(), tokens = cases.number();
  const Bytes source = encoded(cases, type, rows, columns);
  const Floats x = cases.array<float>(int64_t(tokens) * columns);
  const Memory packed(packed_bytes(type, rows, columns));
  kernels.pack(pool, type, rows, columns, source.data(), packed.data);
  Floats out(size_t(tokens) * size_t(rows));
  const LinearTarget target{type, rows, packed.data, nullptr, nullptr, out.data()};
  kernels.linears(pool, x.data(), tokens, columns, &target, 1);
  return out;
}

// One adapter, used by every second token.
Floats low_rank(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int rows = cases.number(), columns = cases.number(), tokens = cases.number(), rank = cases.number();
  const float scale = cases.real();
  const Floats down = cases.array<float>(int64_t(rank) * columns), up = cases.array<float>(int64_t(rank) * rows);
  const Floats x = cases.array<float>(int64_t(tokens) * columns);
  Floats out = cases.array<float>(int64_t(tokens) * rows);
  Ints changed;
  for (int t = 0; t < tokens; t += 2) changed.push_back(t);
  const LowRank change{down.data(), up.data(), rank, scale};
  const AdapterTokens group{0, changed.data(), int64_t(changed.size())};
  const LowRankTarget target{rows, &change, out.data()};
  kernels.add_low_rank(pool, x.data(), columns, &group, 1, &target, 1);
  return out;
}

Floats decode_rows(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int type = cases.number(), rows = cases.number(), columns = cases.number();
  const Bytes source = encoded(cases, type, rows, columns);
  Floats out(size_t(rows) * size_t(columns));
  kernels.decode_rows(pool, type, columns, source.data(), nullptr, rows, out.data());
  return out;
}

Floats rms_norm(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int tokens = cases.number(), columns = cases.number();
  const float eps = cases.real();
  const Floats x = cases.array<float>(int64_t(tokens) * columns), weight = cases.array<float>(columns);
  Floats out(x.size());
  kernels.rms_norm(pool, x.data(), weight.data(), eps, tokens, columns, out.data());
  return out;
}

// The cosines, then the sines.
Floats rope_angles(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int tokens = cases.number(), half = cases.number();
  const float scale = cases.real();
  const std::vector<int32_t> positions = cases.array<int32_t>(tokens);
  const Floats frequencies = cases.array<float>(half);
  const int64_t count = int64_t(tokens) * half;
  Floats out(size_t(2 * count));
  kernels.rope_angles(pool, positions.data(), frequencies.data(), 0, scale, tokens, half, out.data(), out.data() + count);
  return out;
}

Floats rope(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int tokens = cases.number(), heads = cases.number(), head_dim = cases.number();
  const int64_t angles = int64_t(tokens) * head_dim / 2;
  Floats x = cases.array<float>(int64_t(tokens) * heads * head_dim);
  const Floats cosines = cases.array<float>(angles), sines = cases.array<float>(angles);
  kernels.rope(pool, x.data(), cosines.data(), sines.data(), tokens, heads, head_dim);
  return x;
}

Floats swiglu(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int tokens = cases.number(), columns = cases.number();
  const int64_t count = int64_t(tokens) * columns;
  const Floats gate = cases.array<float>(count), up = cases.array<float>(count);
  Floats out(gate.size());
  kernels.swiglu(pool, gate.data(), up.data(), tokens, columns, out.data());
  return out;
}

// One sequence in consecutive blocks, first all its tokens but the last, then that one.
Floats attend(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int type = cases.number(), block_size = cases.number(), heads = cases.number(), kv_heads = cases.number();
  const int head_dim = cases.number(), tokens = cases.number();
  const int64_t width = int64_t(heads) * head_dim, kv_width = int64_t(kv_heads) * head_dim;
  const Floats q = cases.array<float>(tokens * width), k = cases.array<float>(tokens * kv_width), v = cases.array<float>(tokens * kv_width);
  const int blocks = (tokens + block_size - 1) / block_size;
  const CacheLayout layout = cache_layout(type, blocks, block_size, 1, kv_heads, head_dim);
  const Memory cache(blocks * layout.block_bytes);
  Ints positions(static_cast<size_t>(tokens)), table(static_cast<size_t>(blocks));
  for (int i = 0; i < tokens; i++) positions[size_t(i)] = i;
  for (int i = 0; i < blocks; i++) table[size_t(i)] = i;
  Floats out(q.size());
  for (const auto& [begin, end] : {std::pair{0, tokens - 1}, std::pair{tokens - 1, tokens}}) {
    const int32_t starts[] = {0, end - begin};
    const AttendArgs args{
        .q = q.data() + begin * width,
        .k = k.data() + begin * kv_width,
        .v = v.data() + begin * kv_width,
        .out = out.data() + begin * width,
        .layout = &layout,
        .layer = cache.data,
        .heads = heads,
        .positions = positions.data() + begin,
        .slots = positions.data() + begin,
        .seq_starts = starts,
        .block_tables = table.data(),
        .tokens = end - begin,
        .sequences = 1,
        .max_blocks = blocks,
    };
    kernels.attend(pool, args);
  }
  return out;
}

// Two floats: the token, and its logarithmic probability.
Floats sample(const Kernels& kernels, ThreadPool& pool, Cases& cases) {
  const int vocabulary = cases.number(), top_k = cases.number();
  const float temperature = cases.real(), top_p = cases.real(), uniform = cases.real();
  const Floats logits = cases.array<float>(vocabulary);
  int32_t token = -1;
  float logprob = 0;
  SampleRow row{};
  row.temperature = temperature;
  row.top_p = top_p;
  row.typical_p = row.repeat_penalty = 1;
  row.top_k = top_k;
  row.uniform = uniform;
  row.token = &token;
  row.logprob = &logprob;
  kernels.sample(pool, logits.data(), vocabulary, &row, 1);
  return {float(token), logprob};
}

using Operation = Floats (*)(const Kernels&, ThreadPool&, Cases&);
constexpr Operation kOperations[] = {linear, decode_rows, rms_norm, rope, swiglu, attend, sample, low_rank, rope_angles};

void run(const Kernels& kernels, const char* cases_path, const char* results_path) {
  Cases cases(cases_path);
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> results(std::fopen(results_path, "wb"), std::fclose);
  if (!results) throw std::runtime_error("the results cannot be written");
  ThreadPool pool(2);
  while (cases.more()) {
    const int operation = cases.number();
    if (operation < 0 || operation >= int(std::size(kOperations))) throw std::runtime_error("a case has no such operation");
    const Floats out = kOperations[operation](kernels, pool, cases);
    if (std::fwrite(out.data(), sizeof(float), out.size(), results.get()) != out.size()) throw std::runtime_error("writing failed");
  }
}

}  // namespace
}  // namespace puna

int main(int count, char** arguments) {
  using namespace puna;
  if (count == 1) {
    for (const char* name : kInstructionSets)
      if (find_kernels(name)) std::puts(name);
    return 0;
  }
  const Kernels* kernels = count == 4 ? find_kernels(arguments[1]) : nullptr;
  if (!kernels) {
    std::fputs("usage: kernel_check [ISA CASES RESULTS], with an ISA that this machine can run\n", stderr);
    return 2;
  }
  try {
    run(*kernels, arguments[2], arguments[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_check: %s\n", error.what());
    return 1;
  }
  return 0;
}
