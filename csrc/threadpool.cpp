#include "threadpool.hpp"

#include <chrono>

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace puna {
namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kWaiting = uint64_t{1} << 30;
constexpr uint64_t kInside = kWaiting - 1;
constexpr int kLoopShift = 32;
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPausesPerCheck = 32;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for a condition without sleeping, for about kSpin; whether it came true.
template <class Condition>
bool spin(const Condition& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerCheck; i++) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads, Team team) : creator_(getpid()), threads_(threads), team_(team) {
  for (int i = 1; i < threads && !team; i++) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  if (getpid() != creator_) {  // a forked child has no workers to join
    for (auto& worker : workers_) worker.detach();
    return;
  }
  stop_ = true;
  wake();
  for (auto& worker : workers_) worker.join();
}

int ThreadPool::threads() const { return threads_; }

void ThreadPool::run_erased(int64_t count, int64_t grain, const void* context, Erased task) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  if (threads_ == 1 || count <= grain) {
    for (int64_t begin = 0; begin < count; begin += grain) task(context, begin, begin + grain < count ? begin + grain : count, 0);
    return;
  }
  std::lock_guard lock(caller_mutex_);
  context_ = context, task_ = task, count_ = count, grain_ = grain;
  next_.store(0, std::memory_order_relaxed);
  if (team_) {
    joined_.store(0, std::memory_order_relaxed);
    const auto body = [](void* pool) {
      auto* self = static_cast<ThreadPool*>(pool);
      self->take_chunks(self->joined_.fetch_add(1, std::memory_order_relaxed));
    };
    return team_(body, this, unsigned(threads_), 0);
  }
  const uint64_t loop = (gate_.load(std::memory_order_relaxed) >> kLoopShift) + 1;
  gate_.store(loop << kLoopShift | kOpen);  // sequentially consistent, against the count of sleepers
  if (sleeping_.load() > 0) wake();
  take_chunks(0);
  gate_.fetch_and(~kOpen);
  if (!(gate_.load(std::memory_order_acquire) & kInside)) return;
  if (!spin([this] { return !(gate_.load(std::memory_order_acquire) & kInside); })) wait_for_workers();
}

// Sleeps until no worker is inside. Sleeping gives this core to a worker that was put aside on its own with a chunk in hand.
void ThreadPool::wait_for_workers() {
  for (;;) {
    const uint32_t bell = caller_bell_;
    if (!(gate_.fetch_or(kWaiting) & kInside)) return;
    caller_bell_.wait(bell);
  }
}

void ThreadPool::take_chunks(int thread) {
  for (;;) {
    const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= count_) return;
    task_(context_, begin, begin + grain_ < count_ ? begin + grain_ : count_, thread);
  }
}

// Enters the loop that `gate` describes, unless it has closed meanwhile.
bool ThreadPool::join(uint64_t gate) {
  const uint64_t loop = gate >> kLoopShift;
  while (gate >> kLoopShift == loop && gate & kOpen)
    if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) return true;
  return false;
}

// Waits until the gate shows another loop than number `seen`, or stop_.
uint64_t ThreadPool::wait_for_loop(uint64_t seen) {
  const auto changed = [&] { return gate_.load(std::memory_order_acquire) >> kLoopShift != seen || stop_; };
  if (spin(changed)) return gate_;
  // Read the bell, say that we sleep, look at the gate again: whoever opens it after that look rings for us.
  for (;;) {
    const uint32_t bell = worker_bell_;
    sleeping_.fetch_add(1);
    const bool awake = changed();
    if (!awake) worker_bell_.wait(bell);
    sleeping_.fetch_sub(1);
    if (awake) return gate_;
  }
}

void ThreadPool::wake() {
  worker_bell_.fetch_add(1);
  worker_bell_.notify_all();
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const uint64_t gate = wait_for_loop(seen);
    if (stop_) return;
    seen = gate >> kLoopShift;
    if (!join(gate)) continue;
    take_chunks(thread);
    const uint64_t before = gate_.fetch_sub(1);
    if (before & kWaiting && (before & kInside) == 1) {
      caller_bell_.fetch_add(1);
      caller_bell_.notify_one();
    }
  }
}

}  // namespace puna
