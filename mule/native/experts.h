// The experts of a mixture: products of each expert's rows with its matrix, and what lies between them.
//
// Rows are in the experts' order; `ends` says where each expert's part ends, and rows behind the last
// belong to none. A number of a result is computed by one thread in a fixed order: no result depends
// on how many there are.

#pragma once

#include <omp.h>

#include <algorithm>

#include "products.h"

namespace experts {

struct Tokens {  // the rows' assignments, numbered token by token
  const int64_t* order;
  int64_t rows, threads;
};

// hidden (rows, size) = silu(gate) * up * the assignment's weight; inner (rows, 2 size): gate beside up.
template <class In>
void swiglu(const Tokens& tokens, const In* inner, const In* weights, int64_t size, In* hidden) {
#pragma omp parallel for num_threads(tokens.threads)
  for (long row = 0; row < tokens.rows; row++) {
    const In *gate = inner + 2 * row * size, *up = gate + size;
    const float weight = widened(weights[tokens.order[row]]);
    for (long j = 0; j < size; j += LANES) {
      const Floats g = load(gate + j);
      store(hidden + row * size + j, g * sigmoid(g) * load(up + j) * weight);
    }
  }
}

// From the gradient of hidden / weight, in its place, hidden again; and the gradients of inner and of
// the weights.
template <class In>
void swiglu_backward(const Tokens& tokens, const In* inner, const In* weights, int64_t size,
                     In* grads, In* grad_inner, In* grad_weights) {
#pragma omp parallel for num_threads(tokens.threads)
  for (long row = 0; row < tokens.rows; row++) {
    const In *gate = inner + 2 * row * size, *up = gate + size;
    In *grad_gate = grad_inner + 2 * row * size, *grad_up = grad_gate + size;
    const float weight = widened(weights[tokens.order[row]]);
    In* hidden = grads + row * size;
    Floats grad_weight{};
    for (long j = 0; j < size; j += LANES) {
      const Floats g = load(gate + j), u = load(up + j), grad = load(hidden + j);
      const Floats s = sigmoid(g), activated = g * s, weighted = grad * weight;
      grad_weight += grad * activated * u;
      store(hidden + j, activated * u * weight);
      store(grad_up + j, weighted * activated);
      store(grad_gate + j, silu_backward(weighted * u, g, s));
    }
    narrow(sum_lanes(grad_weight), grad_weights[tokens.order[row]]);
  }
}

// Of each assignment the row that it is, -1 where it is to no expert.
inline void find_places(const Tokens& tokens, int64_t num_assignments, int64_t* places) {
  std::fill_n(places, num_assignments, -1);
  for (long row = 0; row < tokens.rows; row++) places[tokens.order[row]] = row;
}

// y (num_tokens, size): the sum of each token's rows.
template <class In>
void sum_by_token(const In* rows, const int64_t* places, int64_t num_tokens, int64_t top_k,
                  int64_t size, In* y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (long token = 0; token < num_tokens; token++)
    for (long j = 0; j < size; j += LANES) {
      Floats sum{};
      for (long n = token * top_k; n < (token + 1) * top_k; n++)
        if (places[n] >= 0) sum += load(rows + places[n] * size + j);
      store(y + token * size + j, sum);
    }
}

// ---------------------------------------------------------------- products

#if defined(__AVX512BF16__)

constexpr long PANEL = 4 * LANES;            // columns of a result at once
constexpr long ROWS = 6, BLOCK = 8 * ROWS;   // rows in registers at once, and in the nearest cache
constexpr long WORDS = 128;                  // of an operand at once: 32 KiB of a panel
constexpr long LEFTS = 2 * BLOCK;            // columns of a left operand laid out at once

template <int VECTORS, int R>
inline void multiply_rest(long rows, Left<Pair> a, const Pair* b, long words, float* c, bool add) {
  if constexpr (R > 0) {
    if (rows == R)
      multiply_tile<R, VECTORS>(a, b, VECTORS * LANES, words, c, PANEL, add);
    else
      multiply_rest<VECTORS, R - 1>(rows, a, b, words, c, add);
  }
}

template <int VECTORS>
inline void multiply_panel(long rows, Left<Pair> a, const Pair* b, long words, float* c) {
  for (long k = 0; k < words; k += WORDS) {
    const long count = std::min(WORDS, words - k);
    const Pair* part = b + k * VECTORS * LANES;
    long i = 0;
    for (; i < rows; i += ROWS) {
      const Left<Pair> left = {a.words + i * a.row + k * a.step, a.row, a.step};
      if (i + ROWS <= rows)
        multiply_tile<ROWS, VECTORS>(left, part, VECTORS * LANES, count, c + i * PANEL, PANEL, k);
      else
        multiply_rest<VECTORS, ROWS - 1>(rows - i, left, part, count, c + i * PANEL, k);
    }
  }
}

// out (rows, columns of a panel) = a (rows, words) times the panel b (words, columns).
inline void multiply_into(long rows, Left<Pair> a, const Pair* b, long words, long columns,
                          Bf16* out, long out_row) {
  alignas(64) float sums[BLOCK * PANEL];
  for (long first = 0; first < rows; first += BLOCK) {
    const long count = std::min(BLOCK, rows - first);
    const Left<Pair> left = {a.words + first * a.row, a.row, a.step};
    switch (columns / LANES) {
      case 4: multiply_panel<4>(count, left, b, words, sums); break;
      case 3: multiply_panel<3>(count, left, b, words, sums); break;
      case 2: multiply_panel<2>(count, left, b, words, sums); break;
      default: multiply_panel<1>(count, left, b, words, sums);
    }
    for (long i = 0; i < count; i++)
      for (long j = 0; j < columns; j += LANES)
        store(out + (first + i) * out_row + j, load(sums + i * PANEL + j));
  }
}

inline Words pairs_of(const Bf16* row, const Bf16* next) {  // a word of a number of both each
  Halves low{}, high{};
  std::memcpy(&low, row, sizeof low);
  if (next) std::memcpy(&high, next, sizeof high);
  return __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
}

// Of the lanes of two rows, one after the other, those that one of them has after blocks of SPAN lanes
// were exchanged: the first row's odd blocks for the second's even ones.
template <int SPAN, bool IS_SECOND>
constexpr int exchanged_lane(int l) {
  return l & SPAN ? LANES + l - (IS_SECOND ? 0 : SPAN) : l + (IS_SECOND ? SPAN : 0);
}

template <int SPAN, int... L>
inline void exchange(Words& a, Words& b, Counted<L...>) {
  const Words first = __builtin_shufflevector(a, b, exchanged_lane<SPAN, false>(L)...);
  b = __builtin_shufflevector(a, b, exchanged_lane<SPAN, true>(L)...);
  a = first;
}

// A square of words, transposed in place: its quarters, then the quarters of each, and so on.
template <int SPAN = LANES / 2>
inline void transpose(Words (&square)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & SPAN)) exchange<SPAN>(square[i], square[i + SPAN], Count<LANES>());
  if constexpr (SPAN > 1) transpose<SPAN / 2>(square);
}

// Columns of a matrix (rows, width) as words that lie along its rows: `to` (rows / 2, columns).
inline void panel_of(const Bf16* matrix, long rows, long width, long columns, Pair* to) {
  for (long k = 0; k < rows; k += 2, to += columns)
    for (long j = 0; j < columns; j += LANES) {
      const Bf16* row = matrix + k * width + j;
      const Words words = pairs_of(row, k + 1 < rows ? row + width : nullptr);
      std::memcpy(to + j, &words, sizeof words);
    }
}

// Rows of a matrix (columns, width) as the columns of a panel: `to` (width / 2, columns).
inline void panel_of_transposed(const Bf16* matrix, long columns, long width, Pair* to) {
  for (long j = 0; j < columns; j += LANES)
    for (long k = 0; k < width / 2; k += LANES) {
      Words square[LANES];
      for (long i = 0; i < LANES; i++)
        std::memcpy(&square[i], matrix + (j + i) * width + 2 * k, sizeof(Words));
      transpose(square);
      for (long i = 0; i < LANES; i++)
        std::memcpy(to + (k + i) * columns + j, &square[i], sizeof(Words));
    }
}

// Words of a column of so many rows, when each of these experts may have an odd number.
inline long words_of(long rows, long num_experts) { return rows / 2 + num_experts; }

// What both products below lay out, at most.
inline int64_t room_words(int64_t rows, int64_t num_experts, int64_t a, int64_t b,
                          int64_t threads) {
  return std::max(threads * (a / 2) * PANEL, words_of(rows, num_experts) * (a + b));
}

// out (rows, b): rows (rows, a), each times its expert's matrix (a, b), or (b, a) transposed.
inline void multiply(const Bf16* rows, const Bf16* matrices, const int64_t* ends,
                     int64_t num_experts, int64_t a, int64_t b, bool is_transposed, Pair* room,
                     Bf16* out, int64_t threads) {
  const long panels = (b + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
  {
    Pair* panel = room + omp_get_thread_num() * (a / 2) * PANEL;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < num_experts * panels; task++) {
      const long expert = task / panels, column = task % panels * PANEL;
      const long start = expert ? ends[expert - 1] : 0, columns = std::min(PANEL, b - column);
      if (start == ends[expert]) continue;
      const Bf16* matrix = matrices + expert * a * b;
      if (is_transposed)
        panel_of_transposed(matrix + column * a, columns, a, panel);
      else
        panel_of(matrix + column, a, b, columns, panel);
      const Left<Pair> left = {(const Pair*)(rows + start * a), a / 2, 1};
      multiply_into(ends[expert] - start, left, panel, a / 2, columns,
                    out + start * b + column, b);
    }
  }
}

// out (experts, a, b): of each expert's rows, left (rows, a) transposed times right (rows, b).
inline void multiply_transposed(const Bf16* left, const Bf16* right, const int64_t* ends,
                                int64_t num_experts, int64_t a, int64_t b, Pair* room, Bf16* out,
                                int64_t threads) {
  const long panels = (b + PANEL - 1) / PANEL, blocks = (a + LEFTS - 1) / LEFTS;
  Pair *lefts = room, *rights = room + words_of(ends[num_experts - 1], num_experts) * a;
  const auto first = [&](long expert) { return expert ? ends[expert - 1] : 0; };
  const auto words_before = [&](long expert) { return words_of(first(expert), expert); };
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (long task = 0; task < num_experts * (panels + blocks); task++) {
      const long expert = task / (panels + blocks), part = task % (panels + blocks);
      const bool is_right = part < panels;
      const long width = is_right ? b : a;
      const long column = is_right ? part * PANEL : (part - panels) * LEFTS;
      const long start = first(expert), rows = ends[expert] - start, words = (rows + 1) / 2;
      Pair* to = (is_right ? rights : lefts) + words_before(expert) * width;
      panel_of((is_right ? right : left) + start * width + column, rows, width,
               std::min(is_right ? PANEL : LEFTS, width - column), to + column * words);
    }
#pragma omp for schedule(dynamic)
    for (long task = 0; task < num_experts * blocks; task++) {
      const long expert = task / blocks, row = task % blocks * LEFTS;
      const long words = (ends[expert] - first(expert) + 1) / 2, rows = std::min(LEFTS, a - row);
      const Left<Pair> block = {lefts + words_before(expert) * a + row * words, 1, rows};
      Bf16* to = out + (expert * a + row) * b;
      for (long column = 0; column < b; column += PANEL) {
        const Pair* panel = rights + words_before(expert) * b + column * words;
        const long columns = std::min(PANEL, b - column);
        if (words)
          multiply_into(rows, block, panel, words, columns, to + column, b);
        else
          for (long i = 0; i < rows; i++) std::fill_n(to + i * b + column, columns, Bf16{0});
      }
    }
  }
}

#endif

}  // namespace experts
