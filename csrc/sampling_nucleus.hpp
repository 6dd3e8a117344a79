// Where a probability of top-p is reached among many thousands of tokens.
//
// A sample of the tokens brackets the logit at which that happens, one passage over the row sums what is above the bracket and
// collects what is in it, and only among the latter does a quickselect decide. That passage also tells whether the bracket was
// right, so the sample decides nothing but the time.
#pragma once

#include "sampling_row.hpp"

namespace puna::PUNA_ISA {

constexpr int kSampled = 4;  // tokens of each block
constexpr int kUnroll = 4;   // vectors summed side by side, so that none waits for the one before

struct Bracket {
  float low, high;
};

// Sets `masses` to those of the tokens >= bracket.high. Those in the bracket become candidates, weighed.
inline Candidates split(Row& row, Bracket bracket) {
  const float low = bracket.low > -kLargest ? bracket.low : -kLargest;
  const Vec scale = splat(row.scale()), peak = splat(row.peak);
  int64_t count = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    row.masses[b] = 0;
    if (!(row.maxima[b] >= low)) continue;
    const uint64_t above = block_at_least(row.block[b], bracket.high);
    row.add(count, b, block_at_least(row.block[b], low) & ~above);
    if (!above) continue;
    Vec sum = zero();
    for (int i = 0; i < kBlock; i += kLanes) {
      const Vec x = load(row.block[b] + i);
      sum = sum + zero_where_less(x, splat(bracket.high), exp_clamped((x - peak) * scale));
    }
    row.masses[b] = double(reduce_add(sum));
  }
  Candidates c{row.memory, count};
  row.weigh(c);
  return c;
}

struct Nucleus {
  Row& row;
  int64_t count;  // of sampled tokens
  float total;    // their weight

  // Room for sampled tokens, in whole steps of the loops.
  static int64_t room(int64_t blocks) { return (blocks * kSampled / (kUnroll * kLanes) + 1) * (kUnroll * kLanes); }

  explicit Nucleus(Row& of) : row(of), count(room(of.blocks)), total(0) {
    for (int64_t i = row.blocks * kSampled; i < count; ++i) row.samples[i] = -kInfinity;
    for (int64_t b = 0; b < row.blocks; ++b) std::memcpy(row.samples + b * kSampled, row.block[b], kSampled * sizeof(float));
    const Vec scale = splat(row.scale()), peak = splat(row.peak);
    Vec sum = zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec weight = exp_clamped((load(row.samples + i) - peak) * scale);
      store(row.samples + i, weight);
      sum = sum + weight;
    }
    total = reduce_add(sum);
  }

  // The sum of weights, to some power of 1 or 2, of the sampled tokens below a logit.
  template <int Power>
  float tail(float logit) const {
    const Vec bound = splat(float(row.weight(double(logit))));
    Vec sums[kUnroll];
    for (Vec& sum : sums) sum = zero();
    for (int64_t i = 0; i < count; i += kUnroll * kLanes) {
      PUNA_UNROLL
      for (int j = 0; j < kUnroll; ++j) {
        const Vec weight = load(row.samples + i + j * kLanes), term = Power == 1 ? weight : weight * weight;
        sums[j] = sums[j] + (term - zero_where_less(weight, bound, term));
      }
    }
    return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  // Two near logits; the sampled tokens below the first weigh less than `mass`, those below the second as much or more. The
  // ends of the search count as such.
  Bracket around(float mass, int steps) const {
    float low = float(double(row.peak) - 32 * row.temperature), high = row.peak;
    for (int step = 0; step < steps; ++step) {
      const float middle = low + (high - low) / 2;
      (tail<1>(middle) < mass ? low : high) = middle;
    }
    return {low, high};
  }

  // Of the logit above which all tokens but a mass of `rest` are, as many standard deviations to both sides as `width` says.
  Bracket bracket(double rest, float width) const {
    const float mass = float(rest / (kBlock / kSampled));
    const float deviation = width * (__builtin_sqrtf(tail<2>(around(mass, 7).high)) + 1e-3f * mass);
    return {mass - deviation > 0 ? around(mass - deviation, 12).low : -kInfinity,
            mass + deviation < total ? around(mass + deviation, 12).high : kInfinity};
  }

  // The last of the most probable tokens that together reach `mass` of `all`. Sets `masses` to theirs.
  Candidate find(double mass, double all) const {
    for (float width = 2;; width = width < 10 ? 4 * width : kInfinity) {  // at last, every token
      const Candidates c = split(row, bracket(all - mass, width));
      const double above = row.total_mass();
      const bool within = above < mass && above + total_weight(c) >= mass;
      if (!within && width < kInfinity) continue;
      const int64_t last = select_by_mass(c, mass - above, false);
      for (int64_t i = 0; i <= last; ++i) row.masses[c.at[i].id / kBlock] += c.at[i].weight;
      return c.at[last];
    }
  }
};

}  // namespace puna::PUNA_ISA
