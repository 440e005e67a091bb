// Products of small blocks, for operands laid out beforehand; sums in fp32.
//
// An operand is made of words: a float, or two bf16 numbers where the processor multiplies pairs of
// them (PER = numbers in a word). The numbers of a word are neighbours along the axis that is summed.

#pragma once

#include "vectors.h"

struct __attribute__((may_alias)) Pair {  // two neighbours of a row of bf16 are one
  uint32_t bits;
};

template <class Word>
constexpr long PER = 1;
template <>
constexpr long PER<Pair> = 2;

inline Floats multiplied(Floats sum, float a, const float* b) { return sum + load(b) * a; }

#if defined(__AVX512BF16__)
inline Floats multiplied(Floats sum, Pair a, const Pair* b) {
  const __m512i left = _mm512_set1_epi32((int)a.bits), right = _mm512_loadu_si512(b);
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
#endif

// A row of floats as words along it; for pairs a multiple of 2 * LANES of them.
inline void to_words(const float* row, long count, float* to) {
  std::memcpy(to, row, count * sizeof(float));
}

// Two rows as words, each of a number of both; of floats the first row alone.
inline void to_words(const float* row, const float*, long count, float* to) {
  std::memcpy(to, row, count * sizeof(float));
}

#if defined(__AVX512BF16__)
inline void to_words(const float* row, long count, Pair* to) {
  for (long j = 0; j < count; j += 2 * LANES) {
    const __m512 low = _mm512_loadu_ps(row + j), high = _mm512_loadu_ps(row + j + LANES);
    _mm512_storeu_si512(to + j / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

inline Words narrowed_words(Floats v) { return __builtin_convertvector(narrowed(v), Words); }

inline void to_words(const float* row, const float* next, long count, Pair* to) {
  for (long j = 0; j < count; j += LANES) {
    const Words words = narrowed_words(load(row + j)) | narrowed_words(load(next + j)) << 16;
    std::memcpy(to + j, &words, sizeof words);
  }
}
#endif

// The left operand: where its words are, and how far the next row and the next word of a row.
template <class Word>
struct Left {
  const Word* words;
  long row, step;
};

// c[i, j..) (+)= the sum over k of a(i, k) b(k, j..), for ROWS rows and VECTORS vectors.
template <int ROWS, int VECTORS, class Word>
inline void multiply_tile(Left<Word> a, const Word* b, long b_row, long words, float* c, long c_row,
                          bool add) {
  Floats sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++)
      sums[i][v] = add ? load(c + i * c_row + v * LANES) : Floats{};
  for (long k = 0; k < words; k++)
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++)
        sums[i][v] =
            multiplied(sums[i][v], a.words[i * a.row + k * a.step], b + k * b_row + v * LANES);
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) store(c + i * c_row + v * LANES, sums[i][v]);
}

constexpr int TILE = 4;  // rows and vectors whose sums are in registers at once

template <int VECTORS, class Word>
inline void multiply_columns(long rows, Left<Word> a, const Word* b, long b_row, long words,
                             float* c, long c_row, bool add) {
  for (long i = 0; i < rows; i += TILE)
    multiply_tile<TILE, VECTORS>({a.words + i * a.row, a.row, a.step}, b, b_row, words,
                                 c + i * c_row, c_row, add);
}

// c (rows, columns) (+)= a (rows, words) b (words, columns): rows is a multiple of TILE, columns of
// LANES.
template <class Word>
inline void multiply(long rows, long columns, long words, Left<Word> a, const Word* b, long b_row,
                     float* c, long c_row, bool add) {
  long j = 0;
  for (; j + 4 * LANES <= columns; j += 4 * LANES)
    multiply_columns<4>(rows, a, b + j, b_row, words, c + j, c_row, add);
  for (; j < columns; j += LANES)
    multiply_columns<1>(rows, a, b + j, b_row, words, c + j, c_row, add);
}
