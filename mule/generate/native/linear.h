// y = x W^T, by dot products: W stays as it is on disk, row by row, and is read once.
//
// Each output is summed in one order, whatever tile it falls into: a token's result does not depend
// on the tokens computed beside it.

#pragma once

#include <algorithm>

#include "vectors.h"

constexpr long TILE_ROWS = REGISTERS == 32 ? 8 : 4;  // tokens at once
constexpr int NARROW = REGISTERS == 32 ? 3 : 2;      // outputs at once for them
constexpr int WIDE = REGISTERS == 32 ? 8 : 4;        // outputs at once for one or two tokens
constexpr long BLOCK = 16 * NARROW;                  // outputs that go through all tokens together
constexpr long CHUNK = 1024;                         // inputs at once: a tile of x fits the L1 cache
constexpr long WIDENED_ROWS = 3 * TILE_ROWS;         // from here on bf16 is widened only once

// ROWS x COLUMNS dot products of length `size`: out[i * COLUMNS + j] = x_i . w_j
//
// The loops over the tile are written as packs: unrolled so early, the sums stay in registers.
//
// Where W comes from memory, not from a cache, what is needed next is asked for early: the processor
// does not see such short rows coming (1.4 times faster than without). With TILES the next rows of W
// follow these; with STREAMS each of these rows is followed by its own next one.
enum Source { CACHE, TILES, STREAMS };
constexpr long AHEAD = 1024;  // bytes of a stream

template <int ROWS, int COLUMNS, Source SOURCE, class W, int... R, int... C, int... N>
inline void dot_tile(const float* x, long x_stride, const W* w, long w_stride, long size, float* out,
                     Counted<R...>, Counted<C...>, Counted<N...>) {
  Floats sums[] = {spread(0.0f * N)...};  // zeros, each in a register of its own
  long k = 0;
  for (; k + LANES <= size; k += LANES) {
    if constexpr (SOURCE == TILES) (__builtin_prefetch(w + (2 * COLUMNS + C) * w_stride + k), ...);
    if constexpr (SOURCE == STREAMS)
      (__builtin_prefetch(w + C * w_stride + k + AHEAD / sizeof(W)), ...);
    const Floats xs[] = {load(x + R * x_stride + k)...}, ws[] = {load(w + C * w_stride + k)...};
    ((sums[N] += xs[N / COLUMNS] * ws[N % COLUMNS]), ...);
  }
  sum_lanes(sums, out);
  for (; k < size; k++)
    ((out[N] = multiply_add(x[N / COLUMNS * x_stride + k], widened(w[N % COLUMNS * w_stride + k]),
                            out[N])),
     ...);
}

template <int ROWS, int COLUMNS, Source SOURCE, class W>
inline void dot_tile(const float* x, long x_stride, const W* w, long w_stride, long size,
                     float* out) {
  dot_tile<ROWS, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out, Count<ROWS>(),
                                  Count<COLUMNS>(), Count<ROWS * COLUMNS>());
}

// dot_tile for a number of rows known only now, 1 to TILE_ROWS.
template <int COLUMNS, Source SOURCE, class W>
__attribute__((noinline)) void dot_rows(long rows, const float* x, long x_stride, const W* w,
                                        long w_stride, long size, float* out) {
  switch (rows) {
    case 1: return dot_tile<1, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out);
    case 2: return dot_tile<2, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out);
    case 3: return dot_tile<3, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out);
    case 4: return dot_tile<4, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out);
  }
  if constexpr (TILE_ROWS == 8) switch (rows) {
    case 5: return dot_tile<5, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out);
    case 6: return dot_tile<6, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out);
    case 7: return dot_tile<7, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out);
    case 8: return dot_tile<8, COLUMNS, SOURCE>(x, x_stride, w, w_stride, size, out);
  }
}

// COLUMNS outputs of one or two rows, `apart` from each other; put(row, column, value) takes each.
//
// Each is a stream of its own through memory: several far apart are read 1.4 times as fast as one.
template <int COLUMNS, class W, class Put>
inline void few_rows(const float* x, long x_stride, long rows, const W* w, long size, long column,
                     long apart, Put put) {
  float sums[TILE_ROWS * COLUMNS], out[TILE_ROWS * COLUMNS + LANES];
  for (long k = 0; k < size; k += CHUNK) {
    const long count = std::min(CHUNK, size - k);
    dot_rows<COLUMNS, STREAMS>(rows, x + k, x_stride, w + k, apart * size, count, out);
    for (long n = 0; n < rows * COLUMNS; n++) sums[n] = k ? sums[n] + out[n] : out[n];
  }
  for (long i = 0; i < rows; i++)
    for (int j = 0; j < COLUMNS; j++) put(i, column + j * apart, sums[i * COLUMNS + j]);
}

// Rows of W in fp32, (rows, size), for many tokens to use.
inline void widen_rows(const Bf16* w, long w_stride, long rows, long size, float* to) {
  for (long j = 0; j < rows; j++) {
    const Bf16* from = w + j * w_stride;
    float* row = to + j * size;
    long i = 0;
    for (; i + LANES <= size; i += LANES) store(row + i, load(from + i));
    for (; i < size; i++) row[i] = widened(from[i]);
  }
}

// Adds the products of all rows with `columns` rows of W to sums (rows, BLOCK), or begins them.
template <Source SOURCE, class W>
inline void add_products(const float* x, long x_stride, long rows, const W* w, long w_stride,
                         long columns, long size, bool begins, float* sums) {
  float out[TILE_ROWS * NARROW + LANES];
  const long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (long tile = 0; tile < tiles; tile++) {  // of nearly equal size
    const long first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
    const float* from = x + first * x_stride;
    for (long n = 0, width; n < columns; n += width) {
      width = n + NARROW <= columns ? NARROW : 1;
      const W* part = w + n * w_stride;
      if (width == 1)
        dot_rows<1, CACHE>(count, from, x_stride, part, w_stride, size, out);
      else if (SOURCE == TILES && tile == 0)
        dot_rows<NARROW, TILES>(count, from, x_stride, part, w_stride, size, out);
      else
        dot_rows<NARROW, CACHE>(count, from, x_stride, part, w_stride, size, out);
      for (long i = 0; i < count; i++)
        for (long j = 0; j < width; j++) {
          float& sum = sums[(first + i) * BLOCK + n + j];
          sum = begins ? out[i * width + j] : sum + out[i * width + j];
        }
    }
  }
}

// Room that `linear` needs for this many rows.
inline long linear_room(long rows) {
  return rows <= 2 ? 0 : BLOCK * (rows + (rows >= WIDENED_ROWS ? CHUNK : 0));
}

// Outputs `begin` to `end` of all rows; put(row, column, value) takes each.
template <class W, class Put>
inline void linear(const float* x, long x_stride, long rows, const W* w, long size, long begin,
                   long end, float* room, Put put) {
  long n = begin;
  if (rows <= 2) {
    const long apart = (end - begin) / WIDE;
    for (; n < begin + apart; n++)
      few_rows<WIDE>(x, x_stride, rows, w + n * size, size, n, apart, put);
    for (n = begin + apart * WIDE; n < end; n++)
      few_rows<1>(x, x_stride, rows, w + n * size, size, n, 1, put);
    return;
  }
  float *sums = room, *wide = room + BLOCK * rows;
  for (; n < end; n += BLOCK) {
    const long columns = std::min(BLOCK, end - n);
    for (long k = 0; k < size; k += CHUNK) {
      const long count = std::min(CHUNK, size - k);
      const W* part = w + n * size + k;
      if constexpr (sizeof(W) < sizeof(float)) {
        if (rows >= WIDENED_ROWS) {
          widen_rows(part, size, columns, count, wide);
          add_products<CACHE>(x + k, x_stride, rows, wide, count, columns, count, k == 0, sums);
          continue;
        }
      }
      add_products<TILES>(x + k, x_stride, rows, part, size, columns, count, k == 0, sums);
    }
    for (long i = 0; i < rows; i++)
      for (long j = 0; j < columns; j++) put(i, n + j, sums[i * BLOCK + j]);
  }
}
