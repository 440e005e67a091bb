// Causal attention inside documents, forward and backward, a block of queries and of keys at a time.
// Source: Dao 2023 (FlashAttention-2), algorithms 1 and 2. Sums are in fp32; what multiplies the
// values, and the scores' gradient, are rounded to the tensors' precision.
//
// A document's head is computed by one thread in a fixed order: no result depends on their number.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "products.h"

namespace attention {

struct Tensor {  // (rows, heads, tokens, channels): strides in numbers, channels side by side
  char* data;
  int64_t row, head, token;
};

struct Job {
  int64_t is_bf16, heads, kv_heads, tokens, head_dim, threads;
  int64_t window;  // how many tokens a token sees, itself included; 0: all before it
  double scale;
  int64_t num_documents;
  const int64_t* documents;  // (row, start, end) of each
  Tensor q, k, v, y, grad_y, grad_q, grad_k, grad_v;
  float* lse;                        // (rows, heads, tokens)
  float *head_grad_k, *head_grad_v;  // (rows, heads, tokens, channels), where heads share keys
  char* room;                        // of each thread one after the other
  int64_t room_bytes;                // of a thread, as mule_attention_room says
};

constexpr long BLOCK = 64;  // queries, and keys, at once: 32 is slower, 128 no faster
constexpr long ALIGNED = 64, PIECES = 16;  // bytes; at most so many pieces of a thread's memory
constexpr float HIDDEN = -1e30f;

// What is computed at once: a document, and one of its heads.
struct Task {
  const Job& job;
  long row, start, end, head;

  long size() const { return job.head_dim; }
  long length() const { return end - start; }
  long padded() const { return (length() + BLOCK - 1) / BLOCK * BLOCK; }
  long kv_head() const { return head / (job.heads / job.kv_heads); }
  long per_head(long token) const { return (row * job.heads + head) * job.tokens + start + token; }

  template <class In>
  In* at(const Tensor& t, long of_head, long token = 0) const {
    return (In*)t.data + row * t.row + of_head * t.head + (start + token) * t.token;
  }

  // The first block of keys that a query sees.
  long first_key(long query) const {
    return job.window > 0 ? std::max(0L, query - job.window + 1) / BLOCK * BLOCK : 0;
  }
};

// A thread's memory, cut one piece after the other.
class Room {
 public:
  explicit Room(const Job& job) : next(job.room + omp_get_thread_num() * job.room_bytes) {}

  template <class T>
  T* take(long count) {
    T* taken = (T*)next;
    next += (count * sizeof(T) + ALIGNED - 1) / ALIGNED * ALIGNED;
    return taken;
  }

 private:
  char* next;
};

// ---------------------------------------------------------------- operands

inline float word_of(const float* number, const float*, float*) { return *number; }
inline float word_of(const Bf16* number, const Bf16*, float*) { return widened(*number); }
inline Pair word_of(const Bf16* first, const Bf16* second, Pair*) {
  return {first->bits | (uint32_t)second->bits << 16};
}

template <class Word, class In>
inline Word word(const In* first, const In* second) {
  return word_of(first, second, (Word*)nullptr);
}

// Words along the channels, token by token: (padded, size / PER); zeros behind the last token.
template <class Word, class In>
void by_token(const In* from, long stride, long tokens, long padded, long size, Word* to) {
  const long words = size / PER<Word>;
  for (long t = 0; t < tokens; t++)
    for (long w = 0; w < words; w++) {
      const In* place = from + t * stride + w * PER<Word>;
      to[t * words + w] = word<Word>(place, place + PER<Word> - 1);
    }
  std::fill(to + tokens * words, to + padded * words, Word{});
}

// Words along the channels, a block's tokens side by side: (padded / BLOCK, size / PER, BLOCK).
template <class Word, class In>
void by_channel(const In* from, long stride, long tokens, long padded, long size, Word* to) {
  const long words = size / PER<Word>;
  for (long first = 0; first < padded; first += BLOCK, to += words * BLOCK)
    for (long w = 0; w < words; w++)
      for (long t = 0; t < BLOCK; t++) {
        const In* place = from + (first + t) * stride + w * PER<Word>;
        to[w * BLOCK + t] =
            first + t < tokens ? word<Word>(place, place + PER<Word> - 1) : Word{};
      }
}

// Words along the tokens, their channels side by side: (padded / PER, size).
template <class Word, class In>
void across_tokens(const In* from, long stride, long tokens, long padded, long size, Word* to) {
  static const In none{};
  for (long t = 0; t < padded; t += PER<Word>)
    for (long d = 0; d < size; d++) {
      const long last = t + PER<Word> - 1;
      const In* first = t < tokens ? from + t * stride + d : &none;
      *to++ = word<Word>(first, last < tokens ? from + last * stride + d : &none);
    }
}

// ---------------------------------------------------------------- scores

inline Floats share(Floats x) { return x < -87.0f ? Floats{} : exponential(x); }

// The places of a block's keys that one query sees.
struct Seen {
  long first, last;

  Seen(const Task& task, long query, long key) {
    first = task.job.window > 0 ? std::max(0L, query - task.job.window + 1 - key) : 0;
    last = std::min(query, task.length() - 1) - key;
  }
  bool all(long count) const { return first == 0 && last >= count - 1; }

  Floats of(Floats v, long place, float hidden) const {
    Words lanes;
    for (int l = 0; l < LANES; l++) lanes[l] = l;
    const auto places = (Ints)lanes + (int)place;
    return ((places >= (int)first) & (places <= (int)last)) ? v : spread(hidden);
  }
};

// The softmax of the rows of a block's scores so far. Source: FlashAttention-2, algorithm 1.
struct Running {
  float best = HIDDEN, total = 0;

  // The scores become shares by the best so far; what earlier shares are multiplied by.
  float add(float* scores, long count, float scale, const Seen& seen) {
    const bool all = seen.all(count);
    Floats bests = spread(HIDDEN), sums{};
    for (long j = 0; j < count; j += LANES) {
      Floats v = load(scores + j) * scale;
      if (!all) v = seen.of(v, j, HIDDEN);
      bests = v > bests ? v : bests;
      store(scores + j, v);
    }
    float top = best;
    for (int l = 0; l < LANES; l++) top = std::max(top, bests[l]);
    for (long j = 0; j < count; j += LANES) {
      Floats p = share(load(scores + j) - top);
      if (!all) p = seen.of(p, j, 0.0f);  // of a row that sees nothing here
      sums += p;
      store(scores + j, p);
    }
    const float kept = best == top ? 1.0f : share(spread(best - top))[0];
    total = total * kept + sum_lanes(sums);
    best = top;
    return kept;
  }
};

template <class In>
void narrow_row(const float* from, long size, float factor, In* to) {
  for (long d = 0; d < size; d++) narrow(from[d] * factor, to[d]);
}

inline long columns_of(long keys) { return (keys + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }
inline long rows_of(long queries) { return (queries + TILE - 1) / TILE * TILE; }

// ---------------------------------------------------------------- forward

template <class In, class Word>
void forward(const Task& task) {
  const Job& job = task.job;
  const long size = task.size(), length = task.length(), padded = task.padded();
  const long words = size / PER<Word>, row_words = BLOCK / PER<Word>;
  Room room(job);
  Word* keys = room.take<Word>(padded * words);
  Word* values = room.take<Word>(padded * words);
  Word* queries = room.take<Word>(BLOCK * words);
  Word* shares = room.take<Word>(BLOCK * row_words);
  float* scores = room.take<float>(BLOCK * BLOCK);
  float* out = room.take<float>(BLOCK * size);
  by_channel(task.at<In>(job.k, task.kv_head()), job.k.token, length, padded, size, keys);
  across_tokens(task.at<In>(job.v, task.kv_head()), job.v.token, length, padded, size, values);

  for (long first = 0; first < length; first += BLOCK) {
    const long count = std::min(BLOCK, length - first), rows = rows_of(count);
    by_token(task.at<In>(job.q, task.head, first), job.q.token, count, rows, size, queries);
    Running running[BLOCK];
    std::fill(out, out + rows * size, 0.0f);
    for (long key = task.first_key(first); key < first + count; key += BLOCK) {
      const long columns = columns_of(std::min(BLOCK, length - key));
      multiply<Word>(rows, columns, words, {queries, words, 1}, keys + key * words, BLOCK, scores,
                     BLOCK, false);
      for (long i = 0; i < rows; i++) {
        const Seen seen(task, first + i, key);
        const float kept = running[i].add(scores + i * BLOCK, columns, job.scale, seen);
        float* so_far = out + i * size;
        if (kept != 1.0f)
          for (long d = 0; d < size; d += LANES) store(so_far + d, load(so_far + d) * kept);
        to_words(scores + i * BLOCK, columns, shares + i * row_words);
      }
      multiply<Word>(rows, size, columns / PER<Word>, {shares, row_words, 1}, values + key * words,
                     size, out, size, true);
    }
    for (long i = 0; i < count; i++) {
      const Running& own = running[i];
      narrow_row(out + i * size, size, 1.0f / own.total, task.at<In>(job.y, task.head, first + i));
      job.lse[task.per_head(first + i)] = own.best + std::log(own.total);
    }
  }
}

// ---------------------------------------------------------------- backward

// A block's scores and the gradient of its shares become the shares and the gradient of the scores.
// Source: FlashAttention-2, algorithm 2, lines 11 to 14.
inline void differentiate(float* scores, float* grad, long count, float scale, float lse,
                          float delta, const Seen& seen) {
  const bool all = seen.all(count);
  for (long j = 0; j < count; j += LANES) {
    Floats p = share(load(scores + j) * scale - lse);
    if (!all) p = seen.of(p, j, 0.0f);
    store(scores + j, p);
    store(grad + j, p * (load(grad + j) - delta) * scale);
  }
}

// The sum over the channels of grad_y * y, token by token.
template <class In>
void sum_products(const Task& task, float* delta) {
  for (long t = 0; t < task.length(); t++) {
    const In* y = task.at<In>(task.job.y, task.head, t);
    const In* grad_y = task.at<In>(task.job.grad_y, task.head, t);
    float sum = 0;
    for (long d = 0; d < task.size(); d++) sum += widened(grad_y[d]) * widened(y[d]);
    delta[t] = sum;
  }
}

// A block of keys' gradient, (size, BLOCK), to its tokens.
template <class In>
void put(const Task& task, const float* from, long key, const Tensor& to, float* of_heads) {
  const long count = std::min(BLOCK, task.length() - key), size = task.size();
  for (long t = 0; t < count; t++)
    if (task.job.heads == task.job.kv_heads) {
      In* token = task.at<In>(to, task.head, key + t);
      for (long d = 0; d < size; d++) narrow(from[d * BLOCK + t], token[d]);
    } else {
      float* token = of_heads + task.per_head(key + t) * size;
      for (long d = 0; d < size; d++) token[d] = from[d * BLOCK + t];
    }
}

template <class In, class Word>
void backward(const Task& task) {
  const Job& job = task.job;
  const long size = task.size(), length = task.length(), padded = task.padded();
  const long words = size / PER<Word>, row_words = BLOCK / PER<Word>;
  Room room(job);
  const auto operand = [&] { return room.take<Word>(padded * words); };
  Word *q_rows = operand(), *q_across = operand(), *g_rows = operand(), *g_across = operand();
  Word *k_columns = operand(), *k_across = operand(), *v_columns = operand();
  Word* p_across = room.take<Word>(BLOCK * row_words);
  Word* s_across = room.take<Word>(BLOCK * row_words);
  Word* s_rows = room.take<Word>(BLOCK * row_words);
  float* grad_q = room.take<float>(padded * size);
  float* delta = room.take<float>(padded);
  float *scores = room.take<float>(BLOCK * BLOCK), *grad = room.take<float>(BLOCK * BLOCK);
  float *grad_k = room.take<float>(BLOCK * size), *grad_v = room.take<float>(BLOCK * size);

  const In *q = task.at<In>(job.q, task.head), *g = task.at<In>(job.grad_y, task.head);
  const In *k = task.at<In>(job.k, task.kv_head()), *v = task.at<In>(job.v, task.kv_head());
  by_token(q, job.q.token, length, padded, size, q_rows);
  across_tokens(q, job.q.token, length, padded, size, q_across);
  by_token(g, job.grad_y.token, length, padded, size, g_rows);
  across_tokens(g, job.grad_y.token, length, padded, size, g_across);
  by_channel(k, job.k.token, length, padded, size, k_columns);
  across_tokens(k, job.k.token, length, padded, size, k_across);
  by_channel(v, job.v.token, length, padded, size, v_columns);
  sum_products<In>(task, delta);
  std::fill(grad_q, grad_q + padded * size, 0.0f);
  const float* lse = job.lse + task.per_head(0);

  for (long key = 0; key < length; key += BLOCK) {
    const long columns = columns_of(std::min(BLOCK, length - key)), from_key = key * words;
    std::fill(grad_k, grad_k + BLOCK * size, 0.0f);
    std::fill(grad_v, grad_v + BLOCK * size, 0.0f);
    for (long first = key; first < length && task.first_key(first) <= key; first += BLOCK) {
      const long count = std::min(BLOCK, length - first), rows = rows_of(count);
      const long from = first * words, across = rows / PER<Word>;
      multiply<Word>(rows, columns, words, {q_rows + from, words, 1}, k_columns + from_key, BLOCK,
                     scores, BLOCK, false);
      multiply<Word>(rows, columns, words, {g_rows + from, words, 1}, v_columns + from_key, BLOCK,
                     grad, BLOCK, false);
      for (long i = 0; i < rows; i++) {
        float *s = scores + i * BLOCK, *ds = grad + i * BLOCK;
        if (i < count) {
          const Seen seen(task, first + i, key);
          differentiate(s, ds, columns, job.scale, lse[first + i], delta[first + i], seen);
        } else {
          std::fill(s, s + columns, 0.0f);
          std::fill(ds, ds + columns, 0.0f);
        }
        to_words(ds, columns, s_rows + i * row_words);
      }
      for (long i = 0; i < across; i++) {
        const long one = i * PER<Word> * BLOCK, next = one + (PER<Word> - 1) * BLOCK;
        to_words(scores + one, scores + next, columns, p_across + i * BLOCK);
        to_words(grad + one, grad + next, columns, s_across + i * BLOCK);
      }
      multiply<Word>(size, columns, across, {g_across + from, 1, size}, p_across, BLOCK, grad_v,
                     BLOCK, true);
      multiply<Word>(size, columns, across, {q_across + from, 1, size}, s_across, BLOCK, grad_k,
                     BLOCK, true);
      multiply<Word>(rows, size, columns / PER<Word>, {s_rows, row_words, 1}, k_across + from_key,
                     size, grad_q + first * size, size, true);
    }
    put<In>(task, grad_k, key, job.grad_k, job.head_grad_k);
    put<In>(task, grad_v, key, job.grad_v, job.head_grad_v);
  }
  for (long t = 0; t < length; t++)
    narrow_row(grad_q + t * size, size, 1.0f, task.at<In>(job.grad_q, task.head, t));
}

// The gradient of a key/value head is the sum of those of its query heads, in their order.
template <class In>
void add_heads(const Task& task, const Tensor& to, const float* of_heads) {
  const Job& job = task.job;
  const long size = task.size(), group = job.heads / job.kv_heads;
  for (long t = 0; t < task.length(); t++) {
    const Task first{job, task.row, task.start, task.end, task.head * group};
    const float* from = of_heads + first.per_head(t) * size;
    In* out = task.at<In>(to, task.head, t);
    for (long d = 0; d < size; d++) {
      float sum = 0;
      for (long n = 0; n < group; n++) sum += from[n * job.tokens * size + d];
      narrow(sum, out[d]);
    }
  }
}

// ---------------------------------------------------------------- all heads

template <class Work>
void for_each(const Job& job, long heads, Work work) {
#pragma omp parallel for schedule(dynamic) num_threads(job.threads)
  for (long n = 0; n < job.num_documents * heads; n++) {
    const int64_t* document = job.documents + n / heads * 3;
    work(Task{job, document[0], document[1], document[2], n % heads});
  }
}

template <class In, class Word>
void run(const Job& job, bool is_forward) {
  if (is_forward) return for_each(job, job.heads, forward<In, Word>);
  for_each(job, job.heads, backward<In, Word>);
  if (job.heads == job.kv_heads) return;
  for_each(job, job.kv_heads, [](const Task& task) {
    add_heads<In>(task, task.job.grad_k, task.job.head_grad_k);
    add_heads<In>(task, task.job.grad_v, task.job.head_grad_v);
  });
}

void run(const Job& job, bool is_forward) {
#if defined(__AVX512BF16__)
  if (job.is_bf16) return run<Bf16, Pair>(job, is_forward);
#else
  if (job.is_bf16) return run<Bf16, float>(job, is_forward);
#endif
  run<float, float>(job, is_forward);
}

// The bytes that a thread needs for any document of the job, either way.
long room_bytes(const Job& job) {
  long padded = 0;
  for (long n = 0; n < job.num_documents; n++) {
    const int64_t* document = job.documents + 3 * n;
    padded = std::max(padded, Task{job, document[0], document[1], document[2], 0}.padded());
  }
  const long numbers = 8 * padded * job.head_dim + padded + BLOCK * (5 * BLOCK + 2 * job.head_dim);
  return numbers * sizeof(float) + PIECES * ALIGNED;
}

}  // namespace attention
