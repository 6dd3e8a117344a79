// Choosing tokens: puna/ops/reference_sampling.py, which specifies every step, without sorting the vocabulary.
//
// Where few tokens can matter they become candidates (sampling_row.hpp), which a quickselect by mass narrows down
// (sampling_select.hpp). Where many thousands can, masses of whole blocks are looked at first (sampling_nucleus.hpp).
#include <cmath>

#include "buffer.hpp"
#include "kernels.hpp"
#include "sampling_nucleus.hpp"

namespace puna::PUNA_ISA {

namespace {

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
    if (row.is_changed(b)) row.find_maximum(b);
  row.peak = row.largest(0, row.blocks);
}

// Locally typical tokens (Meister et al. 2022): those whose surprise is nearest to the entropy, up to a mass.
void keep_typical(const Row& row, Candidates& c, double mass) {
  const double total = total_weight(c), log_total = std::log(total);
  const auto surprise = [&](const Candidate& candidate) { return log_total - row.scaled(double(row.at(candidate.id))); };
  double entropy = 0;
  for (int64_t i = 0; i < c.count; ++i) entropy += c.at[i].weight * surprise(c.at[i]);
  entropy /= total;
  for (int64_t i = 0; i < c.count; ++i) c.at[i].key = -std::fabs(surprise(c.at[i]) - entropy);
  const double least = c.at[select_by_mass(c, mass * total, false)].key;
  keep_where(c, [=](const Candidate& candidate) { return candidate.key >= least; });
  for (int64_t i = 0; i < c.count; ++i) c.at[i].key = double(row.at(c.at[i].id));
}

// The most probable tokens, weighed, where few of them reach `mass`; with `many`, however many do.
Candidates collect_mass(const Row& row, double mass, bool many) {
  for (double depth = 2;; depth *= 2) {
    const bool all = depth > 708;
    const float bound = all ? -kInfinity : float(double(row.peak) - depth * row.temperature);
    if (!many && !row.is_few(bound)) return {nullptr, 0};
    Candidates c = row.collect(bound);
    row.weigh(c);
    if (all || total_weight(c) > mass) return c;
  }
}

// The least logit that min-p leaves.
float least_logit(const Row& row, double min_p) {
  if (!(min_p > 0)) return -kInfinity;
  const double least_scaled = std::fmin(std::log(min_p), 0.0);
  const auto stays = [&](float x) { return row.scaled(double(x)) >= least_scaled; };
  float least = float(double(row.peak) + least_scaled * row.temperature);
  while (!stays(least)) least = __builtin_nextafterf(least, kInfinity);  // what rounding has left, a step or two
  for (float next; stays(next = __builtin_nextafterf(least, -kInfinity));) least = next;
  return least;
}

// The token at cumulative probability `uniform`, in order of ids.
int32_t choose_among(Candidates c, double uniform) {
  const double total = total_weight(c);
  for (int64_t i = 0; i < c.count; ++i) c.at[i].key = -double(c.at[i].id);
  return c.at[select_by_mass(c, uniform * total, true)].id;
}

bool is_greedy(const SampleRow& sample) { return !(sample.temperature > 0); }
bool is_limited(const Row& row, const SampleRow& sample) { return sample.top_k > 0 && sample.top_k < row.vocabulary; }
// Whether `choose` looks at the masses of whole blocks.
bool weighs_blocks(const Row& row, const SampleRow& sample) {
  return !is_greedy(sample) && !is_limited(row, sample) && (sample.top_p < 1 || !(sample.typical_p < 1 || sample.min_p > 0));
}

int32_t choose(Row& row, const SampleRow& sample) {
  if (row.peak == -kInfinity) return -1;
  if (is_greedy(sample)) return row.most_probable();

  const double top_p = double(sample.top_p);
  const bool limited = is_limited(row, sample), nucleus = top_p < 1, typical = sample.typical_p < 1;
  const float least = least_logit(row, double(sample.min_p));
  Candidates c{nullptr, 0};
  double total = 0;  // before top-p
  if (limited) {
    c = row.collect_at_least(sample.top_k);
    if (c.count > sample.top_k) {
      const double last = select_by_count(c, sample.top_k);
      keep_where(c, [=](const Candidate& candidate) { return candidate.key >= last; });
    }
    row.weigh(c);
    total = total_weight(c);
  } else if (nucleus) {
    row.weigh_blocks();
    total = row.total_mass();
    c = collect_mass(row, top_p * total, typical);
  } else if (typical || row.is_few(least)) {
    c = row.collect(least);
    row.weigh(c);
  }
  if (c.count > 0) {
    if (nucleus) c.count = 1 + select_by_mass(c, top_p * total, false);
    keep_where(c, [=](const Candidate& candidate) { return candidate.key >= double(least); });
    if (typical) keep_typical(row, c, double(sample.typical_p));
    return choose_among(c, sample.uniform);
  }

  Candidate last{-INFINITY, 0, INT32_MAX};  // of those that stay
  if (nucleus)
    last = Nucleus(row).find(top_p * total, total);
  else if (!(sample.min_p > 0))
    row.weigh_blocks();
  if (double(least) > last.key) {
    split(row, {least, least});
    last = {double(least), 0, INT32_MAX};
  }
  return row.choose_in_blocks(last, sample.uniform * row.total_mass());
}

float log_probability(double logit, double log_total) { return float(std::fmax(logit - log_total, -double(kLargest))); }

void sample_row(Row& row, const float* logits, const SampleRow& sample) {
  row.temperature = is_greedy(sample) ? 1.0 : double(sample.temperature);
  row.read(logits, sample.logprob ? 1.0f : weighs_blocks(row, sample) ? row.scale() : 0.0f);
  if (sample.logprob) row.find_log_total();
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
  if (!sample.logprob) return;
  *sample.logprob = *sample.token < 0 ? -kInfinity : log_probability(double(finite(logits[*sample.token])), row.log_total);
}

}  // namespace

// One token for each row of logits [count, vocabulary]. Where none is left to choose, the token is -1 and its log probability
// -inf; top_ids beyond the possible tokens are -1.
void sample(ThreadPool& pool, const float* logits, int64_t vocabulary, const SampleRow* rows, int64_t count) {
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock, padded = blocks * kBlock;
  const int threads = count > 1 ? pool.threads() : 1;
  const Buffer<const float*> block(blocks * threads);
  const int64_t runs = (blocks + kRun - 1) / kRun, samples = Nucleus::room(blocks);
  const Buffer<float> copies(padded * threads), maxima(blocks * threads), sums(blocks * threads), peaks(runs * threads),
      sampled(samples * threads);
  const Buffer<double> masses(blocks * threads);
  const Buffer<int32_t> counts(vocabulary * threads);
  const Buffer<Candidate> candidates(padded * threads);
  pool.run(count, 1, [&](int64_t begin, int64_t end, int thread) {
    Row row{block.data + thread * blocks, copies.data + thread * padded, maxima.data + thread * blocks,
            sums.data + thread * blocks, peaks.data + thread * runs, masses.data + thread * blocks,
            sampled.data + thread * samples, counts.data + thread * vocabulary, candidates.data + thread * padded,
            vocabulary, blocks, nullptr, 0, 0, 1, 0};
    for (int64_t i = begin; i < end; ++i) sample_row(row, logits + i * vocabulary, rows[i]);
  });
}

}  // namespace puna::PUNA_ISA
