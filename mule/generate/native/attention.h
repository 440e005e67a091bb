// Attention of some queries that share a key/value head of one conversation.

#pragma once

#include "linear.h"

// out[q, 0..size) = sum over tokens of share[q, token] * values[token, 0..size), in order of tokens.
template <int QUERIES, int VECTORS, class W>
inline void mix_values(const float* shares, long share_stride, const W* values, long size,
                       long begin, long end, float* out, long out_stride) {
  Floats sums[QUERIES * VECTORS] = {};
  for (long token = begin; token < end; token++) {
    Floats v[VECTORS];
    for (int i = 0; i < VECTORS; i++) v[i] = load(values + token * size + i * LANES);
    for (int q = 0; q < QUERIES; q++) {
      const float share = shares[q * share_stride + token];
      for (int i = 0; i < VECTORS; i++) sums[q * VECTORS + i] += v[i] * share;
    }
  }
  for (int q = 0; q < QUERIES; q++)
    for (int i = 0; i < VECTORS; i++)
      store(out + q * out_stride + i * LANES, sums[q * VECTORS + i]);
}

template <int QUERIES, class W>
inline void mix_all_values(const float* shares, long share_stride, const W* values, long size,
                           long begin, long end, float* out, long out_stride) {
  long d = 0;
  for (; d + 2 * LANES <= size; d += 2 * LANES)
    mix_values<QUERIES, 2>(shares, share_stride, values + d, size, begin, end, out + d, out_stride);
  for (; d + LANES <= size; d += LANES)
    mix_values<QUERIES, 1>(shares, share_stride, values + d, size, begin, end, out + d, out_stride);
  for (; d < size; d++)
    for (int q = 0; q < QUERIES; q++) {
      float sum = 0;
      for (long token = begin; token < end; token++)
        sum = multiply_add(shares[q * share_stride + token], widened(values[token * size + d]), sum);
      out[q * out_stride + d] = sum;
    }
}

// scores[0..count) become shares that add up to 1.
inline void softmax(float* scores, long count) {
  Floats bests = spread(scores[0]), sums{};
  long i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats v = load(scores + i);
    bests = v > bests ? v : bests;
  }
  float best = bests[0];
  for (int lane = 1; lane < LANES; lane++) best = std::max(best, bests[lane]);
  for (; i < count; i++) best = std::max(best, scores[i]);
  i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats e = exponential(load(scores + i) - best);
    sums += e;
    store(scores + i, e);
  }
  if (i < count) {
    Floats e = exponential(load_part(scores + i, count - i) - best);
    for (long lane = count - i; lane < LANES; lane++) e[lane] = 0;
    sums += e;
    std::memcpy(scores + i, &e, (count - i) * sizeof(float));
  }
  const Floats factor = spread(1.0f / sum_lanes(sums));
  each(scores, count, [&](Floats v) { return v * factor; });
}

// One tile of queries, at most TILE_ROWS: query q sees the tokens first[q] to last[q].
struct QueryTile {
  long queries;
  long first[TILE_ROWS], last[TILE_ROWS];
};

// queries (n, size), scaled; keys and values (tokens, size); out (n, size); scores: room for
// n x score_stride.
template <class W>
inline void attend(const QueryTile& tile, const float* queries, const W* keys, const W* values,
                   long size, float* scores, long score_stride, float* out) {
  const long n = tile.queries;
  const long begin = *std::min_element(tile.first, tile.first + n);
  const long end = *std::max_element(tile.last, tile.last + n) + 1;
  float dots[TILE_ROWS * NARROW + LANES * NARROW];
  long token = begin;
  for (; token + NARROW <= end; token += NARROW) {
    dot_rows<NARROW, TILES>(n, queries, size, keys + token * size, size, size, dots);
    for (long q = 0; q < n; q++)
      for (int j = 0; j < NARROW; j++) scores[q * score_stride + token + j] = dots[q * NARROW + j];
  }
  for (; token < end; token++) {
    dot_rows<1, TILES>(n, queries, size, keys + token * size, size, size, dots);
    for (long q = 0; q < n; q++) scores[q * score_stride + token] = dots[q];
  }
  for (long q = 0; q < n; q++) {
    float* row = scores + q * score_stride;
    softmax(row + tile.first[q], tile.last[q] + 1 - tile.first[q]);
    std::fill(row + begin, row + tile.first[q], 0.0f);  // a share of 0 adds exactly nothing
    std::fill(row + tile.last[q] + 1, row + end, 0.0f);
  }
  long q = 0;
  const auto mix = [&](auto queries_at_once) {
    constexpr int count = decltype(queries_at_once)::value;
    for (; q + count <= n; q += count)
      mix_all_values<count>(scores + q * score_stride, score_stride, values, size, begin, end,
                            out + q * size, size);
  };
  mix(std::integral_constant<int, 8>());
  mix(std::integral_constant<int, 4>());
  mix(std::integral_constant<int, 3>());
  mix(std::integral_constant<int, 2>());
  mix(std::integral_constant<int, 1>());
}
