// The training loss of rows of logits, which become its gradient in place, a row by one thread.

#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace loss {

constexpr int AT_ONCE = 4;  // vectors: their sums are independent, so they overlap, and round less

// Logits as they enter the softmax: themselves, or softcap * tanh(logits / softcap).
struct Plain {
  Floats scores(Floats x) const { return x; }
  Floats slope(Floats) const { return spread(1.0f); }
};

struct Capped {
  float cap;
  Floats bent(Floats x) const { return 1.0f - 2.0f / (exponential(x * (2.0f / cap)) + 1.0f); }
  Floats scores(Floats x) const { return bent(x) * cap; }
  Floats slope(Floats x) const {
    const Floats t = bent(x);
    return 1.0f - t * t;
  }
};

template <class To>
inline void put(To* to, const void* from, long count) {
  if (count == LANES)
    std::memcpy(to, from, LANES * sizeof(To));
  else
    std::memcpy(to, from, count * sizeof(To));
}

inline void store(float* to, Floats v, long count) { put(to, &v, count); }

inline void store(Bf16* to, Floats v, long count) {
  const Halves halves = narrowed(v);
  put(to, &halves, count);
}

// The vector at `place`; lanes at and behind the end are `outside`.
template <class In>
Floats part(const In* row, long place, long size, float outside) {
  Floats v = spread(outside);
  for (long lane = 0; place + lane < size; lane++) v[lane] = widened(row[place + lane]);
  return v;
}

// f(which of AT_ONCE, vector, place, how many of its lanes count), for all vectors of a row.
template <class In, class F>
void each_vector(const In* row, long size, float outside, F f) {
  long i = 0;
  for (; i + AT_ONCE * LANES <= size; i += AT_ONCE * LANES)
    for (int n = 0; n < AT_ONCE; n++) f(n, load(row + i + n * LANES), i + n * LANES, LANES);
  for (; i + LANES <= size; i += LANES) f(0, load(row + i), i, LANES);
  if (i < size) f(0, part(row, i, size, outside), i, size - i);
}

// -log p(target), and the row becomes (softmax - one-hot) * factor.
template <class In, class Bend>
float differentiate(In* row, long size, long target, float factor, Bend bend) {
  Floats best[AT_ONCE], sums[AT_ONCE] = {};
  for (Floats& v : best) v = spread(-INFINITY);
  each_vector(row, size, -INFINITY, [&](int n, Floats x, long, long) {
    best[n] = x > best[n] ? x : best[n];
  });
  float top = -INFINITY;
  for (const Floats& v : best)
    for (int lane = 0; lane < LANES; lane++) top = std::max(top, v[lane]);
  top = bend.scores(spread(top))[0];
  const float at_target = bend.scores(spread(widened(row[target])))[0];
  const float target_slope = bend.slope(spread(widened(row[target])))[0];

  const auto weight = [&](Floats x) {  // e^-87 stands for less: a lane that is outside has none
    const Floats shifted = bend.scores(x) - top;
    return shifted < -87.0f ? Floats{} : exponential(shifted);
  };
  each_vector(row, size, -INFINITY, [&](int n, Floats x, long, long count) {
    Floats p = weight(x);
    for (long lane = count; lane < LANES; lane++) p[lane] = 0;
    sums[n] += p;
  });
  const float total = sum_lanes(((sums[0] + sums[1]) + (sums[2] + sums[3])));
  const float scale = factor / total;
  const float p_target = exponential(spread(at_target - top))[0] * scale;
  each_vector(row, size, 0.0f, [&](int, Floats x, long place, long count) {
    store(row + place, weight(x) * scale * bend.slope(x), count);
  });
  narrow((p_target - factor) * target_slope, row[target]);
  return std::log(total) + (top - at_target);
}

template <class In, class Bend>
void all_rows(In* logits, long rows, long size, const int64_t* targets, float factor, Bend bend,
              float* nll, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < rows; r++) {
    In* row = logits + r * size;
    nll[r] = targets[r] < 0 ? 0.0f : differentiate(row, size, targets[r], factor, bend);
    if (targets[r] < 0) std::fill(row, row + size, In{});
  }
}

template <class In>
void run(In* logits, long rows, long size, const int64_t* targets, float factor, float softcap,
         float* nll, int threads) {
  if (softcap > 0)
    all_rows(logits, rows, size, targets, factor, Capped{softcap}, nll, threads);
  else
    all_rows(logits, rows, size, targets, factor, Plain{}, nll, threads);
}

}  // namespace loss
