// Dropout with what stands before or after it, in one pass over memory, for whatever instruction set this is compiled.
//
// Whether an element is kept follows from its index and the seed alone: no mask is stored, the backward computes it
// again, and no number depends on how many threads there are. Seeds are meant to be 63 random bits: two that differ by
// a little in their low half alone share pieces of their sequences.
#pragma once

#include "kernels_of.h"
#include "simd.h"

namespace tenfold {
namespace {

using Lanes = Types<float>::Bits;

constexpr int64_t kPairs = 16;

// Every bit of the result depends on every bit of the argument: a multiply-xorshift hash, two rounds, as in the
// finalisers of MurmurHash3; constants from a search for little bias (Wellons, "Prospecting for hash functions", 2018).
TENFOLD_INLINE Lanes mixed(Lanes bits) {
  bits = (bits ^ (bits >> 16)) * 0x7feb352du;
  bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
  return bits ^ (bits >> 16);
}

template <class V, DropoutMode mode>
TENFOLD_INLINE Vec<float> dropped(const Dropout& d, Vec<float> x, const V* other, Lanes bits) {
  const Vec<float> zero = {};
  if constexpr (mode == DropoutMode::kGate) {
    return load<float>(other) <= zero ? zero : x * d.scale;  // NaN goes on
  } else {
    if constexpr (mode == DropoutMode::kRelu) x = x < zero ? zero : x;
    const Vec<float> kept = bits < d.threshold ? zero : x * d.scale;
    if constexpr (mode == DropoutMode::kAdd) return load<float>(other) + kept;
    return kept;
  }
}

// 2 * kPairs elements. A hash, of `pair` and on, tells of two of them, kPairs apart: 16 bits of each.
template <class V, DropoutMode mode>
TENFOLD_INLINE void drop_block(const Dropout& d, const V* x, const V* other, V* out, int64_t pair) {
  constexpr int kWide = kLanes<float>;
  static_assert(kPairs % kWide == 0 && kDropoutBlock % (2 * kPairs) == 0);
  Lanes lane;
  for (int i = 0; i < kWide; ++i) lane[i] = static_cast<uint32_t>(i);
  const uint32_t low = static_cast<uint32_t>(d.seed) + static_cast<uint32_t>(pair);
  const uint32_t high = static_cast<uint32_t>(d.seed >> 32) ^ static_cast<uint32_t>(pair >> 32) * 0x9e3779b9u;
  for (int i = 0; i < kPairs; i += kWide) {
    Lanes bits = {};
    if constexpr (mode != DropoutMode::kGate) bits = mixed(mixed(lane + (low + static_cast<uint32_t>(i))) + high);
    const auto one = dropped<V, mode>(d, load<float>(x + i), other + i, bits & 0xffffu);
    const auto two = dropped<V, mode>(d, load<float>(x + i + kPairs), other + i + kPairs, bits >> 16);
    store<float>(out + i, one), store<float>(out + i + kPairs, two);
  }
}

template <class V, DropoutMode mode>
void drop(const Dropout& given, int64_t begin, int64_t end) {
  const Dropout d = given;  // which no store below can change
  const V* const x = static_cast<const V*>(d.x);
  const V* const other = static_cast<const V*>(d.other ? d.other : d.x);  // if there is none, it is not read
  V* const out = static_cast<V*>(d.out);
  int64_t i = begin;
  for (; end - i >= 2 * kPairs; i += 2 * kPairs) drop_block<V, mode>(d, x + i, other + i, out + i, i / 2);
  if (i == end) return;
  V last[3][2 * kPairs] = {};
  for (int64_t k = 0; k < end - i; ++k) last[0][k] = x[i + k], last[1][k] = other[i + k];
  drop_block<V, mode>(d, last[0], last[1], last[2], i / 2);
  for (int64_t k = 0; k < end - i; ++k) out[i + k] = last[2][k];
}

template <class V>
void drop(const Dropout& d, int64_t begin, int64_t end) {
  switch (d.mode) {
    case DropoutMode::kPlain:
      return drop<V, DropoutMode::kPlain>(d, begin, end);
    case DropoutMode::kRelu:
      return drop<V, DropoutMode::kRelu>(d, begin, end);
    case DropoutMode::kAdd:
      return drop<V, DropoutMode::kAdd>(d, begin, end);
    case DropoutMode::kGate:
      return drop<V, DropoutMode::kGate>(d, begin, end);
  }
}

void dropout(const Dropout& d, int64_t begin, int64_t end) {
  d.dtype == Dtype::kBfloat16 ? drop<bfloat16>(d, begin, end) : drop<float>(d, begin, end);
}

}  // namespace
}  // namespace tenfold
