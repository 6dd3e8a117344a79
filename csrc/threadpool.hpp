// Data-parallel loops over a fixed team of threads. The caller takes part, so a pool of 1 has no threads of its own.
//
// Work is taken in chunks from one counter, and a loop ends when every chunk is done: a worker that the operating system has
// put aside is not waited for unless it holds a chunk. Whoever waits (workers for a loop, the caller for the last chunks) spins for
// some tens of microseconds, then sleeps.
// After fork() the child's pool still works, on the calling thread alone (unless a loop was running at that moment).
//
// A pool may borrow the threads of an OpenMP runtime instead of having its own: two teams on the same cores stand in each other's
// way, for each spins for its next loop. After fork() it is then as usable as that runtime.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace puna {

class ThreadPool {
 public:
  // GOMP_parallel of GNU's OpenMP runtime: calls body(context) on `threads` threads, the caller among them.
  using Team = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

  explicit ThreadPool(int threads, Team team = nullptr);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls task(begin, end, thread) on disjoint ranges that cover [0, count), each of `grain` items (the last may be
  // shorter); thread is 0 … threads() - 1, for scratch memory. Ranges start in ascending order. Returns when all are done.
  // The task must not throw (that terminates) and must not call run() again. Calls from several threads take turns.
  template <class Task>
  void run(int64_t count, int64_t grain, const Task& task) {
    run_erased(count, grain, &task, [](const void* context, int64_t begin, int64_t end, int thread) noexcept {
      (*static_cast<const Task*>(context))(begin, end, thread);
    });
  }

 private:
  using Erased = void (*)(const void* context, int64_t begin, int64_t end, int thread) noexcept;

  void run_erased(int64_t count, int64_t grain, const void* context, Erased task);
  void work(int thread);
  void take_chunks(int thread);
  bool join(uint64_t seen);
  uint64_t wait_for_loop(uint64_t seen);
  void wait_for_workers();
  void wake();

  // The loop being run. Written by the caller while no worker is inside.
  const void* context_ = nullptr;
  Erased task_ = nullptr;
  int64_t count_ = 0, grain_ = 1;

  alignas(64) std::atomic<int64_t> next_{0};  // first item that nobody has taken
  alignas(64) std::atomic<uint64_t> gate_{0};  // loop number << 32 | open flag | caller sleeps | workers inside
  alignas(64) std::atomic<int> sleeping_{0};
  // Sleepers wait for these to change; unlike a condition variable they survive fork().
  std::atomic<uint32_t> worker_bell_{0}, caller_bell_{0};
  std::atomic<bool> stop_{false};
  std::mutex caller_mutex_;
  std::vector<std::thread> workers_;
  long creator_;
  const int threads_;
  const Team team_;
  std::atomic<int> joined_{0};  // threads of the team that have come to this loop
};

}  // namespace puna
