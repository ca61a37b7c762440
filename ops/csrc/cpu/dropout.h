// Dropout with what stands before or after it, in one pass over memory, for whatever instruction set this is compiled.
//
// Whether an element is kept follows from its index and the seed alone: no mask is stored, the backward computes it
// again, and no number depends on how many threads there are. Seeds are meant to be 63 random bits: two that differ by
// a little in their low half alone give the same sequence, shifted.
#pragma once

#include "kernels_of.h"
#include "simd.h"

namespace tenfold {
namespace {

using Lanes = Types<float>::Bits;

// Every bit of the result depends on every bit of the argument: a multiply-xorshift hash, two rounds, as in the
// finalisers of MurmurHash3; constants from a search for little bias (Wellons, "Prospecting for hash functions", 2018).
TENFOLD_INLINE Lanes mixed(Lanes bits) {
  bits = (bits ^ (bits >> 16)) * 0x7feb352du;
  bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
  return bits ^ (bits >> 16);
}

template <class V, DropoutMode mode>
TENFOLD_INLINE Vec<float> dropped(const Dropout& d, Vec<float> x, const V* other, int64_t i, Lanes bits) {
  const Vec<float> zero = {};
  if constexpr (mode == DropoutMode::kGate) {
    return load<float>(other + i) <= zero ? zero : x * d.scale;  // NaN goes on
  } else {
    if constexpr (mode == DropoutMode::kRelu) x = x < zero ? zero : x;
    const Vec<float> kept = bits < d.threshold ? zero : x * d.scale;
    if constexpr (mode == DropoutMode::kAdd) return load<float>(other + i) + kept;
    return kept;
  }
}

template <class V, DropoutMode mode>
void drop(const Dropout& d, int64_t begin, int64_t end) {
  constexpr int kWide = kLanes<float>;
  const V* const x = static_cast<const V*>(d.x);
  const V* const other = static_cast<const V*>(d.other);
  V* const out = static_cast<V*>(d.out);
  Lanes lane;
  for (int i = 0; i < kWide; ++i) lane[i] = static_cast<uint32_t>(i);
  const uint32_t low = static_cast<uint32_t>(d.seed), high = static_cast<uint32_t>(d.seed >> 32);
  for (int64_t i = begin; i < end; i += kWide) {
    Lanes bits = {};
    if constexpr (mode != DropoutMode::kGate) {
      const uint32_t of_index = static_cast<uint32_t>(i >> 32) * 0x9e3779b9u;
      bits = mixed(mixed(lane + (static_cast<uint32_t>(i) + low)) + (high ^ of_index));
    }
    if (end - i >= kWide) {
      store<float>(out + i, dropped<V, mode>(d, load<float>(x + i), other, i, bits));
    } else {  // begin is a multiple of the widest vector, so that only the last elements of all come here
      V tail[3 * kWide] = {};
      for (int64_t k = 0; k < end - i; ++k) {
        tail[k] = x[i + k];
        if (other) tail[kWide + k] = other[i + k];
      }
      store<float>(tail + 2 * kWide, dropped<V, mode>(d, load<float>(tail), tail + kWide, 0, bits));
      for (int64_t k = 0; k < end - i; ++k) out[i + k] = tail[2 * kWide + k];
    }
  }
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
