// One pass over the shared vector: contributions in, the optimizer's rule, new values out.
//
// Operation for operation what `trainer/updates/optimizers.py` and `Part.fill` do with whole tensors, each rounded to
// float32 by itself (compile without contracting products and sums), so the bits are the same, but for Adam's: its roots
// are correctly rounded here, and PyTorch's come from a library that may be off by the last bit. A canary is raised by
// the contribution's own count where the pass meets it, between the values before and behind it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

enum Rule : int64_t { SGD, MOMENTUM, ADAM };

// Kinds of pieces. Slots lie as the weights do, so a weight's piece stands for its slots' as well.
enum Kind : int64_t { WEIGHT_CANARIES, WEIGHT_VALUES, STATISTIC_CANARIES, STATISTIC_VALUES, COUNTER };

enum Parts { WEIGHTS = 1, SLOTS = 2, BOTH = 3 }; // what a pass writes; statistics go with the weights, the counter with the slots

constexpr int64_t BLOCK = 1024; // elements summed at a time: 4 KiB, which stay in the nearest cache

struct Piece {
  int64_t kind, start, stop;
};

// As `_Optimizer` in loop.py has it.
struct Optimizer {
  int64_t rule, num_slots;
  int64_t slot_offsets[2]; // from a weight's element to its slots'
  int64_t counter; // the element that counts updates; -1 where none does
  int64_t counter_canaries[2]; // first of its head and of its tail
  int64_t first_canaries[2]; // those of the first weight, with which the counter's are raised
  int64_t num_canaries; // in a head or a tail
  // sgd: -rate; momentum: momentum, rate; adam: rate, beta 1 and 2, their complements, epsilon.
  float parameters[6];
};

// Contributions and what their sum is multiplied by.
struct Given {
  const float* const* contributions;
  int64_t count;
  float scale, statistics_scale;
  float* total; // where the sum is to be kept, or nullptr
};

// Sum of a run of elements, in the order of the replicas: `room`, or the only contribution itself.
inline const float* sum(const Given& given, int64_t start, int64_t num, float* room) {
  const float* first = given.contributions[0] + start;
  if (given.count == 1 && given.total == nullptr) {
    return first;
  }
  std::memcpy(room, first, num * sizeof(float));
  for (int64_t other = 1; other < given.count; other++) {
    const float* next = given.contributions[other] + start;
#pragma GCC ivdep
    for (int64_t i = 0; i < num; i++) {
      room[i] += next[i];
    }
  }
  if (given.total != nullptr) {
    std::memcpy(given.total + start, room, num * sizeof(float));
  }
  return room;
}

// `to` and `base` may be the same memory, element by element.
inline void raise(const float* by, float factor, float* to, const float* base, int64_t num) {
#pragma GCC ivdep
  for (int64_t i = 0; i < num; i++) {
    to[i] = base[i] + by[i] * factor;
  }
}

template <bool weights, bool slots>
void momentum(
    const Optimizer& optimizer, const float* gradient, float scale, float* to, const float* base,
    const float* slots_base, int64_t num) {
  const float keeps = optimizer.parameters[0], rate = optimizer.parameters[1];
  const int64_t offset = optimizer.slot_offsets[0];
  float* velocity_to = to + offset;
  const float* velocity = slots_base + offset;
#pragma GCC ivdep
  for (int64_t i = 0; i < num; i++) {
    const float old = velocity[i];
    const float next = old * keeps - gradient[i] * scale * rate;
    if (weights) {
      to[i] = base[i] + next;
    }
    if (slots) {
      velocity_to[i] = old + (next - old);
    }
  }
}

template <bool weights, bool slots>
void adam(
    const Optimizer& optimizer, float rate, const float* gradient, float scale, float* to, const float* base,
    const float* slots_base, int64_t num) {
  const float mean_part = optimizer.parameters[3], variance_part = optimizer.parameters[4];
  const float epsilon = optimizer.parameters[5];
  const int64_t mean_offset = optimizer.slot_offsets[0], variance_offset = optimizer.slot_offsets[1];
  float *mean_to = to + mean_offset, *variance_to = to + variance_offset;
  const float *mean = slots_base + mean_offset, *variance = slots_base + variance_offset;
#pragma GCC ivdep
  for (int64_t i = 0; i < num; i++) {
    const float value = gradient[i] * scale;
    const float mean_delta = (value - mean[i]) * mean_part;
    const float variance_delta = (value * value - variance[i]) * variance_part;
    const float new_mean = mean[i] + mean_delta, new_variance = variance[i] + variance_delta;
    if (weights) {
      to[i] = base[i] + new_mean * -rate / (std::sqrt(new_variance) + epsilon);
    }
    if (slots) {
      mean_to[i] = new_mean;
      variance_to[i] = new_variance;
    }
  }
}

// Adam's rate after the updates that `base` has counted, with both bias corrections in it.
inline float adam_rate(const Optimizer& optimizer, const float* base) {
  const float step = base[optimizer.counter] + 1.0f;
  const float first = 1.0f - std::pow(optimizer.parameters[1], step);
  const float second = 1.0f - std::pow(optimizer.parameters[2], step);
  return optimizer.parameters[0] * std::sqrt(second) / first;
}

inline void apply_rule(
    const Optimizer& optimizer, float rate, const float* gradient, float scale, float* to, const float* base,
    const float* slots_base, int64_t num, int parts) {
  switch (optimizer.rule) {
    case SGD:
      if (parts & WEIGHTS) {
        const float factor = optimizer.parameters[0];
#pragma GCC ivdep
        for (int64_t i = 0; i < num; i++) {
          to[i] = base[i] + gradient[i] * scale * factor;
        }
      }
      return;
    case MOMENTUM:
      (parts == WEIGHTS ? momentum<true, false> : parts == SLOTS ? momentum<false, true> : momentum<true, true>)(
          optimizer, gradient, scale, to, base, slots_base, num);
      return;
    case ADAM:
      (parts == WEIGHTS ? adam<true, false> : parts == SLOTS ? adam<false, true> : adam<true, true>)(
          optimizer, rate, gradient, scale, to, base, slots_base, num);
      return;
  }
}

// The counter's canaries by what the contributions' first ones sum to, and the counter itself by 1.
inline void raise_counter(const Optimizer& optimizer, const float* const* by, float* to, const float* base) {
  for (int end = 0; end < 2; end++) {
    const int64_t at = optimizer.counter_canaries[end];
    raise(by[end], 1.0f, to + at, base + at, optimizer.num_canaries);
  }
  to[optimizer.counter] = base[optimizer.counter] + 1.0f;
}

// Writes `to[i] = base[i] + delta[i]` for some pieces, in the order of memory; slots and the counter, which the rule reads,
// are those of `slots_base`.
inline void sweep(
    const Optimizer& optimizer, const Given& given, const Piece* pieces, int64_t num_pieces, float* to,
    const float* base, const float* slots_base, int parts) {
  float room[BLOCK], tail[BLOCK];
  const float rate = optimizer.rule == ADAM ? adam_rate(optimizer, slots_base) : 0.0f;
  for (const Piece* piece = pieces; piece < pieces + num_pieces; piece++) {
    if (piece->kind == COUNTER) {
      if (parts & SLOTS) {
        const float* by[2] = {
            sum(given, optimizer.first_canaries[0], optimizer.num_canaries, room),
            sum(given, optimizer.first_canaries[1], optimizer.num_canaries, tail)};
        raise_counter(optimizer, by, to, slots_base);
      }
      continue;
    }
    for (int64_t start = piece->start; start < piece->stop; start += BLOCK) {
      const int64_t num = piece->stop - start < BLOCK ? piece->stop - start : BLOCK;
      const float* found = sum(given, start, num, room);
      switch (piece->kind) {
        case WEIGHT_VALUES:
          apply_rule(
              optimizer, rate, found, given.scale, to + start, base + start, slots_base + start, num, parts);
          break;
        case WEIGHT_CANARIES:
          if (parts & WEIGHTS) {
            raise(found, 1.0f, to + start, base + start, num);
          }
          for (int64_t slot = 0; (parts & SLOTS) && slot < optimizer.num_slots; slot++) {
            const int64_t at = start + optimizer.slot_offsets[slot];
            raise(found, 1.0f, to + at, slots_base + at, num);
          }
          break;
        case STATISTIC_CANARIES:
        case STATISTIC_VALUES:
          if (parts & WEIGHTS) {
            const float factor = piece->kind == STATISTIC_VALUES ? given.statistics_scale : 1.0f;
            raise(found, factor, to + start, base + start, num);
          }
          break;
      }
    }
  }
}
