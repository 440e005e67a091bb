// Vectors of floats, as wide as the machine's registers, and weights in fp32 or bf16 read into them.
// Everything here is IEEE arithmetic in a fixed order: no result depends on how work was cut.

#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Bf16 {
  uint16_t bits;
};

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats load(const Bf16* from) {  // bf16 is the upper half of fp32
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline float widened(float x) { return x; }

inline float widened(Bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void narrow(float x, float& to) { to = x; }

inline void narrow(float x, Bf16& to) {  // to the nearest, of two to the even one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  to.bits = is_nan ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// The lanes as bf16, rounded likewise.
inline Halves narrowed(Floats v) {
#if defined(__AVX512BF16__)
  return (Halves)(__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (bits >> 16) | 64, Halves);
#endif
}

inline void store(Bf16* to, Floats v) {
  const Halves halves = narrowed(v);
  std::memcpy(to, &halves, sizeof halves);
}

// a * b + c, rounded as the vectors' own; written out, since a compiler fuses it in one place and not
// in another.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline Floats spread(float x) { return Floats{} + x; }

// The first `count` floats (fewer than LANES), zeros behind them.
inline Floats load_part(const float* from, long count) {
  Floats v{};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

// y[i] = f(y[i]); the last, partial vector goes the same way as the others.
template <class F>
inline void each(float* y, long count, F f) {
  long i = 0;
  for (; i + LANES <= count; i += LANES) store(y + i, f(load(y + i)));
  if (i < count) {
    const Floats v = f(load_part(y + i, count - i));
    std::memcpy(y + i, &v, (count - i) * sizeof(float));
  }
}

// y[i] = f(y[i], z[i])
template <class F>
inline void each(float* y, const float* z, long count, F f) {
  long i = 0;
  for (; i + LANES <= count; i += LANES) store(y + i, f(load(y + i), load(z + i)));
  if (i < count) {
    const Floats v = f(load_part(y + i, count - i), load_part(z + i, count - i));
    std::memcpy(y + i, &v, (count - i) * sizeof(float));
  }
}

// Where lane `l` of a fold comes from: of blocks of 2 * SPAN lanes, first of one vector, then of
// another, the lower (HIGH = 0) or the upper halves, side by side.
template <int SPAN, int HIGH>
constexpr int fold_lane(int l) {
  constexpr int blocks = LANES / (2 * SPAN);
  const int block = l / SPAN;
  return block / blocks * LANES + block % blocks * 2 * SPAN + l % SPAN + HIGH * SPAN;
}

template <int... N>
using Counted = std::integer_sequence<int, N...>;
template <int SIZE>
using Count = std::make_integer_sequence<int, SIZE>;

template <int SPAN, int... L>
inline Floats folded(Floats a, Floats b, Counted<L...>) {
  return __builtin_shufflevector(a, b, fold_lane<SPAN, 0>(L)...) +
         __builtin_shufflevector(a, b, fold_lane<SPAN, 1>(L)...);
}

// The first COUNT of v, folded two by two into the first half; and so on, until SPAN is 0.
template <int COUNT, int SPAN, int SIZE, int... N>
inline void fold(Floats (&v)[SIZE], Counted<N...>) {
  if constexpr (SPAN > 0) {
    ((v[N] = folded<SPAN>(v[2 * N], v[2 * N + (2 * N + 1 < COUNT)], Count<LANES>())), ...);
    constexpr int half = sizeof...(N);
    fold<half, SPAN / 2>(v, Count<(half + 1) / 2>());
  }
}

template <int SIZE, int... N>
inline void store_all(const Floats (&v)[SIZE], float* to, Counted<N...>) {
  (store(to + N * LANES, v[N]), ...);
}

// out[i] = the sum of the lanes of v[i]; out has room for whole vectors.
template <int SIZE>
inline void sum_lanes(Floats (&v)[SIZE], float* out) {
  fold<SIZE, LANES / 2>(v, Count<(SIZE + 1) / 2>());
  store_all(v, out, Count<(SIZE + LANES - 1) / LANES>());
}

inline float sum_lanes(Floats v) {
  Floats one[1] = {v};
  float out[LANES];
  sum_lanes(one, out);
  return out[0];
}

// e^x to 2 units in the last place. Source: the reduction of Cephes' expf (Moshier), its polynomial.
inline Floats exponential(Floats x) {
  const Floats low = spread(-87.0f), high = spread(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats shift = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats rounded = x * 1.44269504088896341f + shift;
  const Floats n = rounded - shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Floats)((Words)p + (((Words)rounded) << 23));  // times 2^n: its exponent is added
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// The gradient of x from that of silu(x) = x s, s its sigmoid.
inline Floats silu_backward(Floats grad, Floats x, Floats s) {
  return grad * s * (1.0f + x * (1.0f - s));
}
