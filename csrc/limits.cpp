// What this machine can do at best with this instruction set: the floors that measured speeds are held against. Nothing here
// computes anything of use; results go to a volatile, so that the compiler must produce them.
#include "kernels.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {

namespace {

constexpr int kAccumulators = 10;  // enough to hide the latency of a multiply-add on every machine we know
constexpr int kTasksEachThread = 8;
constexpr int kInputs = 32;  // vectors that a loop walks over, so that no product can be moved out of it; they stay in L1
constexpr int64_t kReadChunk = int64_t(1) << 20;
constexpr int kStreams = 4;  // one stream a core doesn't keep enough loads in flight

#if defined(__AVX512VNNI__)
using Bytes = __m512i;
using Sums = __m512i;
constexpr int kIntAccumulators = kAccumulators;
inline Sums add_products(Sums sums, Bytes codes, Bytes activations) { return _mm512_dpbusd_epi32(sums, codes, activations); }
#elif defined(__AVX2__)
using Bytes = __m256i;
using Sums = __m256i;
constexpr int kIntAccumulators = 4;  // a sum waits for an addition only, and as many activations need registers
inline Sums add_products(Sums sums, Bytes codes, Bytes activations) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, activations));
}
#elif defined(__ARM_FEATURE_DOTPROD)
using Bytes = int8x16_t;
using Sums = int32x4_t;
constexpr int kIntAccumulators = kAccumulators;
inline Sums add_products(Sums sums, Bytes codes, Bytes activations) { return vdotq_s32(sums, codes, activations); }
#else
using Bytes = int16_t __attribute__((vector_size(16)));  // without a product of bytes they are multiplied as 16-bit words
using Sums = Bytes;
constexpr int kIntAccumulators = 4;
inline Sums add_products(Sums sums, Bytes codes, Bytes activations) { return sums + codes * activations; }
#endif
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int64_t kProducts = sizeof(Bytes);
#else
constexpr int64_t kProducts = sizeof(Bytes) / 2;
#endif

template <class Value>
void keep(const Value& value) {
  volatile char sink = *reinterpret_cast<const char*>(&value);
  (void)sink;
}

template <class Vector>
void fill(Vector* inputs, int count) {
  for (size_t i = 0; i < count * sizeof(Vector); i++) reinterpret_cast<char*>(inputs)[i] = char(i * 37 % 61);
}

}  // namespace

// Reads `bytes` (a multiple of 64) once.
void read_memory(ThreadPool& pool, const uint8_t* data, int64_t bytes) {
  pool.run(bytes / 64, kReadChunk / 64, [&](int64_t begin, int64_t end, int) {
    using Line = uint64_t __attribute__((vector_size(64)));
    const int64_t each = (end - begin) / kStreams;
    const Line* lines = reinterpret_cast<const Line*>(data) + begin;
    Line sums[kStreams] = {};
    for (int64_t i = 0; i < each; i++)
      for (int s = 0; s < kStreams; s++) {
        __builtin_prefetch(lines + s * each + i + 16);
        sums[s] |= lines[s * each + i];
      }
    for (int64_t i = kStreams * each; i < end - begin; i++) sums[0] |= lines[i];
    const Line sum = (sums[0] | sums[1]) | (sums[2] | sums[3]);
    keep(sum);
  });
}

// Products of 8-bit integers, added up: `rounds` passes a task. Returns the operations done, a product and a sum being two.
int64_t multiply_int8(ThreadPool& pool, int64_t rounds) {
  const int tasks = kTasksEachThread * pool.threads();
  pool.run(tasks, 1, [&](int64_t, int64_t, int) {
    Bytes inputs[kInputs], activations[kIntAccumulators];
    Sums sums[kIntAccumulators];
    fill(inputs, kInputs);
    fill(activations, kIntAccumulators);
    fill(sums, kIntAccumulators);
    for (int64_t round = 0; round < rounds; round++)
      for (int i = 0; i < kInputs; i++)
        for (int a = 0; a < kIntAccumulators; a++) sums[a] = add_products(sums[a], inputs[i], activations[a]);
    for (const Sums& sum : sums) keep(sum);
  });
  return 2 * kProducts * kIntAccumulators * kInputs * rounds * tasks;
}

// The same of float32 products.
int64_t multiply_float32(ThreadPool& pool, int64_t rounds) {
  const int tasks = kTasksEachThread * pool.threads();
  pool.run(tasks, 1, [&](int64_t, int64_t, int) {
    Vec inputs[kInputs], sums[kAccumulators];
    for (int i = 0; i < kInputs; i++) inputs[i] = splat(1.0f / float(i + 1));
    for (int a = 0; a < kAccumulators; a++) sums[a] = splat(float(a));
    const Vec factor = splat(0.5f);
    for (int64_t round = 0; round < rounds; round++)
      for (int i = 0; i < kInputs; i++)
        for (int a = 0; a < kAccumulators; a++) sums[a] = fma(inputs[i], factor, sums[a]);
    for (const Vec& sum : sums) keep(sum);
  });
  return int64_t(2) * kLanes * kAccumulators * kInputs * rounds * tasks;
}

}  // namespace puna::PUNA_ISA
