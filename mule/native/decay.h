// What tokens of a chunk weigh for later ones in Mamba-2, forward and backward.
// Source: Dao and Gu 2024 (SSD), section 6: the scores C B^T times a mask of decays.
//
// Shapes: c chunks of Q tokens, G groups of H heads. A group of a chunk is computed by one thread in a
// fixed order: no result depends on how many there are.

#pragma once

#include <omp.h>

#include <algorithm>

#include "vectors.h"

namespace decay {

struct Job {
  int64_t is_bf16, chunks, tokens, groups, heads, threads;
  const void* scores;       // (c, G, Q, Q)
  const float* log_decay;   // (c, Q, G, H): since the chunk or the token's document began
  const int64_t* segments;  // (c, Q): a token sees those of its own number; null: all
  void* weights;            // (c, G, H, Q, Q): scores times decays, 0 where nothing is seen
  const void* grad_weights;
  void* grad_scores;
  float* grad_log_decay;  // as log_decay
  float* room;            // of each thread: (Q, Q), and (2, Q)
};

inline int64_t room_floats(const Job& job) { return job.tokens * (job.tokens + 2); }

// The lanes from `from` to before `to`, of those that begin at j; 0 in the others.
inline Floats within(Floats v, long j, long from, long to) {
  Ints places;
  for (int l = 0; l < LANES; l++) places[l] = l + (int)j;
  return (places >= (int)from) & (places < (int)to) ? v : Floats{};
}

// A head of a group of a chunk.
template <class In>
struct Head {
  const Job& job;
  long chunk, group, head;

  const In* scores() const {
    return (const In*)job.scores + (chunk * job.groups + group) * job.tokens * job.tokens;
  }

  long matrix() const {  // where its weights begin
    return ((chunk * job.groups + group) * job.heads + head) * job.tokens * job.tokens;
  }

  void read_decays(float* to) const {
    for (long i = 0; i < job.tokens; i++) to[i] = job.log_decay[decay_at(i)];
  }

  long decay_at(long token) const {
    return ((chunk * job.tokens + token) * job.groups + group) * job.heads + head;
  }

  // Whether a token sees none before it.
  bool begins(long token) const {
    const int64_t* segments = job.segments ? job.segments + chunk * job.tokens : nullptr;
    return token == 0 || (segments && segments[token] != segments[token - 1]);
  }
};

template <class In>
void forward_head(const Head<In>& own, float* decays) {
  const long size = own.job.tokens;
  own.read_decays(decays);
  In* weights = (In*)own.job.weights + own.matrix();
  for (long i = 0, first = 0; i < size; i++) {
    if (own.begins(i)) first = i;
    for (long j = 0; j < size; j += LANES) {
      Floats w{};
      if (j <= i && j + LANES > first) {
        const Floats decay = exponential(decays[i] - load(decays + j));
        w = within(load(own.scores() + i * size + j) * decay, j, first, i + 1);
      }
      store(weights + i * size + j, w);
    }
  }
}

// `grad_scores` (Q, Q) fp32 are added to; `columns` (Q) is room.
template <class In>
void backward_head(const Head<In>& own, float* grad_scores, float* decays, float* columns) {
  const long size = own.job.tokens;
  own.read_decays(decays);
  std::fill_n(columns, size, 0.0f);
  const In* grads = (const In*)own.job.grad_weights + own.matrix();
  for (long i = 0, first = 0; i < size; i++) {
    if (own.begins(i)) first = i;
    Floats row{};
    for (long j = first / LANES * LANES; j <= i; j += LANES) {
      const long at = i * size + j;
      const Floats decay = exponential(decays[i] - load(decays + j));
      const Floats grad = within(load(grads + at) * decay, j, first, i + 1);
      const Floats of_exponent = within(grad * load(own.scores() + at), j, first, i + 1);
      store(grad_scores + at, load(grad_scores + at) + grad);
      store(columns + j, load(columns + j) + of_exponent);
      row += of_exponent;
    }
    own.job.grad_log_decay[own.decay_at(i)] = sum_lanes(row);
  }
  for (long i = 0; i < size; i++) own.job.grad_log_decay[own.decay_at(i)] -= columns[i];
}

template <class In>
void run(const Job& job, bool is_forward) {
  const long square = job.tokens * job.tokens;
#pragma omp parallel for num_threads(job.threads)
  for (long task = 0; task < job.chunks * job.groups; task++) {
    float* sums = job.room + omp_get_thread_num() * room_floats(job);
    float *decays = sums + square, *columns = decays + job.tokens;
    Head<In> own = {job, task / job.groups, task % job.groups, 0};
    if (!is_forward) std::fill_n(sums, square, 0.0f);
    for (; own.head < job.heads; own.head++)
      if (is_forward)
        forward_head(own, decays);
      else
        backward_head(own, sums, decays, columns);
    if (!is_forward) {
      In* to = (In*)job.grad_scores + task * square;
      for (long n = 0; n < square; n += LANES) store(to + n, load(sums + n));
    }
  }
}

}  // namespace decay
