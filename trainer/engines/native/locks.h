// What replicas of the native loop wait at: a lock, a shared lock and a barrier.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

constexpr std::size_t CACHE_LINE = 64;
constexpr int SPINS = 4096; // looks at a barrier before its replica sleeps: some tens of microseconds

class Lock {
 public:
  Lock() {
    // Looks a few times before it sleeps: what it guards takes no longer than falling asleep does.
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&mutex_, &attributes);
    pthread_mutexattr_destroy(&attributes);
  }
  ~Lock() { pthread_mutex_destroy(&mutex_); }
  void acquire() { pthread_mutex_lock(&mutex_); }
  void release() { pthread_mutex_unlock(&mutex_); }

 private:
  alignas(CACHE_LINE) pthread_mutex_t mutex_;
};

class SharedLock {
 public:
  SharedLock() {
    // Writers first: replicas that come to read would else keep one that waits to write waiting.
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&lock_, &attributes);
    pthread_rwlockattr_destroy(&attributes);
  }
  ~SharedLock() { pthread_rwlock_destroy(&lock_); }
  void acquire_shared() { pthread_rwlock_rdlock(&lock_); }
  void acquire() { pthread_rwlock_wrlock(&lock_); }
  void release() { pthread_rwlock_unlock(&lock_); }

 private:
  alignas(CACHE_LINE) pthread_rwlock_t lock_;
};

// Where each replica has a core, who waits does so awake for a while, and then asleep.
class Barrier {
 public:
  Barrier(int64_t parties, bool spins) : parties_(parties), spins_(spins ? SPINS : 0) {}

  // False where the run is to end.
  bool wait() {
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties_) {
      waiting_.store(0, std::memory_order_relaxed);
      next_round();
    }
    for (int spin = 0; spin < spins_ && round_.load(std::memory_order_acquire) == round; spin++) {
      pause();
    }
    while (round_.load(std::memory_order_acquire) == round && !ended_.load(std::memory_order_acquire)) {
      round_.wait(round);
    }
    return !ended_.load(std::memory_order_acquire);
  }

  // Wakes who waits and keeps others from waiting.
  void abort() {
    ended_.store(true);
    next_round();
  }

 private:
  void next_round() {
    round_.fetch_add(1);
    round_.notify_all(); // no system call where nobody sleeps
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int64_t parties_;
  const int spins_;
  alignas(CACHE_LINE) std::atomic<int64_t> waiting_{0};
  alignas(CACHE_LINE) std::atomic<uint32_t> round_{0};
  std::atomic<bool> ended_{false};
};
