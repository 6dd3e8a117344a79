// Candidates for the next token, and quickselect among them by cumulative weight.
#pragma once

#include <cstdint>

namespace puna::PUNA_ISA {

// A token in the running. Those of larger key, then of lower id, come first.
struct Candidate {
  double key, weight;
  int32_t id;
};

struct Candidates {
  Candidate* at;
  int64_t count;
};

inline bool precedes(const Candidate& a, const Candidate& b) { return (a.key > b.key) | ((a.key == b.key) & (a.id < b.id)); }

inline void swap(Candidate& a, Candidate& b) {
  const Candidate c = a;
  a = b;
  b = c;
}

// Puts some candidate of [low, high) where sorting would, those that precede it before it; returns its place.
inline int64_t partition(Candidate* at, int64_t low, int64_t high) {
  const int64_t middle = low + (high - low) / 2, last = high - 1;
  if (precedes(at[middle], at[low])) swap(at[middle], at[low]);
  if (precedes(at[last], at[low])) swap(at[last], at[low]);
  if (precedes(at[middle], at[last])) swap(at[middle], at[last]);  // the median of the three is last
  const Candidate pivot = at[last];
  int64_t place = low;
  for (int64_t i = low; i < last; ++i) {
    swap(at[i], at[place]);  // in any case: a branch would be mispredicted half of the time
    place += precedes(at[place], pivot);
  }
  swap(at[place], at[last]);
  return place;
}

// The place, in sorted order, of the first candidate at which the cumulative weight reaches `target` (or exceeds it, where
// `exceed`); the last where none does. What precedes it is moved before it.
inline int64_t select_by_mass(Candidates c, double target, bool exceed) {
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
inline double select_by_count(Candidates c, int64_t count) { return c.at[select_by_mass(c, double(count), false)].key; }

inline void sort(Candidate* at, int64_t low, int64_t high) {
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
inline void keep_where(Candidates& c, const Condition& condition) {
  int64_t kept = 0;
  for (int64_t i = 0; i < c.count; ++i)
    if (condition(c.at[i])) c.at[kept++] = c.at[i];
  c.count = kept;
}

inline double total_weight(Candidates c) {
  double total = 0;
  for (int64_t i = 0; i < c.count; ++i) total += c.at[i].weight;
  return total;
}

}  // namespace puna::PUNA_ISA
