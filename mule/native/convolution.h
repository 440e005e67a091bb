// The short causal convolution before a state-space layer, with its silu, forward and backward.
//
// A channel is computed by one thread, tokens in order: no result depends on how many threads there
// are. All arithmetic is fp32.

#pragma once

#include <omp.h>

#include <algorithm>

#include "vectors.h"

namespace convolution {

struct Job {
  int64_t is_bf16, rows, tokens, channels, taps, threads;
  const void* x;
  int64_t x_row, x_token;     // strides in numbers; channels side by side
  const void *weight, *bias;  // (taps, channels), the token's own first; (channels), or null
  const int64_t* segments;    // (rows, tokens): a token sees those of its own number; null: all
  void* y;                    // this and what follows (rows, tokens, channels), side by side
  const void* grad_y;
  void* grad_x;
  float *grad_weight, *grad_bias;  // as weight and bias
  int32_t* reach;                  // room: (rows, tokens)
  float* room;                     // of each thread: (tokens, LANES)
};

constexpr long VECTORS = 2, WIDTH = VECTORS * LANES;  // channels at once

inline int64_t room_floats(const Job& job) { return job.tokens * LANES; }

// How many of the tokens before it each one sees, at most taps - 1.
inline void find_reach(const Job& job) {
  for (long at = 0; at < job.rows * job.tokens; at++) {
    const bool begins = at % job.tokens == 0 ||
                        (job.segments && job.segments[at] != job.segments[at - 1]);
    job.reach[at] = begins ? 0 : std::min<int32_t>(job.reach[at - 1] + 1, job.taps - 1);
  }
}

// Some channels of a row: where they are, and their weights.
template <class In, int TAPS>
struct Channels {
  const In* x;
  long x_token, channels, offset, count;  // `offset` of the row in what lies side by side
  const int32_t* reach;
  Floats weight[TAPS][VECTORS], bias[VECTORS];

  Channels(const Job& job, long row, long first)
      : x((const In*)job.x + row * job.x_row + first),
        x_token(job.x_token),
        channels(job.channels),
        offset(row * job.tokens * job.channels + first),
        count(std::min(VECTORS, (job.channels - first) / LANES)),
        reach(job.reach + row * job.tokens) {
    for (long v = 0; v < count; v++) {
      for (long back = 0; back < TAPS; back++)
        weight[back][v] = load((const In*)job.weight + back * channels + first + v * LANES);
      bias[v] = job.bias ? load((const In*)job.bias + first + v * LANES) : Floats{};
    }
  }

  Floats input(long token, long v) const { return load(x + token * x_token + v * LANES); }
  long at(long token, long v) const { return offset + token * channels + v * LANES; }

  // A token's sum before its silu.
  Floats sum(long token, long v) const {
    Floats z = bias[v];
    if (reach[token] == TAPS - 1)
#pragma GCC unroll 4
      for (long back = 0; back < TAPS; back++) z += weight[back][v] * input(token - back, v);
    else
      for (long back = 0; back <= reach[token]; back++)
        z += weight[back][v] * input(token - back, v);
    return z;
  }
};

template <class In, int TAPS>
void forward(const Job& job) {
  const long blocks = (job.channels + WIDTH - 1) / WIDTH, tokens = job.tokens;
  In* y = (In*)job.y;
  find_reach(job);
#pragma omp parallel for num_threads(job.threads)
  for (long task = 0; task < job.rows * blocks; task++) {
    const Channels<In, TAPS> own(job, task / blocks, task % blocks * WIDTH);
    for (long v = 0; v < own.count; v++)
      for (long token = 0; token < tokens; token++) {
        const Floats z = own.sum(token, v);
        store(y + own.at(token, v), z * sigmoid(z));
      }
  }
}

// The gradients of one row's vector of channels; those of the weights and the bias are added to `sums`.
template <class In, int TAPS>
void backward_row(const Channels<In, TAPS>& own, const Job& job, long v, float* grads,
                  Floats* sums) {
  const In* grad_y = (const In*)job.grad_y;
  In* grad_x = (In*)job.grad_x;
  const long tokens = job.tokens;
  Floats of_row[TAPS + 1] = {};
  for (long token = 0; token < tokens; token++) {
    const Floats z = own.sum(token, v), s = sigmoid(z);
    const Floats grad = silu_backward(load(grad_y + own.at(token, v)), z, s);
    store(grads + token * LANES, grad);
    of_row[TAPS] += grad;
#pragma GCC unroll 4
    for (long back = 0; back < TAPS; back++)
      if (back <= own.reach[token]) of_row[back] += grad * own.input(token - back, v);
  }
  for (long token = 0; token < tokens; token++) {
    Floats grad{};
#pragma GCC unroll 4
    for (long back = 0; back < TAPS; back++)
      if (token + back < tokens && back <= own.reach[token + back])
        grad += own.weight[back][v] * load(grads + (token + back) * LANES);
    store(grad_x + own.at(token, v), grad);
  }
  for (long n = 0; n <= TAPS; n++) sums[n] += of_row[n];
}

template <class In, int TAPS>
void backward(const Job& job) {
  find_reach(job);
#pragma omp parallel for num_threads(job.threads)
  for (long first = 0; first < job.channels; first += WIDTH) {
    float* grads = job.room + omp_get_thread_num() * room_floats(job);
    Floats sums[VECTORS][TAPS + 1] = {};
    for (long row = 0; row < job.rows; row++) {
      const Channels<In, TAPS> own(job, row, first);
      for (long v = 0; v < own.count; v++) backward_row(own, job, v, grads, sums[v]);
    }
    for (long v = 0; v < std::min(VECTORS, (job.channels - first) / LANES); v++) {
      const long at = first + v * LANES;
      for (long back = 0; back < TAPS; back++)
        store(job.grad_weight + back * job.channels + at, sums[v][back]);
      store(job.grad_bias + at, sums[v][TAPS]);
    }
  }
}

template <class In>
void run(const Job& job, bool is_forward) {
  switch (job.taps) {
    case 2: return (is_forward ? forward<In, 2> : backward<In, 2>)(job);
    case 3: return (is_forward ? forward<In, 3> : backward<In, 3>)(job);
    case 4: return (is_forward ? forward<In, 4> : backward<In, 4>)(job);
  }
}

}  // namespace convolution
