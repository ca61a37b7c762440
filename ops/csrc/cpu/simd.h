// Vectors of the widest registers that this file is compiled for, in the vector extension of GCC and Clang.
//
// Not intrinsics, of which three sets would be needed, and not the auto-vectoriser, which is fragile here.
// Everything has internal linkage: see TENFOLD_HD in point.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../point.h"

#define TENFOLD_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define TENFOLD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TENFOLD_VECTOR_BYTES 32
#else
#define TENFOLD_VECTOR_BYTES 16
#endif

namespace tenfold {
namespace {

struct bfloat16 {
  uint16_t bits;
};

// At least 4 lanes: the kernels sum the four corners of a point in one vector.
template <class A>
constexpr int kLanes = TENFOLD_VECTOR_BYTES / sizeof(A) < 4 ? 4 : TENFOLD_VECTOR_BYTES / sizeof(A);

template <class A>
struct Types;

template <>
struct Types<float> {
  typedef float Vec __attribute__((vector_size(4 * kLanes<float>)));
  typedef int32_t Index __attribute__((vector_size(4 * kLanes<float>)));
  typedef int32_t Int32 __attribute__((vector_size(4 * kLanes<float>)));
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes<float>)));
  typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes<float>)));
};

template <>
struct Types<double> {
  typedef double Vec __attribute__((vector_size(8 * kLanes<double>)));
  typedef int64_t Index __attribute__((vector_size(8 * kLanes<double>)));
  typedef int32_t Int32 __attribute__((vector_size(4 * kLanes<double>)));
};

template <class A>
using Vec = typename Types<A>::Vec;
template <class A>
using IndexVec = typename Types<A>::Index;

template <class V, class T>
TENFOLD_INLINE V load_as(const T* from) {
  V result;
  std::memcpy(&result, from, sizeof result);  // no alignment is asked of a tensor
  return result;
}

template <class A>
TENFOLD_INLINE Vec<A> load(const A* from) {
  return load_as<Vec<A>>(from);
}

template <class A>
TENFOLD_INLINE Vec<A> load(const bfloat16* from) {
  static_assert(sizeof(A) == 4, "bfloat16 is computed with in float");
  const auto half = load_as<Types<float>::HalfBits>(from);
  return (Vec<A>)(__builtin_convertvector(half, Types<float>::Bits) << 16);
}

template <class A>
TENFOLD_INLINE void store(A* to, Vec<A> numbers) {
  std::memcpy(to, &numbers, sizeof numbers);
}

template <class A>
TENFOLD_INLINE void store(bfloat16* to, Vec<A> numbers) {
  const auto bits = (Types<float>::Bits)numbers;
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const auto whole = numbers == numbers ? rounded : Types<float>::Bits{} + 0x7fc0u;  // of a NaN, another
  const auto half = __builtin_convertvector(whole, Types<float>::HalfBits);
  std::memcpy(to, &half, sizeof half);
}

TENFOLD_INLINE float to_real(float number) { return number; }
TENFOLD_INLINE double to_real(double number) { return number; }
TENFOLD_INLINE float to_real(bfloat16 number) {
  const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

TENFOLD_INLINE void set(float& to, float number) { to = number; }
TENFOLD_INLINE void set(double& to, double number) { to = number; }
TENFOLD_INLINE void set(bfloat16& to, float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  to.bits = number != number ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The lanes of a and b in the order that Pick says: constants, so that each becomes a shuffle instruction or two.
template <class A, class Pick, size_t... I>
TENFOLD_INLINE Vec<A> pick(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::lane(I)...);
#else
  return __builtin_shuffle(a, b, IndexVec<A>{Pick::lane(I)...});
#endif
}

template <class A, class Pick>
TENFOLD_INLINE Vec<A> pick(Vec<A> a, Vec<A> b) {
  return pick<A, Pick>(a, b, std::make_index_sequence<kLanes<A>>{});
}

template <int kFirst>
struct EverySecond {
  static constexpr int lane(int i) { return 2 * i + kFirst; }
};

template <int kCount, int kFirst>
struct Interleaved {
  static constexpr int lane(int i) { return kFirst + i / 2 + (i % 2) * kCount; }
};

// x0 y0 x1 y1 ... -> x0 x1 ..., y0 y1 ...
template <class A>
TENFOLD_INLINE void deinterleave(Vec<A> low, Vec<A> high, Vec<A>& x, Vec<A>& y) {
  x = pick<A, EverySecond<0>>(low, high);
  y = pick<A, EverySecond<1>>(low, high);
}

template <class A>
TENFOLD_INLINE void interleave(Vec<A> x, Vec<A> y, Vec<A>& low, Vec<A>& high) {
  low = pick<A, Interleaved<kLanes<A>, 0>>(x, y);
  high = pick<A, Interleaved<kLanes<A>, kLanes<A> / 2>>(x, y);
}

// A step of the sum over lanes of many vectors at once. Groups of kWidth lanes hold partial sums of kWidth vectors;
// the sum of both picks has groups twice as wide, with those of a and then those of b. Pairs of groups are taken
// inside of 16 bytes as long as they fit there, where shuffles are cheap.
template <class A, int kWidth, int kSecond>
struct Groups {
  static constexpr int kBlock = 16 / sizeof(A);
  static constexpr int lane(int i) {
    const int in_group = i % kWidth, from_b = (i / kWidth) % 2, pair = i / (2 * kWidth);
    int group = 2 * pair + kSecond;
    if (2 * kWidth <= kBlock) {
      const int pairs = kBlock / (2 * kWidth);
      group = pair / pairs * 2 * pairs + pair % pairs + kSecond * pairs;
    }
    return group * kWidth + in_group + from_b * kLanes<A>;
  }
};

template <class A, int kWidth>
TENFOLD_INLINE Vec<A> fold(Vec<A> a, Vec<A> b) {
  return pick<A, Groups<A, kWidth, 0>>(a, b) + pick<A, Groups<A, kWidth, 1>>(a, b);
}

// Lanes 4i..4i+3: what remains to be summed of a, b, c, d.
template <class A>
TENFOLD_INLINE Vec<A> fold4(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d) {
  return fold<A, 2>(fold<A, 1>(a, b), fold<A, 1>(c, d));
}

template <class A>
TENFOLD_INLINE A sum_lanes(Vec<A> numbers) {
  const Vec<A> twice = fold4<A>(numbers, numbers, numbers, numbers);
  A sum = 0;
  for (int i = 0; i < kLanes<A>; i += 4) sum += twice[i];
  return sum;
}

template <int kStep>
struct Rotated {
  static constexpr int lane(int i) { return i ^ kStep; }
};

template <class A, int kStep = kLanes<A> / 2>
TENFOLD_INLINE A max_lanes(Vec<A> numbers) {
  const Vec<A> other = pick<A, Rotated<kStep>>(numbers, numbers);
  numbers = numbers > other ? numbers : other;
  if constexpr (kStep > 1) {
    return max_lanes<A, kStep / 2>(numbers);
  } else {
    return numbers[0];
  }
}

// exp for numbers of at most 0, to within 2 units in the last place; below -87 it is 0. NaN stays NaN.
TENFOLD_INLINE Vec<float> exp_lanes(Vec<float> x) {
  using V = Vec<float>;
  const V zero = V{}, bounded = x < -87.0f ? zero - 87.0f : x;
  const V shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  const V power = shifted - 12582912.0f;
  const V r = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;
  V sum = zero + 1.9875691500e-4f;
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1.0f;
  const auto bits = (Types<float>::Bits)sum + ((Types<float>::Bits)shifted << 23);
  const V scaled = x == x ? (V)bits : x;
  return x < -87.0f ? zero : scaled;
}

TENFOLD_INLINE Vec<double> exp_lanes(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Of numbers that Index holds.
template <class A>
TENFOLD_INLINE Vec<A> floor_lanes(Vec<A> number) {
  const Vec<A> whole = __builtin_convertvector(__builtin_convertvector(number, IndexVec<A>), Vec<A>);
  return whole > number ? whole - 1 : whole;
}

}  // namespace

template <>
struct Real<Types<float>::Vec> {
  using Scalar = float;
  using Index = Types<float>::Index;
  TENFOLD_INLINE Types<float>::Vec all(Scalar number) { return Types<float>::Vec{} + number; }
  TENFOLD_INLINE Index truncate(Types<float>::Vec number) { return __builtin_convertvector(number, Index); }
  TENFOLD_INLINE Types<float>::Vec floor(Types<float>::Vec number) { return floor_lanes<float>(number); }
};

template <>
struct Real<Types<double>::Vec> {
  using Scalar = double;
  using Index = Types<double>::Index;
  TENFOLD_INLINE Types<double>::Vec all(Scalar number) { return Types<double>::Vec{} + number; }
  TENFOLD_INLINE Index truncate(Types<double>::Vec number) { return __builtin_convertvector(number, Index); }
  TENFOLD_INLINE Types<double>::Vec floor(Types<double>::Vec number) { return floor_lanes<double>(number); }
};

}  // namespace tenfold
