// Choosing tokens: puna/ops/reference_sampling.py, which specifies every step, without sorting the vocabulary.
//
// The maximum of each 64 logits tells which of them can matter; the logits above a bound become candidates; and among
// candidates a quickselect by mass finds where a cumulative probability is reached. Order is decided on float32 logits, masses
// are float64.
#include <cmath>

#include "buffer.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {

namespace {

constexpr int kBlock = 64;
constexpr int kRun = 64;  // blocks: 16 KB, half of a first-level cache
constexpr float kLargest = 3.4028234663852886e38f;

// A token in the running. Those of larger key, then of lower id, come first.
struct Candidate {
  double key, weight;
  int32_t id;
};

struct Candidates {
  Candidate* at;
  int64_t count;
};

bool precedes(const Candidate& a, const Candidate& b) { return a.key > b.key || (a.key == b.key && a.id < b.id); }

void swap(Candidate& a, Candidate& b) {
  const Candidate c = a;
  a = b;
  b = c;
}

// ---- selection ----

// Puts some candidate of [low, high) where sorting would, those that precede it before it; returns its place.
int64_t partition(Candidate* at, int64_t low, int64_t high) {
  const int64_t middle = low + (high - low) / 2, last = high - 1;
  if (precedes(at[middle], at[low])) swap(at[middle], at[low]);
  if (precedes(at[last], at[low])) swap(at[last], at[low]);
  if (precedes(at[middle], at[last])) swap(at[middle], at[last]);  // the median of the three is last
  const Candidate pivot = at[last];
  int64_t place = low;
  for (int64_t i = low; i < last; ++i)
    if (precedes(at[i], pivot)) swap(at[i], at[place++]);
  swap(at[place], at[last]);
  return place;
}

// The place, in sorted order, of the first candidate at which the cumulative weight reaches `target` (or exceeds it, where
// `exceed`); the last where none does. What precedes it is moved before it.
int64_t select_by_mass(Candidates c, double target, bool exceed) {
  const auto reached = [=](double mass) { return exceed ? mass > target : mass >= target; };
  int64_t low = 0, high = c.count;
  double before = 0;
  while (low < high) {
    const int64_t place = partition(c.at, low, high);
    double mass = before;
    for (int64_t i = low; i < place; ++i) mass += c.at[i].weight;
    if (reached(mass)) {
      high = place;
    } else if (reached(mass + c.at[place].weight)) {
      return place;
    } else {
      before = mass + c.at[place].weight;
      low = place + 1;
    }
  }
  return low > 0 ? low - 1 : 0;
}

// The first `count` candidates to the front, when every weight is 1; returns their least key.
double select_by_count(Candidates c, int64_t count) { return c.at[select_by_mass(c, double(count), false)].key; }

void sort(Candidate* at, int64_t low, int64_t high) {
  while (high - low > 1) {
    const int64_t place = partition(at, low, high);
    if (place - low < high - place) {
      sort(at, low, place);
      low = place + 1;
    } else {
      sort(at, place + 1, high);
      high = place;
    }
  }
}

template <typename Condition>
void keep_where(Candidates& c, const Condition& condition) {
  int64_t kept = 0;
  for (int64_t i = 0; i < c.count; ++i)
    if (condition(c.at[i])) c.at[kept++] = c.at[i];
  c.count = kept;
}

double total_weight(Candidates c) {
  double total = 0;
  for (int64_t i = 0; i < c.count; ++i) total += c.at[i].weight;
  return total;
}

// ---- logits of one row ----

// Vectors of float64, as wide as Vec.
constexpr int kWideLanes = kLanes / 2;
using Wide = double __attribute__((vector_size(kWideLanes * 8)));
using WideBits = uint64_t __attribute__((vector_size(kWideLanes * 8)));
using HalfVec = float __attribute__((vector_size(kWideLanes * 4)));

inline Wide load_wide(const float* p) {
  HalfVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Wide);
}

// e^z in float64 for z <= 0, to about 1e-15; 0 below -708. Real is double or Wide.
template <typename Real, typename Bits>
inline Real exp_negative(Real z) {
  const Real lowest = Real{} - 708.0;
  const Real clamped = z > lowest ? z : lowest;
  const Real shifted = clamped * 1.4426950408889634 + 0x1.8p52;  // the nearest integer is in the low bits
  const Real n = shifted - 0x1.8p52;
  const Real r = (clamped - n * 0x1.62e42ffp-1) - n * -0x1.718432a1b0e26p-35;  // ln 2 in two parts
  Real series = r * (1.0 / 479001600.0) + 1.0 / 39916800.0;                    // Taylor's, to r^12 / 12!
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
  const Real power = bit_cast<Real>((bit_cast<Bits>(shifted) + 1023) << 52);
  return z > lowest ? series * power : Real{};
}

// The sum of e^(x - peak) over a block, x - peak <= 0, to a few units of float32's last place. What is below e^-80 counts as
// that: such terms vanish beside the peak's own 1. As exp() of simd.hpp, without what only other arguments need.
inline Vec sum_exp(const float* x, Vec peak) {
  using Bits = uint32_t __attribute__((vector_size(sizeof(Vec))));
  const Vec shift = splat(0x1.8p23f);
  Vec sum = zero();
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec z = max(load(x + i) - peak, splat(-80.0f));
    const Vec shifted = fma(z, splat(1.44269504f), shift);  // the nearest integer is in the low bits
    const Vec r = fma(shifted - shift, splat(-0.693147181f), z);
    Vec p = fma(splat(0.00138144670593f), r, splat(0.00836878041118f));
    p = fma(p, r, splat(0.0416683942109f));
    p = fma(p, r, splat(0.166665201078f));
    p = fma(p, r, splat(0.499999934125f));
    p = fma(fma(p, r, splat(1.0f)), r, splat(1.0f));
    sum = sum + bit_cast<Vec>(bit_cast<Bits>(p) + (bit_cast<Bits>(shifted) << 23));
  }
  return sum;
}

// NaN counts as -inf, +inf as the largest number.
float finite(float x) { return x == x ? (x < kLargest ? x : kLargest) : -kInfinity; }

// A row of logits in blocks of kBlock, and the memory to work on it. Blocks are read where they are; one that is changed is
// copied first.
struct Row {
  const float** block;  // [blocks]
  float* copies;        // [blocks, kBlock]
  float* maxima;        // of each block
  int32_t* counts;
  Candidate* memory;
  const float* logits;  // as they were given
  int64_t vocabulary, blocks;
  float peak;           // the largest logit
  double log_total;     // log of the sum of e^logit

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

  void find_maximum(int64_t b) {
    Vec top = load(block[b]);
    for (int i = kLanes; i < kBlock; i += kLanes) top = max(top, load(block[b] + i));
    maxima[b] = reduce_max(top);
  }

  void find_peak() {
    peak = -kInfinity;
    for (int64_t b = 0; b < blocks; ++b) peak = maxima[b] > peak ? maxima[b] : peak;
  }

  // The blocks, their maxima and log_total, in one passage through memory: a run of blocks at a time, so that the second look
  // at it finds it in the cache.
  void read(const float* from) {
    logits = from;
    double total = 0;
    peak = -kInfinity;
    for (int64_t first = 0; first < blocks; first += kRun) {
      const int64_t end = first + kRun < blocks ? first + kRun : blocks;
      const float run_peak = read_run(first, end);
      if (run_peak == -kInfinity) continue;
      Vec sum = zero();
      for (int64_t b = first; b < end; ++b) sum = sum + sum_exp(block[b], splat(run_peak));
      const bool higher = run_peak > peak;
      const double ratio = exp_negative<double, uint64_t>(double(higher ? peak : run_peak) - double(higher ? run_peak : peak));
      total = higher ? total * ratio + double(reduce_add(sum)) : total + ratio * double(reduce_add(sum));
      peak = higher ? run_peak : peak;
    }
    log_total = peak > -kInfinity ? double(peak) + std::log(total) : 0.0;
  }

  // Blocks first to end and their maxima; returns the largest.
  float read_run(int64_t first, int64_t end) {
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
    float run_peak = -kInfinity;
    for (int64_t b = first; b < end; ++b) run_peak = maxima[b] > run_peak ? maxima[b] : run_peak;
    return run_peak;
  }

  // The first token of the largest logit.
  int32_t most_probable() const {
    int64_t b = 0;
    while (maxima[b] != peak) ++b;
    int i = 0;
    while (block[b][i] != peak) ++i;
    return int32_t(b * kBlock + i);
  }

  // Every token of a finite logit >= bound, with weight 1.
  Candidates collect(float bound) const {
    bound = bound > -kLargest ? bound : -kLargest;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (!(maxima[b] >= bound)) continue;
      int32_t ids[kBlock];
      int found = 0;
      for (int i = 0; i < kBlock; ++i) {
        ids[found] = i;
        found += block[b][i] >= bound;
      }
      for (int i = 0; i < found; ++i) memory[count++] = {double(block[b][ids[i]]), 1.0, int32_t(b * kBlock + ids[i])};
    }
    return {memory, count};
  }

  // At least the `count` most probable tokens and those that tie with them, where there are as many.
  Candidates collect_at_least(int64_t count) const {
    if (count > blocks) return collect(-kInfinity);
    // As many groups of blocks hold a logit of at least the count-th largest maximum, so no smaller one is among the first.
    // With several times as many groups as tokens hardly more tokens than needed are above that bound.
    int64_t group = blocks / (4 * count);
    group = group < 1 ? 1 : group;
    int64_t groups = 0;
    for (int64_t first = 0; first < blocks; first += group) {
      float top = -kInfinity;
      for (int64_t b = first; b < first + group && b < blocks; ++b) top = maxima[b] > top ? maxima[b] : top;
      memory[groups++] = {double(top), 1.0, int32_t(first)};
    }
    return collect(float(select_by_count({memory, groups}, count)));
  }

  double scaled(double logit, double temperature) const { return (logit - double(peak)) / temperature; }

  void weigh(Candidates& c, double temperature) const {
    for (int64_t i = 0; i < c.count; ++i)
      c.at[i].weight = exp_negative<double, uint64_t>(scaled(c.at[i].key, temperature));
    keep_where(c, [](const Candidate& candidate) { return candidate.weight > 0; });
  }

  // Of all tokens.
  double total_mass(double temperature) const {
    Wide sum{};
    for (int64_t b = 0; b < blocks; ++b)
      for (int i = 0; i < kBlock; i += kWideLanes)
        sum += exp_negative<Wide, WideBits>((load_wide(block[b] + i) - double(peak)) / temperature);
    double total = 0;
    for (int i = 0; i < kWideLanes; ++i) total += sum[i];
    return total;
  }

  // The most probable tokens, weighed, up to a mass of at least `mass`.
  Candidates collect_mass(double mass, double temperature) const {
    for (double depth = 2;; depth *= 2) {
      const bool all = depth > 708;
      Candidates c = collect(all ? -kInfinity : float(double(peak) - depth * temperature));
      weigh(c, temperature);
      if (all || total_weight(c) > mass) return c;
    }
  }
};

// ---- the steps ----

// Penalties, bias and the mask of allowed tokens.
void adjust(Row& row, const SampleRow& sample) {
  const auto known = [&](int32_t id) { return id >= 0 && id < row.vocabulary; };
  const auto set = [&](int32_t id, float value) { row.writable(id / kBlock)[id % kBlock] = finite(value); };
  for (int64_t i = 0; i < sample.history_length; ++i)
    if (known(sample.history[i])) row.counts[sample.history[i]] = 0;
  for (int64_t i = 0; i < sample.history_length; ++i)
    if (known(sample.history[i])) ++row.counts[sample.history[i]];
  for (int64_t i = 0; i < sample.history_length; ++i) {
    const int32_t id = sample.history[i];
    if (!known(id) || row.counts[id] == 0) continue;
    const float x = row.at(id), repeated = x < 0 ? x * sample.repeat_penalty : x / sample.repeat_penalty;
    const double frequency = double(sample.frequency_penalty) * row.counts[id];
    set(id, float((double(repeated) - frequency) - double(sample.presence_penalty)));
    row.counts[id] = 0;
  }
  for (int64_t i = 0; i < sample.bias_length; ++i)
    if (known(sample.bias_ids[i])) set(sample.bias_ids[i], row.at(sample.bias_ids[i]) + sample.bias_values[i]);
  if (sample.allowed)
    for (int64_t word = 0; word * 32 < row.vocabulary; ++word) {
      const uint32_t bits = sample.allowed[word];
      if (bits == ~uint32_t{0}) continue;
      float* x = row.writable(word * 32 / kBlock) + word * 32 % kBlock;
      for (int i = 0; i < 32; ++i) x[i] = bits >> i & 1 ? x[i] : -kInfinity;
    }
  for (int64_t b = 0; b < row.blocks; ++b)
    if (row.block[b] == row.copies + b * kBlock) row.find_maximum(b);
  row.find_peak();
}

// Locally typical tokens (Meister et al. 2022): those whose surprise is nearest to the entropy, up to a mass.
void keep_typical(const Row& row, Candidates& c, double temperature, double mass) {
  const double total = total_weight(c), log_total = std::log(total);
  const auto surprise = [&](const Candidate& candidate) { return log_total - row.scaled(double(row.at(candidate.id)), temperature); };
  double entropy = 0;
  for (int64_t i = 0; i < c.count; ++i) entropy += c.at[i].weight * surprise(c.at[i]);
  entropy /= total;
  for (int64_t i = 0; i < c.count; ++i) c.at[i].key = -std::fabs(surprise(c.at[i]) - entropy);
  const double least = c.at[select_by_mass(c, mass * total, false)].key;
  keep_where(c, [=](const Candidate& candidate) { return candidate.key >= least; });
  for (int64_t i = 0; i < c.count; ++i) c.at[i].key = double(row.at(c.at[i].id));
}

int32_t choose(const Row& row, const SampleRow& sample) {
  if (row.peak == -kInfinity) return -1;
  const double temperature = double(sample.temperature);
  if (!(temperature > 0)) return row.most_probable();

  const bool nucleus = sample.top_p < 1, typical = sample.typical_p < 1;
  const double least_scaled = sample.min_p > 0 ? std::fmin(std::log(double(sample.min_p)), 0.0) : -INFINITY;
  Candidates c;
  double total;
  if (sample.top_k > 0 && sample.top_k < row.vocabulary) {
    c = row.collect_at_least(sample.top_k);
    if (c.count > sample.top_k) {
      const double least = select_by_count(c, sample.top_k);
      keep_where(c, [=](const Candidate& candidate) { return candidate.key >= least; });
    }
    row.weigh(c, temperature);
    total = total_weight(c);
  } else if (nucleus || !(typical || sample.min_p > 0)) {  // only so much mass is looked at
    total = row.total_mass(temperature);
    c = row.collect_mass((nucleus ? double(sample.top_p) : sample.uniform) * total, temperature);
  } else {
    const double bound = double(row.peak) + least_scaled * temperature;
    c = row.collect(float(bound - 1e-6 * (std::fabs(bound) + std::fabs(double(row.peak)))));  // rather too many than too few
    row.weigh(c, temperature);
    total = total_weight(c);
  }

  if (nucleus) c.count = 1 + select_by_mass(c, double(sample.top_p) * total, false);
  if (sample.min_p > 0)
    keep_where(c, [&](const Candidate& candidate) { return row.scaled(candidate.key, temperature) >= least_scaled; });
  if (typical) keep_typical(row, c, temperature, double(sample.typical_p));
  if (nucleus || typical || sample.min_p > 0) total = total_weight(c);
  return c.at[select_by_mass(c, sample.uniform * total, true)].id;
}

float log_probability(double logit, double log_total) { return float(std::fmax(logit - log_total, -double(kLargest))); }

void sample_row(Row& row, const float* logits, const SampleRow& sample) {
  row.read(logits);
  if (sample.top_logprobs > 0) {
    Candidates top = row.collect_at_least(sample.top_logprobs);
    if (top.count > sample.top_logprobs) {
      select_by_count(top, sample.top_logprobs);
      top.count = sample.top_logprobs;
    }
    sort(top.at, 0, top.count);
    for (int i = 0; i < sample.top_logprobs; ++i) {
      sample.top_ids[i] = i < top.count ? top.at[i].id : -1;
      sample.top_values[i] = i < top.count ? log_probability(top.at[i].key, row.log_total) : -kInfinity;
    }
  }
  if (sample.history_length > 0 || sample.bias_length > 0 || sample.allowed) adjust(row, sample);
  *sample.token = choose(row, sample);
  *sample.logprob = *sample.token < 0 ? -kInfinity : log_probability(double(finite(logits[*sample.token])), row.log_total);
}

}  // namespace

// One token for each row of logits [count, vocabulary]. Where none is left to choose, the token is -1 and its log probability
// -inf; top_ids beyond the possible tokens are -1.
void sample(ThreadPool& pool, const float* logits, int64_t vocabulary, const SampleRow* rows, int64_t count) {
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock, padded = blocks * kBlock;
  const int threads = count > 1 ? pool.threads() : 1;
  const Buffer<const float*> block(blocks * threads);
  const Buffer<float> copies(padded * threads), maxima(blocks * threads);
  const Buffer<int32_t> counts(vocabulary * threads);
  const Buffer<Candidate> candidates(padded * threads);
  pool.run(count, 1, [&](int64_t begin, int64_t end, int thread) {
    Row row{block.data + thread * blocks, copies.data + thread * padded, maxima.data + thread * blocks,
            counts.data + thread * vocabulary, candidates.data + thread * padded, nullptr, vocabulary, blocks, 0, 0};
    for (int64_t i = begin; i < end; ++i) sample_row(row, logits + i * vocabulary, rows[i]);
  });
}

}  // namespace puna::PUNA_ISA
