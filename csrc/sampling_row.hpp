// One row of logits in blocks of 64, read from memory once. What is kept of each block, its maximum and its mass (the sum of
// e^logit), tells which of them can matter.
//
// Order is decided on float32 logits. The mass of a block is summed in float32, everything else in float64.
#pragma once

#include <cmath>

#include "sampling_select.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {

constexpr int kBlock = 64;
constexpr int kRun = 64;  // blocks: 16 KB, half of a first-level cache
constexpr float kLargest = 3.4028234663852886e38f;

// e^z in float64 for z <= 0, to about 1e-15; 0 below -708.
inline double exp_negative(double z) {
  const double clamped = z > -708.0 ? z : -708.0;
  const double shifted = clamped * 1.4426950408889634 + 0x1.8p52;  // the nearest integer is in the low bits
  const double n = shifted - 0x1.8p52;
  const double r = (clamped - n * 0x1.62e42ffp-1) - n * -0x1.718432a1b0e26p-35;  // ln 2 in two parts
  double series = r * (1.0 / 479001600.0) + 1.0 / 39916800.0;                    // Taylor's, to r^12 / 12!
  series = series * r + 1.0 / 3628800.0;
  series = series * r + 1.0 / 362880.0;
  series = series * r + 1.0 / 40320.0;
  series = series * r + 1.0 / 5040.0;
  series = series * r + 1.0 / 720.0;
  series = series * r + 1.0 / 120.0;
  series = series * r + 1.0 / 24.0;
  series = series * r + 1.0 / 6.0;
  series = series * r + 0.5;
  series = series * r + 1.0;
  series = series * r + 1.0;
  const double power = bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023) << 52);
  return z > -708.0 ? series * power : 0.0;
}

// e^z in float32 for z <= 0, to a few units of the last place. What is below e^-80 counts as that: such terms vanish beside the
// peak's own 1. As exp() of simd.hpp, without what only other arguments need.
inline Vec exp_clamped(Vec z) {
  using Bits = uint32_t __attribute__((vector_size(sizeof(Vec))));
  const Vec shift = splat(0x1.8p23f), clamped = max(z, splat(-80.0f));
  const Vec shifted = fma(clamped, splat(1.44269504f), shift);  // the nearest integer is in the low bits
  const Vec r = fma(shifted - shift, splat(-0.693147181f), clamped);
  Vec p = fma(splat(0.00138144670593f), r, splat(0.00836878041118f));
  p = fma(p, r, splat(0.0416683942109f));
  p = fma(p, r, splat(0.166665201078f));
  p = fma(p, r, splat(0.499999934125f));
  p = fma(fma(p, r, splat(1.0f)), r, splat(1.0f));
  return bit_cast<Vec>(bit_cast<Bits>(p) + (bit_cast<Bits>(shifted) << 23));
}

// NaN counts as -inf, +inf as the largest number.
inline float finite(float x) { return x == x ? (x < kLargest ? x : kLargest) : -kInfinity; }

// The bits of a block's logits that are >= bound.
inline uint64_t block_at_least(const float* x, float bound) {
  uint64_t bits = 0;
  for (int i = 0; i < kBlock; i += kLanes) bits |= uint64_t(at_least(load(x + i), splat(bound))) << i;
  return bits;
}

// A row, and the memory to work on it. Blocks are read where they are; one that is changed is copied first.
struct Row {
  const float** block;  // [blocks]
  float* copies;        // [blocks, kBlock]
  float* maxima;        // of each block
  float* sums;          // of e^(logit - run_peaks) over each block
  float* run_peaks;     // the largest logit of each run of kRun blocks
  double* masses;       // of each block: the sum of e^scaled over the tokens in the running
  float* samples;       // weights of some tokens, see sampling_nucleus.hpp
  int32_t* counts;
  Candidate* memory;
  int64_t vocabulary, blocks;
  const float* logits;  // as they were given
  float peak;           // the largest logit
  double log_total;     // log of the sum of e^logit, where it is wanted
  double temperature;
  float summed_scale;   // what logits were multiplied by in `sums`; 0: there are none

  float at(int64_t id) const { return block[id / kBlock][id % kBlock]; }

  // The place to write a block's logits to.
  float* writable(int64_t b) {
    float* copy = copies + b * kBlock;
    if (block[b] != copy) {
      const int64_t rest = vocabulary - b * kBlock;
      for (int i = 0; i < kBlock; ++i) copy[i] = i < rest ? finite(block[b][i]) : -kInfinity;
      block[b] = copy;
    }
    return copy;
  }

  bool is_changed(int64_t b) const { return block[b] == copies + b * kBlock; }

  void find_maximum(int64_t b) {
    Vec top = load(block[b]);
    for (int i = kLanes; i < kBlock; i += kLanes) top = max(top, load(block[b] + i));
    maxima[b] = reduce_max(top);
  }

  float largest(int64_t first, int64_t end) const {
    float top = -kInfinity;
    for (int64_t b = first; b < end; ++b) top = maxima[b] > top ? maxima[b] : top;
    return top;
  }

  int64_t run_end(int64_t first) const { return first + kRun < blocks ? first + kRun : blocks; }

  // The blocks, their maxima and, unless `scale` is 0, their sums, in one passage through memory: a run of blocks at a time, so
  // that the second look at it finds it in the cache.
  void read(const float* from, float scale) {
    logits = from;
    summed_scale = scale;
    for (int64_t first = 0; first < blocks; first += kRun) {
      read_run(first, run_end(first));
      if (scale > 0) sum_run(first, scale);
    }
    peak = largest(0, blocks);
  }

  // Sets `log_total`. Needs sums at a scale of 1.
  void find_log_total() {
    double total = 0;
    for (int64_t first = 0; first < blocks; first += kRun) {
      double sum = 0;
      for (int64_t b = first; b < run_end(first); ++b) sum += double(sums[b]);
      if (sum > 0) total += sum * exp_negative(double(run_peaks[first / kRun]) - double(peak));
    }
    log_total = peak > -kInfinity ? double(peak) + std::log(total) : 0.0;
  }

  // Blocks first to end and their maxima.
  void read_run(int64_t first, int64_t end) {
    Vec zeros = zero();  // becomes NaN with NaN and infinities
    for (int64_t b = first; b < end; ++b) {
      block[b] = logits + b * kBlock;
      if ((b + 1) * kBlock > vocabulary) writable(b);
      for (int i = 0; i < kBlock; i += kLanes) zeros = fma(load(block[b] + i), zero(), zeros);
      find_maximum(b);
    }
    if (reduce_add(zeros) != 0)
      for (int64_t b = first; b < end; ++b) {
        writable(b);
        find_maximum(b);
      }
  }

  // The sums of the run of blocks from `first`, logits multiplied by `scale`.
  void sum_run(int64_t first, float scale) {
    const int64_t end = run_end(first);
    const float top = largest(first, end);
    run_peaks[first / kRun] = top;
    for (int64_t b = first; b < end; ++b) {
      sums[b] = 0;
      if (maxima[b] == -kInfinity) continue;
      Vec sum = zero();
      for (int i = 0; i < kBlock; i += kLanes) sum = sum + exp_clamped((load(block[b] + i) - splat(top)) * splat(scale));
      sums[b] = reduce_add(sum);
    }
  }

  double scaled(double logit) const { return (logit - double(peak)) / temperature; }

  double weight(double logit) const { return exp_negative(scaled(logit)); }

  float scale() const { return float(std::fmin(1.0 / temperature, double(kLargest))); }

  // Sets `masses` to those of whole blocks. What has been read is used where it still holds.
  void weigh_blocks() {
    for (int64_t first = 0; first < blocks; first += kRun) {
      const int64_t end = run_end(first);
      bool stale = summed_scale != scale();
      for (int64_t b = first; b < end; ++b) stale = stale || is_changed(b);
      if (stale) sum_run(first, scale());
      const double ratio = weight(double(run_peaks[first / kRun]));
      for (int64_t b = first; b < end; ++b) masses[b] = ratio * double(sums[b]);
    }
  }

  double total_mass() const {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += masses[b];
    return total;
  }

  // The first token of the largest logit.
  int32_t most_probable() const {
    int64_t b = 0;
    while (maxima[b] != peak) ++b;
    int i = 0;
    while (block[b][i] != peak) ++i;
    return int32_t(b * kBlock + i);
  }

  // Every token of a finite logit >= bound, with weight 1, in order of ids.
  Candidates collect(float bound) const {
    bound = bound > -kLargest ? bound : -kLargest;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b)
      if (maxima[b] >= bound) add(count, b, block_at_least(block[b], bound));
    return {memory, count};
  }

  // The tokens of a block whose bits are set.
  void add(int64_t& count, int64_t b, uint64_t bits) const {
    for (; bits; bits &= bits - 1) {
      const int i = __builtin_ctzll(bits);
      memory[count++] = {double(block[b][i]), 1.0, int32_t(b * kBlock + i)};
    }
  }

  // Whether only a part of the blocks has logits >= bound, so that those are better looked at one by one.
  bool is_few(float bound) const {
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) count += maxima[b] >= bound;
    return count * 8 <= blocks;
  }

  // At least the `count` most probable tokens and those that tie with them, where there are as many.
  Candidates collect_at_least(int64_t count) const {
    if (count > blocks) return collect(-kInfinity);
    // As many groups of blocks hold a logit of at least the count-th largest maximum, so no smaller one is among the first.
    // With several times as many groups as tokens hardly more tokens than needed are above that bound.
    int64_t group = blocks / (4 * count);
    group = group < 1 ? 1 : group;
    int64_t groups = 0;
    for (int64_t first = 0; first < blocks; first += group)
      memory[groups++] = {double(largest(first, first + group < blocks ? first + group : blocks)), 1.0, int32_t(first)};
    return collect(float(select_by_count({memory, groups}, count)));
  }

  void weigh(Candidates& c) const {
    constexpr int kAtOnce = 16;  // so that the compiler makes vectors of them
    double weights[kAtOnce];
    for (int64_t first = 0; first < c.count; first += kAtOnce) {
      const int64_t count = first + kAtOnce < c.count ? kAtOnce : c.count - first;
      for (int i = 0; i < kAtOnce; ++i) weights[i] = i < count ? scaled(c.at[first + i].key) : 0;
      for (double& z : weights) z = exp_negative(z);
      for (int64_t i = 0; i < count; ++i) c.at[first + i].weight = weights[i];
    }
    keep_where(c, [](const Candidate& candidate) { return candidate.weight > 0; });
  }

  // The token, in order of ids, at which the mass of those in the running exceeds `target`. In the running are the tokens that
  // precede `least` or are it; `masses` are theirs. A block is chosen by its mass, and within it a token by the weights' shares.
  int32_t choose_in_blocks(const Candidate& least, double target) const {
    int32_t last = most_probable();  // where rounding leaves none
    double mass = 0;
    for (int64_t b = 0; b < blocks; mass += masses[b++]) {
      if (mass + masses[b] <= target) continue;
      double weights[kBlock], sum = 0;
      for (int i = 0; i < kBlock; ++i) {
        const Candidate token{double(block[b][i]), weight(double(block[b][i])), int32_t(b * kBlock + i)};
        weights[i] = precedes(least, token) ? 0 : token.weight;
        sum += weights[i];
      }
      const double share = std::fmax((target - mass) / masses[b], 0.0) * sum;
      double before = 0;
      for (int i = 0; i < kBlock; ++i) {
        if (before + weights[i] > before) last = int32_t(b * kBlock + i);
        before += weights[i];
        if (before > share) return last;
      }
    }
    return last;
  }
};

}  // namespace puna::PUNA_ISA
