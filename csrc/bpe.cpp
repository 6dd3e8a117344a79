// Text to tokens for byte-level BPE vocabularies, and the long string arrays of GGUF files: what makes opening a model slow in
// Python. The merging order is that of Sennrich et al. 2016 as GPT-2 and Hugging Face's tokenizers apply it: always the pair of
// the lowest rank, the leftmost of equals.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <queue>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "bind.hpp"

namespace puna {
namespace {

constexpr uint32_t kNone = UINT32_MAX;

std::string_view text_of(nb::handle object) {
  Py_ssize_t size;
  const char* data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (!data) throw nb::python_error();
  return {data, size_t(size)};
}

// Multiply and fold twice: the low bits, which choose a slot, depend on every bit of both.
uint64_t mixed(uint64_t word, uint64_t key) {
  uint64_t x = (word ^ key) * 0x9E3779B97F4A7C15;
  x = (x ^ x >> 32) * (key | 1);
  return x ^ x >> 29;
}

// A power of two, at most two thirds of which `count` entries fill.
size_t table_size(size_t count) {
  size_t size = 16;
  while (size < count + count / 2) size *= 2;
  return size;
}

// Pieces by text. Open addressing with linear probing; keyed, so that no file can be made to collide.
class Pieces {
 public:
  Pieces(size_t count, uint64_t key) : key_(key), slots_(table_size(count), kNone) { texts_.resize(count); }

  // Ids without a text are never found. Returns false when the text is taken.
  bool add(uint32_t id, std::string_view text) {
    texts_[id] = {uint32_t(blob_.size()), uint32_t(text.size())};
    blob_ += text;
    const size_t slot = find_slot(text);
    if (slots_[slot] != kNone) return false;
    slots_[slot] = id;
    return true;
  }

  uint32_t find(std::string_view text) const { return slots_[find_slot(text)]; }

 private:
  struct Range {
    uint32_t start, size;
  };

  std::string_view text(uint32_t id) const { return std::string_view(blob_).substr(texts_[id].start, texts_[id].size); }

  uint64_t hash(std::string_view text) const {
    uint64_t state = key_ ^ text.size();
    const char* at = text.data();
    for (size_t left = text.size(); left > 0;) {
      const size_t bytes = std::min<size_t>(left, 8);
      uint64_t word = 0;
      std::memcpy(&word, at, bytes);
      state = mixed(state ^ word, key_);
      at += bytes, left -= bytes;
    }
    return state;
  }

  size_t find_slot(std::string_view wanted) const {
    const size_t mask = slots_.size() - 1;
    size_t slot = hash(wanted) & mask;
    while (slots_[slot] != kNone && text(slots_[slot]) != wanted) slot = (slot + 1) & mask;
    return slot;
  }

  uint64_t key_;
  std::vector<uint32_t> slots_;
  std::vector<Range> texts_;
  std::string blob_;
};

struct Merge {
  uint32_t left, right, result;
};

// Merges by the ids of their two pieces; a merge's rank is its place in the order they were added.
class Merges {
 public:
  Merges(size_t count, uint64_t key) : key_(key), count_(count) {}

  // Makes room for the count that was promised.
  void clear() {
    merges_.clear();
    merges_.reserve(count_);
    slots_.assign(table_size(count_), kNone);
  }

  // A pair that is given twice has its last rank, as in Hugging Face's tokenizers.
  void add(const Merge& merge) {
    check(merges_.size() < count_, "Bpe: there are more merges than said");
    slots_[find_slot(merge.left, merge.right)] = uint32_t(merges_.size());
    merges_.push_back(merge);
  }

  uint32_t rank(uint32_t left, uint32_t right) const { return slots_[find_slot(left, right)]; }
  uint32_t result(uint32_t rank) const { return merges_[rank].result; }

 private:
  size_t find_slot(uint32_t left, uint32_t right) const {
    const size_t mask = slots_.size() - 1;
    size_t slot = mixed(uint64_t(left) << 32 | right, key_) & mask;
    while (slots_[slot] != kNone && (merges_[slots_[slot]].left != left || merges_[slots_[slot]].right != right)) slot = (slot + 1) & mask;
    return slot;
  }

  uint64_t key_;
  size_t count_;
  std::vector<uint32_t> slots_;
  std::vector<Merge> merges_;
};

uint64_t random_key() {
  std::random_device device;
  return uint64_t(device()) << 32 | device();
}

// The strings of a GGUF array: a little-endian uint64 length, then the text.
struct Strings {
  const char* data;
  size_t at, end;

  // The next one. False when it does not end before `end`.
  bool next(std::string_view& text) {
    uint64_t length;
    if (at > end || end - at < sizeof length) return false;
    std::memcpy(&length, data + at, sizeof length);
    if (length > end - at - sizeof length) return false;
    text = {data + at + sizeof length, size_t(length)};
    at += sizeof length + length;
    return true;
  }
};

// As Python's decoder judges: no overlong forms, no surrogates, nothing beyond U+10FFFF.
bool is_utf8(std::string_view text) {
  const auto* at = reinterpret_cast<const uint8_t*>(text.data());
  const auto* const end = at + text.size();
  while (at < end) {
    if (*at < 0x80) {
      ++at;
      continue;
    }
    const int more = *at < 0xC2 ? 0 : *at < 0xE0 ? 1 : *at < 0xF0 ? 2 : *at < 0xF5 ? 3 : 0;
    if (more == 0 || end - at <= more) return false;
    const uint8_t lowest = *at == 0xE0 ? 0xA0 : *at == 0xF0 ? 0x90 : 0x80;
    const uint8_t highest = *at == 0xED ? 0x9F : *at == 0xF4 ? 0x8F : 0xBF;
    if (at[1] < lowest || at[1] > highest) return false;
    for (int i = 2; i <= more; ++i)
      if ((at[i] & 0xC0) != 0x80) return false;
    at += more + 1;
  }
  return true;
}

[[noreturn]] void fail(std::string_view text, const char* problem) {
  throw nb::value_error(("'" + std::string(text.substr(0, 100)) + "'" + problem).c_str());
}

class Bpe {
 public:
  // pieces: str by id, where `hidden` holds a nonzero byte for those that no text may spell; merges, in order of priority: a list
  // of (left, right), or bytes with `merge_count` strings "left right" as GGUF files spell them.
  Bpe(const nb::list& pieces, const nb::bytes& hidden, const nb::object& merges, size_t merge_count, bool whole_words)
      : pieces_(nb::len(pieces), random_key()), spelled_merges_(merges), merges_(merge_count, random_key()), whole_words_(whole_words) {
    check(hidden.size() == nb::len(pieces), "Bpe: one byte for each piece is needed");
    check(nb::len(pieces) < kNone && merge_count < kNone, "Bpe: too many pieces or merges");
    uint32_t id = 0;
    for (nb::handle piece : pieces) {
      if (!hidden.c_str()[id]) check(pieces_.add(id, text_of(piece)), "Bpe: a piece is given twice");
      ++id;
    }
    // Reading merges takes longer than all else, and where whole words are looked up first, many a prompt does without.
    if (!whole_words || !PyBytes_Check(merges.ptr())) read_merges();
  }

  // The ids of words, each merged on its own. Characters that are no piece are left out. Throws for merges of what is no piece,
  // where the first word that needs them has them read.
  nb::list encode(const nb::list& words) {
    nb::list ids;
    for (nb::handle object : words) {
      const std::string_view word = text_of(object);
      const uint32_t whole = whole_words_ ? pieces_.find(word) : kNone;
      if (whole != kNone) {
        ids.append(whole);
        continue;
      }
      if (spelled_merges_.is_valid()) read_merges();
      merge_word(word);
      for (uint32_t i = 0; i != kNone && i < symbols_.size(); i = symbols_[i].next) ids.append(symbols_[i].id);
    }
    return ids;
  }

 private:
  struct Symbol {
    uint32_t id, previous, next;
  };
  struct Candidate {
    uint32_t rank, position;
    bool operator<(const Candidate& other) const {  // the top of the queue is the greatest
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };

  void read_merges() {
    merges_.clear();  // of an attempt that failed
    if (PyBytes_Check(spelled_merges_.ptr())) {
      Strings strings{PyBytes_AS_STRING(spelled_merges_.ptr()), 0, size_t(PyBytes_GET_SIZE(spelled_merges_.ptr()))};
      for (std::string_view both; strings.next(both);) {
        const size_t space = both.find(' ');
        if (space == both.npos || space == 0 || space + 1 == both.size()) fail(both, " is not a pair of tokens");
        add_merge(both.substr(0, space), both.substr(space + 1));
      }
    } else {
      for (nb::handle merge : spelled_merges_) add_pair(merge);
    }
    spelled_merges_.reset();
  }

  void add_pair(nb::handle merge) {
    check(PyTuple_Check(merge.ptr()) && nb::len(merge) == 2, "Bpe: a merge is not a pair of pieces");
    add_merge(text_of(merge[0]), text_of(merge[1]));
  }

  void add_merge(std::string_view left, std::string_view right) {
    joined_.assign(left).append(right);
    const Merge found{pieces_.find(left), pieces_.find(right), pieces_.find(joined_)};
    if (found.left == kNone) fail(left, " of a merge is no token");
    if (found.right == kNone) fail(right, " of a merge is no token");
    if (found.result == kNone) fail(joined_, " of a merge is no token");
    merges_.add(found);
  }

  // Leaves the word's tokens in symbols_, linked from the first on.
  void merge_word(std::string_view word) {
    symbols_.clear();
    for (size_t i = 0; i < word.size();) {
      size_t end = i + 1;
      while (end < word.size() && (word[end] & 0xC0) == 0x80) ++end;
      const uint32_t id = pieces_.find(word.substr(i, end - i));
      const uint32_t index = uint32_t(symbols_.size());
      if (id != kNone) symbols_.push_back({id, index - 1, index + 1});
      i = end;
    }
    if (symbols_.empty()) return;
    symbols_.back().next = kNone;
    for (uint32_t i = 0; i + 1 < symbols_.size(); ++i) propose(i);
    while (!queue_.empty()) {
      const Candidate best = queue_.top();
      queue_.pop();
      Symbol& left = symbols_[best.position];
      if (left.id == kNone || left.next == kNone) continue;
      Symbol& right = symbols_[left.next];
      if (merges_.rank(left.id, right.id) != best.rank) continue;  // one of the two has been merged since
      left.id = merges_.result(best.rank);
      left.next = right.next;
      right.id = kNone;
      if (left.next != kNone) symbols_[left.next].previous = best.position, propose(best.position);
      if (left.previous != kNone) propose(left.previous);
    }
  }

  void propose(uint32_t position) {
    const uint32_t rank = merges_.rank(symbols_[position].id, symbols_[symbols_[position].next].id);
    if (rank != kNone) queue_.push({rank, position});
  }

  Pieces pieces_;
  nb::object spelled_merges_;  // until they have been read
  Merges merges_;
  bool whole_words_;
  std::string joined_;
  std::vector<Symbol> symbols_;
  std::priority_queue<Candidate> queue_;
};

class View {
 public:
  explicit View(const nb::object& buffer) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE)) throw nb::python_error();
  }
  ~View() { PyBuffer_Release(&view_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  Strings strings(size_t start, size_t end) const { return {static_cast<const char*>(view_.buf), start, std::min(end, size_t(view_.len))}; }

 private:
  Py_buffer view_;
};

// Where `count` strings from `start` on end. None when they don't end before `end`, or one is not UTF-8.
nb::object skip_strings(const nb::object& buffer, size_t start, size_t end, size_t count) {
  const View view(buffer);
  Strings strings = view.strings(start, end);
  std::string_view text;
  for (size_t i = 0; i < count; ++i)
    if (!strings.next(text) || !is_utf8(text)) return nb::none();
  return nb::int_(strings.at);
}

// `count` strings that skip_strings has checked.
nb::list read_strings(const nb::bytes& encoded, size_t count) {
  Strings strings{encoded.c_str(), 0, encoded.size()};
  nb::list list;
  for (size_t i = 0; i < count; ++i) {
    std::string_view text;
    check(strings.next(text), "read_strings: there are fewer strings than said");
    PyObject* string = PyUnicode_DecodeUTF8(text.data(), Py_ssize_t(text.size()), nullptr);
    if (!string) throw nb::python_error();
    list.append(nb::steal(string));
  }
  return list;
}

}  // namespace

void bind_bpe(nb::module_& m) {
  nb::class_<Bpe>(m, "Bpe", "Merges the words of a byte-level vocabulary.")
      .def(nb::init<const nb::list&, const nb::bytes&, const nb::object&, size_t, bool>(), nb::arg("pieces"), nb::arg("hidden"),
           nb::arg("merges"), nb::arg("merge_count"), nb::arg("whole_words"))
      .def("encode", &Bpe::encode, nb::arg("words"));
  m.def("skip_strings", &skip_strings, nb::arg("buffer"), nb::arg("start"), nb::arg("end"), nb::arg("count"),
        "Where a GGUF file's strings end, or None when they are damaged.");
  m.def("read_strings", &read_strings, nb::arg("encoded"), nb::arg("count"), "A GGUF file's strings, sound as they are.");
}

}  // namespace puna
