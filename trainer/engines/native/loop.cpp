// The replicas' loop of `train.engine=native`: several steps in one call, outside the interpreter and its lock.
//
// Each update mode is a function of a few lines, named as its class in trainer/updates/transactions.py and all_reduce.py,
// which it follows: the same accesses in the same order under the same locks. What Python does in several passes over the
// vector (the sum, the scaling, the optimizer's rule, the addition) is one pass here, with the same operations on each
// element in the same order, so a mode that has the same bits in every run has the same bits here.
//
// Invariant: a replica's own fields are written by its own thread; what others read of them (`contribution`, `version`)
// they read between the two barriers of a step. Unsafe modes read and write the shared vector without order: that is
// what they are for. To C++ these are data races; compiled code of plain loops over floats reads and writes each element,
// as PyTorch's own kernels do.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "locks.h"
#include "sweep.h"

namespace {

enum Mode : int64_t { // as MODES in loop.py has them
  ALL_REDUCE,
  SERIALIZED,
  LOCKED,
  READER_WRITER,
  OPTIMISTIC,
  PER_VARIABLE_LOCK,
  LOCK_FREE,
  SLOTS_UNLOCKED,
  WRITE_LOCKED,
  OVERWRITE,
};

// Kinds of spans, as KINDS in loop.py has them.
enum Doing : int64_t { STEP, DATA, COMPUTE, LOCK_WAIT, CRITICAL_SECTION, BARRIER_WAIT, READ, WRITE, UPDATE, LOGGING };

constexpr int64_t MOST_FETCHED = 128 * 1024; // floats: half a megabyte, which a core's own cache has room for

enum Status : int64_t { DONE = 0, STOPPED = 1, FAILED = 2 };

} // namespace

// As `_Task` in loop.py has it.
struct Task {
  int64_t mode, num_replicas;
  int64_t read_size, snapshot_size;
  int64_t batch_size, row_size;
  int64_t spins; // whether there is a core for every replica, so that who waits awake takes none from another
  float scale, statistics_scale;
  float* vector;
  float* total; // float32 [read_size], for the steps that ask for it; nullptr where none does
  const Piece* pieces;
  const int64_t* shares; // share i has the pieces from shares[i] on and before shares[i + 1]; the last one is everything
  int64_t num_variables;
  const Piece* variable_pieces;
  const int64_t* variables; // as shares
  Optimizer optimizer;
};

// What a replica did from when to when, in nanoseconds of the monotonic clock; one may lie in another.
struct Span {
  int64_t step, doing, start, stop;
};

// As `_Chunk` in loop.py has it.
struct Chunk {
  int64_t first, num_steps;
  const int64_t* samples; // [num_steps, batch_size]
  float* rows; // [num_steps, row_size]
  int64_t* notes; // [num_steps, 2]: version, staleness
  Span* spans; // room for some, or nullptr; what finds none is not told
  int64_t spans_left;
  // Of which steps, upwards, what follows is wanted; float32 [num_kept, read_size] each.
  const int64_t* kept_steps;
  int64_t num_kept;
  float* snapshots; // what the gradient was computed from
  float* contributions;
  float* totals; // the sum over replicas, where they update together; else nullptr
  int64_t done; // out: steps
  int64_t step_status; // out: the compiled step's, where it failed
};

using Run = int64_t (*)(void* frame, void** outputs);

namespace {

struct alignas(CACHE_LINE) Commits {
  std::atomic<int64_t> made{0};
};

struct alignas(CACHE_LINE) Replica {
  int64_t own = 0;
  Run run = nullptr;
  void* frame = nullptr;
  int64_t* samples = nullptr;
  int64_t* number = nullptr;
  float* snapshot = nullptr; // nullptr: read in place
  const float* contribution = nullptr;
  const float* row = nullptr;
  int64_t version = 0, staleness = 0;
  int64_t step_status = 0;
  float* kept = nullptr; // where the snapshot of this step goes

  // Where spans go, if anybody asks.
  Span* spans = nullptr;
  int64_t spans_left = 0;
};

// Notes what a replica does for as long as it lives.
class Timed {
 public:
  Timed(Replica& replica, Doing doing)
      : replica_(replica), doing_(doing), start_(replica.spans_left > 0 ? now() : 0) {}

  ~Timed() {
    if (start_ != 0 && replica_.spans_left > 0) {
      *replica_.spans++ = {*replica_.number, doing_, start_, now()};
      replica_.spans_left--;
    }
  }

  static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

 private:
  Replica& replica_;
  const Doing doing_;
  const int64_t start_;
};

// As Python's `with lock:`.
template <class Lockable>
class Held {
 public:
  using Way = void (Lockable::*)();

  Held(Lockable& lock, Replica& replica, Way acquire = &Lockable::acquire)
      : lock_(acquired(lock, replica, acquire)), section_(replica, CRITICAL_SECTION) {}
  ~Held() { lock_.release(); }

 private:
  static Lockable& acquired(Lockable& lock, Replica& replica, Way acquire) {
    Timed wait(replica, LOCK_WAIT);
    (lock.*acquire)();
    return lock;
  }

  Lockable& lock_;
  const Timed section_;
};

class Loop {
 public:
  explicit Loop(const Task& task)
      : task_(task),
        replicas_(task.num_replicas),
        contributions_(task.num_replicas),
        counts_{std::vector<float>(task.optimizer.num_canaries), std::vector<float>(task.optimizer.num_canaries)},
        commits_(task.num_replicas),
        locks_(task.num_variables),
        barrier_(task.num_replicas, task.spins) {
    for (int64_t own = 0; own < task.num_replicas; own++) {
      replicas_[own].own = own;
    }
  }

  Replica& replica(int64_t own) { return replicas_[own]; }
  int64_t commits(int64_t own) const { return commits_[own].made.load(std::memory_order_relaxed); }

  void stop() {
    stopped_.store(true);
    barrier_.abort();
  }

  int64_t run(int64_t own, Chunk& chunk) {
    Replica& replica = replicas_[own];
    replica.spans = chunk.spans;
    replica.spans_left = chunk.spans_left;
    int64_t status = DONE, kept_index = 0;
    for (; chunk.done < chunk.num_steps && status == DONE; chunk.done += status == DONE) {
      status = stopped_.load(std::memory_order_relaxed) ? STOPPED : run_step(replica, chunk, kept_index);
    }
    chunk.spans_left = replica.spans_left;
    chunk.step_status = replica.step_status;
    return status;
  }

 private:
  int64_t run_step(Replica& replica, const Chunk& chunk, int64_t& kept_index) {
    const int64_t done = chunk.done;
    *replica.number = chunk.first + done;
    Timed timed(replica, STEP);
    {
      Timed data(replica, DATA);
      std::memcpy(replica.samples, chunk.samples + done * task_.batch_size, task_.batch_size * sizeof(int64_t));
    }
    const bool keeps = kept_index < chunk.num_kept && chunk.kept_steps[kept_index] == *replica.number;
    replica.kept = keeps ? chunk.snapshots + kept_index * task_.read_size : nullptr;
    if (!step(replica)) {
      return replica.step_status != 0 ? FAILED : STOPPED;
    }
    Timed logging(replica, LOGGING);
    if (keeps) {
      keep(replica, chunk, kept_index++);
    }
    std::memcpy(chunk.rows + done * task_.row_size, replica.row, task_.row_size * sizeof(float));
    chunk.notes[2 * done] = replica.version;
    chunk.notes[2 * done + 1] = replica.staleness;
    return DONE;
  }

  // Nobody writes to `total` before this replica, too, has reached the barrier of the next step that is kept.
  void keep(const Replica& replica, const Chunk& chunk, int64_t index) {
    const int64_t at = index * task_.read_size, size = task_.read_size * sizeof(float);
    std::memcpy(chunk.contributions + at, replica.contribution, size);
    if (chunk.totals != nullptr) {
      std::memcpy(chunk.totals + at, task_.total, size);
    }
  }

  // The update modes. Each is one step; false where it did not come to its end.

  bool step(Replica& replica) {
    switch (task_.mode) {
      case ALL_REDUCE:
        return all_reduce(replica);
      case SERIALIZED:
        return serialized(replica);
      case LOCKED:
        return locked(replica);
      case READER_WRITER:
        return reader_writer(replica);
      case OPTIMISTIC:
        return optimistic(replica);
      case PER_VARIABLE_LOCK:
        return per_variable_lock(replica);
      case LOCK_FREE:
        return lock_free(replica);
      case SLOTS_UNLOCKED:
        return slots_unlocked(replica);
      case WRITE_LOCKED:
        return write_locked(replica);
      case OVERWRITE:
        return overwrite(replica);
    }
    return false; // no mode of this number
  }

  // Safe: nobody writes outside the barriers, so the vector itself is what is read. `unscaled_sum` has another scale.
  bool all_reduce(Replica& replica) {
    replica.version = landed();
    fetch_ahead();
    if (!compute(replica)) {
      return false;
    }
    contributions_[replica.own] = replica.contribution;
    if (!wait(replica)) { // every contribution is there
      return false;
    }
    add_share(replica);
    if (replica.own == 0) {
      commit_all();
      sum_counts();
    }
    if (!wait(replica)) { // every share is in
      return false;
    }
    if (replica.own == 0) {
      // After the barrier, since the shares' rules read the counter before it; they read it again when this replica,
      // too, has reached the next one.
      count();
    }
    return true;
  }

  // Safe: one replica at a time.
  bool serialized(Replica& replica) {
    Held hold(lock_, replica);
    replica.version = landed();
    return compute(replica) && add(replica);
  }

  // Safe: the current values are read and written under one lock, so no other write falls between.
  bool locked(Replica& replica) {
    {
      Held hold(lock_, replica);
      copy(replica);
    }
    if (!compute(replica)) {
      return false;
    }
    Held hold(lock_, replica);
    return add(replica);
  }

  // Safe: as `locked`, but replicas copy side by side.
  bool reader_writer(Replica& replica) {
    {
      Held hold(shared_lock_, replica, &SharedLock::acquire_shared);
      copy(replica);
    }
    if (!compute(replica)) {
      return false;
    }
    Held hold(shared_lock_, replica);
    return add(replica);
  }

  // Safe: the version is odd while a write is under way, and what came too late is done again under the lock.
  bool optimistic(Replica& replica) {
    const int64_t version = version_.load();
    copy(replica);
    if (!compute(replica)) {
      return false;
    }
    Held hold(lock_, replica);
    if (version != version_.load() || version % 2) {
      copy(replica);
      if (!compute(replica)) {
        return false;
      }
    }
    version_++;
    add(replica);
    version_++;
    return true;
  }

  // Keeps every update, but no two variables together.
  bool per_variable_lock(Replica& replica) {
    replica.version = landed();
    for (int64_t variable = 0; variable < task_.num_variables; variable++) {
      Held hold(locks_[variable], replica);
      copy_variable(replica, variable);
    }
    if (!compute(replica)) {
      return false;
    }
    commit(replica);
    for (int64_t variable = 0; variable < task_.num_variables; variable++) {
      Held hold(locks_[variable], replica);
      Timed timed(replica, UPDATE);
      const Pieces pieces = cut(task_.variable_pieces, task_.variables, variable);
      write(replica, pieces, task_.vector, task_.vector, BOTH);
    }
    return true;
  }

  // Unsafe: as `locked` without the lock.
  bool lock_free(Replica& replica) {
    copy(replica);
    return compute(replica) && add(replica);
  }

  // Unsafe: slots are written back from the snapshot, without the lock.
  bool slots_unlocked(Replica& replica) {
    {
      Held hold(lock_, replica);
      copy(replica);
    }
    if (!compute(replica)) {
      return false;
    }
    replace_slots(replica);
    Held hold(lock_, replica);
    add_weights(replica);
    return true;
  }

  // Unsafe: what the write is based on was read before the lock was taken.
  bool write_locked(Replica& replica) {
    copy(replica);
    if (!compute(replica)) {
      return false;
    }
    Held hold(lock_, replica);
    return replace(replica);
  }

  // Unsafe: as `write_locked` without the lock.
  bool overwrite(Replica& replica) {
    copy(replica);
    return compute(replica) && replace(replica);
  }

  // What the modes are made of, as `SharedVector` and `JointUpdate` have it.

  void copy(Replica& replica) {
    Timed timed(replica, READ);
    replica.version = landed();
    std::memcpy(replica.snapshot, task_.vector, task_.snapshot_size * sizeof(float));
  }

  // What others have written stands in their caches. Asked for line by line in the middle of a matrix product it costs a
  // small model more than the product; all at once, little. What is larger than a cache would be gone again when needed.
  void fetch_ahead() const {
    constexpr int64_t FLOATS_A_LINE = CACHE_LINE / sizeof(float);
    for (int64_t at = 0; at < task_.read_size && task_.read_size <= MOST_FETCHED; at += FLOATS_A_LINE) {
      __builtin_prefetch(task_.vector + at);
    }
  }

  void copy_variable(Replica& replica, int64_t variable) {
    Timed timed(replica, READ);
    for (int64_t at = task_.variables[variable]; at < task_.variables[variable + 1]; at++) {
      const Piece& piece = task_.variable_pieces[at];
      if (piece.stop <= task_.read_size) {
        std::memcpy(
            replica.snapshot + piece.start, task_.vector + piece.start, (piece.stop - piece.start) * sizeof(float));
      }
    }
  }

  bool compute(Replica& replica) {
    Timed timed(replica, COMPUTE);
    if (replica.kept != nullptr) {
      const float* read = replica.snapshot == nullptr ? task_.vector : replica.snapshot;
      std::memcpy(replica.kept, read, task_.read_size * sizeof(float));
    }
    void* outputs[2];
    replica.step_status = replica.run(replica.frame, outputs);
    replica.contribution = static_cast<const float*>(outputs[0]);
    replica.row = static_cast<const float*>(outputs[1]);
    return replica.step_status == 0;
  }

  bool wait(Replica& replica) {
    Timed timed(replica, BARRIER_WAIT);
    return barrier_.wait();
  }

  int64_t landed() const {
    int64_t sum = 0;
    for (const Commits& each : commits_) {
      sum += each.made.load(std::memory_order_relaxed);
    }
    return sum;
  }

  void commit(Replica& replica) {
    replica.staleness = landed() - replica.version;
    std::atomic<int64_t>& made = commits_[replica.own].made;
    made.store(made.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  void commit_all() {
    const int64_t all = landed();
    for (Replica& each : replicas_) {
      each.staleness = all - each.version;
      std::atomic<int64_t>& made = commits_[each.own].made;
      made.store(made.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }
  }

  bool add(Replica& replica) {
    Timed timed(replica, UPDATE);
    commit(replica);
    write(replica, everything(), task_.vector, task_.vector, BOTH);
    return true;
  }

  bool replace(Replica& replica) {
    Timed timed(replica, WRITE);
    commit(replica);
    write(replica, everything(), replica.snapshot, replica.snapshot, BOTH);
    return true;
  }

  // The slots and the counter of the snapshot, with this update's change, in place of the shared ones.
  void replace_slots(Replica& replica) {
    Timed timed(replica, WRITE);
    write(replica, everything(), replica.snapshot, replica.snapshot, SLOTS);
  }

  // The weights, by a change that the snapshot's slots have led to.
  void add_weights(Replica& replica) {
    Timed timed(replica, UPDATE);
    commit(replica);
    write(replica, everything(), task_.vector, replica.snapshot, WEIGHTS);
  }

  // The sum over all replicas, scaled and applied, for this replica's share of the vector.
  void add_share(Replica& replica) {
    Timed timed(replica, UPDATE);
    float* total = replica.kept != nullptr ? task_.total : nullptr;
    const Pieces share = cut(task_.pieces, task_.shares, replica.own);
    sweep(task_.optimizer, everybodys(total), share.first, share.num, task_.vector, task_.vector, task_.vector, BOTH);
  }

  Given everybodys(float* total) {
    return {contributions_.data(), task_.num_replicas, task_.scale, task_.statistics_scale, total};
  }

  struct Pieces {
    const Piece* first;
    int64_t num;
  };

  static Pieces cut(const Piece* pieces, const int64_t* cuts, int64_t part) {
    return {pieces + cuts[part], cuts[part + 1] - cuts[part]};
  }

  Pieces everything() const { return cut(task_.pieces, task_.shares, task_.num_replicas); }

  // By this replica's contribution alone.
  void write(Replica& replica, Pieces pieces, const float* base, const float* slots_base, int parts) {
    const Given own{&replica.contribution, 1, 1.0f, 1.0f, nullptr};
    sweep(task_.optimizer, own, pieces.first, pieces.num, task_.vector, base, slots_base, parts);
  }

  // What raises the counter's canaries: summed while the contributions last.
  void sum_counts() {
    if (task_.optimizer.counter < 0) {
      return;
    }
    float room[BLOCK];
    const Given all = everybodys(nullptr);
    for (int end = 0; end < 2; end++) {
      const float* found = sum(all, task_.optimizer.first_canaries[end], task_.optimizer.num_canaries, room);
      std::memcpy(counts_[end].data(), found, counts_[end].size() * sizeof(float));
    }
  }

  void count() {
    if (task_.optimizer.counter >= 0) {
      const float* by[2] = {counts_[0].data(), counts_[1].data()};
      raise_counter(task_.optimizer, by, task_.vector, task_.vector);
    }
  }

  const Task task_;
  std::vector<Replica> replicas_;
  std::vector<const float*> contributions_;
  std::vector<float> counts_[2];
  std::vector<Commits> commits_;
  std::deque<Lock> locks_;
  Lock lock_;
  SharedLock shared_lock_;
  Barrier barrier_;
  std::atomic<int64_t> version_{0};
  std::atomic<bool> stopped_{false};
};

} // namespace

extern "C" {

// The loop of one run; a copy of the task is kept, and its arrays must last as long as the loop.
Loop* loop_create(const Task* task) {
  return new Loop(*task);
}

void loop_delete(Loop* loop) {
  delete loop;
}

// What a replica calls its compiled step with: `run` and its frame, the elements that tell it the batch's samples
// (int64 [batch_size]) and the step's number (int64 [1]), and its snapshot, or nullptr where it reads in place.
void loop_join(Loop* loop, int64_t own, Run run, void* frame, int64_t* samples, int64_t* number, float* snapshot) {
  Replica& replica = loop->replica(own);
  replica.run = run;
  replica.frame = frame;
  replica.samples = samples;
  replica.number = number;
  replica.snapshot = snapshot;
}

// Some steps of one replica, by its own thread.
int64_t loop_run(Loop* loop, int64_t own, Chunk* chunk) {
  return loop->run(own, *chunk);
}

// All replicas end before their next step, or at the barrier where they wait.
void loop_stop(Loop* loop) {
  loop->stop();
}

int64_t loop_commits(const Loop* loop, int64_t own) {
  return loop->commits(own);
}

} // extern "C"
