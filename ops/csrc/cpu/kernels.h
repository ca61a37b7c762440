// The kernels, for whatever instruction set this is compiled. Everything has internal linkage: see point.h.
//
// A query of a head in two steps: first the coordinates, weights and addresses of all its points, a point in each
// lane; then nothing but loads and multiply-adds, a channel in each lane.
//
// In names: A is the type of coordinates and sums, V the type of value.
#pragma once

#include <cstdlib>

#include "../problem.h"
#include "kernels_of.h"
#include "simd.h"

namespace tenfold {
namespace {

// Vector loads and stores may pass the last point by less than a vector.
constexpr int kPadded = kMaxPoints + 16;

// The levels [first, last) of a problem, and for each of their points what does not depend on the query.
template <class A>
struct Points {
  int first_level, last_level;
  int count;       // points
  int rounded_up;  // to whole vectors
  alignas(64) A width[kPadded], height[kPadded];
  alignas(64) int32_t start[kPadded], row[kPadded];  // in elements of the array that is read
  alignas(64) int32_t level[kPadded];

  // stride: elements from one pixel to the next.
  void set(const Problem& p, int first, int last, int64_t stride) {
    first_level = first, last_level = last;
    count = static_cast<int>((last - first) * p.P);
    rounded_up = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    for (int k = 0; k < rounded_up; ++k) {
      const int l = first + (k < count ? k : 0) / static_cast<int>(p.P);
      const Level& at = p.levels_L[l];
      level[k] = l - first;
      width[k] = static_cast<A>(at.width), height[k] = static_cast<A>(at.height);
      start[k] = static_cast<int32_t>(at.start * stride), row[k] = static_cast<int32_t>(stride);
    }
  }
};

// The points of one query and head, made by prepare().
template <class A>
struct Prepared {
  alignas(64) A weight[4][kPadded];         // of the corners (near y, near x), (near y, far x), (far, near), (far, far)
  alignas(64) int32_t address[4][kPadded];  // of their first channel, in elements
  alignas(64) A attention[kPadded + kMaxPoints];
  alignas(64) A padded_row[2 * kPadded], padded_references[4 * kPadded];
  // For the backward: how a pixel moves with its offset, where the corners lie.
  alignas(64) Vec<A> scale_x[kPadded / kLanes<A>], scale_y[kPadded / kLanes<A>];
  Vec<A> offset_x[kPadded / kLanes<A>], offset_y[kPadded / kLanes<A>];
  Axis<Vec<A>> x[kPadded / kLanes<A>], y[kPadded / kLanes<A>];
};

// A row that may be read in whole vectors.
template <class A>
TENFOLD_INLINE const A* whole_vectors(const A* row, int count, A* padded, A filling) {
  const int rest = count % kLanes<A>;
  if (rest == 0) return row;
  std::memcpy(padded, row, sizeof(A) * count);
  for (int i = 0; i < kLanes<A> - rest; ++i) padded[count + i] = filling;
  return padded;
}

template <class A>
static void softmax(const A* logits, int count, A* padded, A* weights) {
  const A* row = whole_vectors<A>(logits, count, padded, static_cast<A>(-INFINITY));
  Vec<A> largest = load(row), total{};
  for (int k = kLanes<A>; k < count; k += kLanes<A>) {
    const Vec<A> next = load(row + k);
    largest = next > largest ? next : largest;
  }
  const A shift = max_lanes<A>(largest);
  for (int k = 0; k < count; k += kLanes<A>) {
    const Vec<A> power = exp_lanes(load(row + k) - shift);
    store(weights + k, power);
    total += power;
  }
  const A scale = 1 / sum_lanes<A>(total);
  for (int k = 0; k < count; k += kLanes<A>) store(weights + k, load(weights + k) * scale);
}

// grad_weights becomes the gradient of the logits.
template <class A>
static void softmax_backward(const A* weights, int count, A* grad_weights) {
  A common = 0;
  for (int k = 0; k < count; ++k) common += weights[k] * grad_weights[k];
  for (int k = 0; k < count; ++k) grad_weights[k] = weights[k] * (grad_weights[k] - common);
}

// Lane i: row[numbers * level[i] + number], for row of few elements a permutation of registers.
template <class A>
TENFOLD_INLINE Vec<A> spread(const A* row, int elements, const int32_t* level, int numbers, int number) {
  Vec<A> result;
#if !defined(__clang__)
  if (sizeof(A) == 4 && elements <= kLanes<A>) {
    const auto lanes = load_as<typename Types<A>::Int32>(level) * numbers + number;
    return __builtin_shuffle(load(row), __builtin_convertvector(lanes, IndexVec<A>));
  }
#endif
  for (int i = 0; i < kLanes<A>; ++i) result[i] = row[level[i] * numbers + number];
  return result;
}

template <class A>
struct FramesXY {
  Frame<Vec<A>> x, y;
};

// references: those of the query for points.first_level and on.
template <class A, Mode kMode>
TENFOLD_INLINE FramesXY<A> frames(const Problem& p, const Points<A>& points, int k, const A* references) {
  const Vec<A> width = load(points.width + k), height = load(points.height + k);
  if constexpr (kMode == Mode::kLocations) {
    return {over_level(width), over_level(height)};
  } else {
    constexpr int numbers = kMode == Mode::kPoints ? 2 : 4;
    const int elements = (points.last_level - points.first_level) * numbers;
    const auto reference = [&](int number) {
      return spread<A>(references, elements, points.level + k, numbers, number);
    };
    if constexpr (kMode == Mode::kPoints) {
      return {around_point(reference(0), width), around_point(reference(1), height)};
    } else {
      const A half_over_points = A(0.5) / static_cast<A>(p.P);
      return {around_box(reference(0), reference(2), width, half_over_points),
              around_box(reference(1), reference(3), height, half_over_points)};
    }
  }
}

// query: index into B, Q. attention: whole vectors of weights, of the first of these points.
template <class A, Mode kMode, bool kBackward>
static void prepare(const Problem& p, const Points<A>& points, int64_t query, int64_t head, Prepared<A>& out) {
  const int64_t row = (query * p.M + head) * p.L * p.P, first = points.first_level * p.P;
  const A* logits = static_cast<const A*>(p.weights_BQMLP) + row;
  const A* offsets = static_cast<const A*>(p.offsets_BQMLP2) + 2 * (row + first);
  const int64_t next = p.M * p.L * p.P;  // rows of one head lie far apart: more than hardware foresees
  for (int line = 0; line < 2 * points.count; line += 64 / sizeof(A)) __builtin_prefetch(offsets + 8 * next + line);
  __builtin_prefetch(logits + 4 * next);
  const A* references = nullptr;
  if constexpr (kMode == Mode::kLocations) {
    std::memcpy(out.attention, logits + first, sizeof(A) * points.count);
    for (int k = points.count; k < points.rounded_up; ++k) out.attention[k] = 0;
  } else {
    softmax<A>(logits, static_cast<int>(p.L * p.P), out.padded_row, out.attention);
    const int numbers = kMode == Mode::kPoints ? 2 : 4;
    const int elements = (points.last_level - points.first_level) * numbers;
    const A* own = static_cast<const A*>(p.references_BQLN) + (query * p.L + points.first_level) * numbers;
    references = whole_vectors<A>(own, elements, out.padded_references, 0);
  }
  const A* attention = out.attention + (kMode == Mode::kLocations ? 0 : first);
  const A* xy = offsets;
  if (points.count % kLanes<A>) {
    std::memcpy(out.padded_row, offsets, sizeof(A) * 2 * points.count);
    for (int i = 2 * points.count; i < 2 * points.rounded_up; ++i) out.padded_row[i] = 0;
    xy = out.padded_row;
  }
  for (int k = 0; k < points.rounded_up; k += kLanes<A>) {
    Vec<A> offset_x, offset_y;
    deinterleave<A>(load(xy + 2 * k), load(xy + 2 * k + kLanes<A>), offset_x, offset_y);
    const FramesXY<A> frame = frames<A, kMode>(p, points, k, references);
    const auto x = axis<Vec<A>>(offset_x * frame.x.scale + frame.x.origin, load(points.width + k));
    const auto y = axis<Vec<A>>(offset_y * frame.y.scale + frame.y.origin, load(points.height + k));
    const Vec<A> weight = load(attention + k), near = weight * y.near_weight, far = weight * y.far_weight;
    store(out.weight[0] + k, near * x.near_weight);
    store(out.weight[1] + k, near * x.far_weight);
    store(out.weight[2] + k, far * x.near_weight);
    store(out.weight[3] + k, far * x.far_weight);
    using Int32 = typename Types<A>::Int32;
    const Int32 start = load_as<Int32>(points.start + k), pixel = load_as<Int32>(points.row + k);
    const Int32 line = __builtin_convertvector(load(points.width + k), Int32) * pixel;
    const Int32 upper = start + __builtin_convertvector(y.near, Int32) * line;
    const Int32 lower = start + __builtin_convertvector(y.far, Int32) * line;
    const Int32 left = __builtin_convertvector(x.near, Int32) * pixel;
    const Int32 right = __builtin_convertvector(x.far, Int32) * pixel;
    const Int32 addresses[4] = {upper + left, upper + right, lower + left, lower + right};
    for (int c = 0; c < 4; ++c) std::memcpy(out.address[c] + k, &addresses[c], sizeof(Int32));
    if constexpr (kBackward) {
      const int block = k / kLanes<A>;
      out.x[block] = x, out.y[block] = y;
      out.offset_x[block] = offset_x, out.offset_y[block] = offset_y;
      out.scale_x[block] = frame.x.scale, out.scale_y[block] = frame.y.scale;
    }
  }
}

template <class A, bool kBackward>
TENFOLD_INLINE void prepare(const Problem& p, const Points<A>& points, int64_t query, int64_t head, Prepared<A>& out) {
  switch (p.mode) {
    case Mode::kLocations:
      return prepare<A, Mode::kLocations, kBackward>(p, points, query, head, out);
    case Mode::kPoints:
      return prepare<A, Mode::kPoints, kBackward>(p, points, query, head, out);
    case Mode::kBoxes:
      return prepare<A, Mode::kBoxes, kBackward>(p, points, query, head, out);
  }
}

// Sum kVectors vectors of channels over all points. Two sums of half the corners, for the latency of multiply-add.
template <class V, class A, int kVectors>
TENFOLD_INLINE void gather(const V* value, const Prepared<A>& at, int count, V* out) {
  Vec<A> upper[kVectors]{}, lower[kVectors]{};
  for (int k = 0; k < count; ++k) {
    for (int c = 0; c < 2; ++c) {
      const V *above = value + at.address[c][k], *below = value + at.address[c + 2][k];
      for (int i = 0; i < kVectors; ++i) {
        upper[i] += load<A>(above + i * kLanes<A>) * at.weight[c][k];
        lower[i] += load<A>(below + i * kLanes<A>) * at.weight[c + 2][k];
      }
    }
  }
  for (int i = 0; i < kVectors; ++i) store<A>(out + i * kLanes<A>, upper[i] + lower[i]);
}

template <class V, class A>
TENFOLD_INLINE void gather_one(const V* value, const Prepared<A>& at, int count, V* out) {
  A sum = 0;
  for (int k = 0; k < count; ++k) {
    for (int c = 0; c < 4; ++c) sum += at.weight[c][k] * to_real(value[at.address[c][k]]);
  }
  set(*out, sum);
}

// kWidth: channels of a head where known to the compiler, else 0.
template <class V, class A, int kWidth>
static void gather_all(const V* value, const Prepared<A>& at, int count, int64_t width, V* out) {
  const int64_t channels = kWidth ? kWidth : width;
  constexpr int kWide = 4;
  int64_t e = 0;
  for (; e + kWide * kLanes<A> <= channels; e += kWide * kLanes<A>) gather<V, A, kWide>(value + e, at, count, out + e);
  for (; e + 2 * kLanes<A> <= channels; e += 2 * kLanes<A>) gather<V, A, 2>(value + e, at, count, out + e);
  for (; e + kLanes<A> <= channels; e += kLanes<A>) gather<V, A, 1>(value + e, at, count, out + e);
  for (; e < channels; ++e) gather_one<V, A>(value + e, at, count, out + e);
}

template <class To, class From, class A>
TENFOLD_INLINE void copy_row(const From* from, int64_t width, To* to) {
  int64_t e = 0;
  for (; e + kLanes<A> <= width; e += kLanes<A>) store<A>(to + e, load<A>(from + e));
  for (; e < width; ++e) set(to[e], to_real(from[e]));
}

// Memory of one thread. Where there is none, the caller does without or says so.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {}
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

// An item is one of the query_chunks of one head of one image.
template <class V, class A, int kWidth>
static int forward_items(const Problem& p, int64_t begin, int64_t end) {
  const int64_t pixel = p.M * p.E;
  // A copy lies in A: the conversion of bfloat16 is paid once for a row, which is read many times.
  constexpr bool kSame = sizeof(V) == sizeof(A), kCanCopy = kSame || kWidth != 0;
  const Scratch scratch(p.repack && kCanCopy ? sizeof(A) * p.S * p.E : 0);
  A* copy = static_cast<A*>(scratch.get());
  const Scratch state_memory(sizeof(Points<A>) + sizeof(Prepared<A>));
  if (!state_memory.get()) return kOutOfMemory;
  auto& at = *static_cast<Prepared<A>*>(state_memory.get());
  auto& points = *reinterpret_cast<Points<A>*>(&at + 1);
  points.set(p, 0, static_cast<int>(p.L), copy ? p.E : pixel);
  int64_t copied = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t owner = item / p.query_chunks, chunk = item % p.query_chunks;
    const int64_t image = owner / p.M, head = owner % p.M;
    const V* value = static_cast<const V*>(p.value_BSME) + image * p.S * pixel + head * p.E;
    if (copy && copied != owner) {
      for (int64_t s = 0; s < p.S; ++s) copy_row<A, V, A>(value + s * pixel, p.E, copy + s * p.E);
      copied = owner;
    }
    for (int64_t q = p.Q * chunk / p.query_chunks; q < p.Q * (chunk + 1) / p.query_chunks; ++q) {
      prepare<A, false>(p, points, image * p.Q + q, head, at);
      V* out = static_cast<V*>(p.out_BQME) + (image * p.Q + q) * pixel + head * p.E;
      if (!copy) {
        gather_all<V, A, kWidth>(value, at, points.count, p.E, out);
      } else if constexpr (kSame) {
        gather_all<A, A, kWidth>(copy, at, points.count, p.E, reinterpret_cast<A*>(out));
      } else if constexpr (kCanCopy) {
        alignas(64) A sums[kWidth];
        gather_all<A, A, kWidth>(copy, at, points.count, p.E, sums);
        copy_row<V, A, A>(sums, p.E, out);
      }
    }
  }
  return kDone;
}

// dots[4 * k + c]: product of grad with the row of corner c of point k; the weighted grad is added to grad_value.
// count: rounded up to whole vectors; points without weight and with any address fill the last one.
template <class A, int kWidth>
static void scatter(const A* value, A* grad_value, const A* grad, const Prepared<A>& at, int count, int64_t width,
                    A* dots) {
  const int64_t channels = kWidth ? kWidth : width, whole = channels / kLanes<A> * kLanes<A>;
  constexpr int kTogether = kLanes<A> / 4;  // points whose dots fill a vector
  constexpr int kKept = kWidth / kLanes<A>;  // vectors of grad in registers, which stores cannot change
  Vec<A> kept[kKept ? kKept : 1];
  for (int i = 0; i < kKept; ++i) kept[i] = load(grad + i * kLanes<A>);
  for (int k = 0; k < count; k += kTogether) {
    Vec<A> sums[4]{};
    for (int j = 0; j < kTogether; ++j) {
      Vec<A> products[4]{};
      for (int c = 0; c < 4; ++c) {
        const A* row = value + at.address[c][k + j];
        A* grad_row = grad_value + at.address[c][k + j];
        const A weight = at.weight[c][k + j];
        for (int64_t e = 0; e < whole; e += kLanes<A>) {
          const Vec<A> g = kKept ? kept[e / kLanes<A>] : load(grad + e);
          products[c] += load(row + e) * g;
          store<A>(grad_row + e, load(grad_row + e) + g * weight);
        }
        for (int64_t e = whole; e < channels; ++e) {
          products[c][0] += row[e] * grad[e];
          grad_row[e] += grad[e] * weight;
        }
      }
      sums[j] = fold4<A>(products[0], products[1], products[2], products[3]);
    }
    if constexpr (kTogether == 4) {
      sums[0] = fold<A, 8>(fold<A, 4>(sums[0], sums[1]), fold<A, 4>(sums[2], sums[3]));
    } else if constexpr (kTogether == 2) {
      sums[0] = fold<A, 4>(sums[0], sums[1]);
    }
    store<A>(dots + 4 * k, sums[0]);
  }
}

template <class A>
struct Gradients {
  alignas(64) A dots[4 * kPadded];
  alignas(64) A xy[2 * kPadded], weights[kPadded];
  alignas(64) A references[4][kPadded];  // of each point, to be summed over the points of a level
};

template <class A>
TENFOLD_INLINE void dots_of(const A* dots, Vec<A> (&corner)[4]) {
  Vec<A> even[2], odd[2];  // corners 0 and 2, 1 and 3
  for (int half = 0; half < 2; ++half) {
    const A* at = dots + 2 * half * kLanes<A>;
    deinterleave<A>(load(at), load(at + kLanes<A>), even[half], odd[half]);
  }
  deinterleave<A>(even[0], even[1], corner[0], corner[2]);
  deinterleave<A>(odd[0], odd[1], corner[1], corner[3]);
}

// From dots to the gradients of each point.
template <class A>
static void differentiate(const Problem& p, const Points<A>& points, const Prepared<A>& at, Gradients<A>& to) {
  const A half_over_points = A(0.5) / static_cast<A>(p.P);
  const A* attention = at.attention + (p.mode == Mode::kLocations ? 0 : points.first_level * p.P);
  for (int k = 0; k < points.rounded_up; k += kLanes<A>) {
    const int block = k / kLanes<A>;
    Vec<A> corner[4], low, high;
    dots_of<A>(to.dots + 4 * k, corner);
    const auto grad = point_grad(at.x[block], at.y[block], corner[0], corner[1], corner[2], corner[3]);
    const Vec<A> weight = load(attention + k), x = chain(grad.x, weight), y = chain(grad.y, weight);
    interleave<A>(chain(x, at.scale_x[block]), chain(y, at.scale_y[block]), low, high);
    store<A>(to.xy + 2 * k, low);
    store<A>(to.xy + 2 * k + kLanes<A>, high);
    store<A>(to.weights + k, grad.sample);
    if (p.grad_references_BMQLN) {
      const Vec<A> center_x = x * load(points.width + k), center_y = y * load(points.height + k);
      store<A>(to.references[0] + k, center_x);
      store<A>(to.references[1] + k, center_y);
      store<A>(to.references[2] + k, chain(center_x, at.offset_x[block] * half_over_points));
      store<A>(to.references[3] + k, chain(center_y, at.offset_y[block] * half_over_points));
    }
  }
}

template <class A>
static void write_gradients(const Problem& p, const Points<A>& points, int64_t image, int64_t q, int64_t head,
                            const Prepared<A>& at, Gradients<A>& from) {
  const int64_t row = ((image * p.Q + q) * p.M + head) * p.L * p.P + points.first_level * p.P;
  if (p.mode != Mode::kLocations && points.count == p.L * p.P) {
    softmax_backward<A>(at.attention, points.count, from.weights);
  }
  std::memcpy(static_cast<A*>(p.grad_weights_BQMLP) + row, from.weights, sizeof(A) * points.count);
  std::memcpy(static_cast<A*>(p.grad_offsets_BQMLP2) + 2 * row, from.xy, sizeof(A) * 2 * points.count);
  if (!p.grad_references_BMQLN) return;
  A* references = static_cast<A*>(p.grad_references_BMQLN) + ((image * p.M + head) * p.Q + q) * p.L * p.N;
  for (int l = points.first_level; l < points.last_level; ++l) {
    for (int n = 0; n < p.N; ++n) {
      const A* each = from.references[n] + (l - points.first_level) * p.P;
      A sum = 0;
      for (int64_t point = 0; point < p.P; ++point) sum += each[point];
      references[l * p.N + n] = sum;
    }
  }
}

// An item is one of the level_slices of one head of one image: the only one to touch that part of grad_value, so
// that the order of sums depends on nothing.
template <class V, class A, int kWidth>
static int backward_items(const Problem& p, int64_t begin, int64_t end) {
  const int64_t pixel = p.M * p.E;
  const bool repack = p.repack || sizeof(V) != sizeof(A);  // sums of bfloat16 need float to be kept in
  const size_t map = repack ? sizeof(A) * p.S * p.E : 0, state = sizeof(Points<A>) + sizeof(Prepared<A>);
  const Scratch value_copy(map), grad_copy(map), state_memory(state + sizeof(Gradients<A>) + sizeof(A) * p.E);
  if (!state_memory.get() || (repack && !(value_copy.get() && grad_copy.get()))) return kOutOfMemory;
  auto& at = *static_cast<Prepared<A>*>(state_memory.get());
  auto& points = *reinterpret_cast<Points<A>*>(&at + 1);
  auto& grads = *reinterpret_cast<Gradients<A>*>(&points + 1);
  A* grad_out = reinterpret_cast<A*>(&grads + 1);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t owner = item / p.level_slices, slice = item % p.level_slices;
    const int64_t image = owner / p.M, head = owner % p.M;
    const int first = static_cast<int>(p.L * slice / p.level_slices);
    const int last = static_cast<int>(p.L * (slice + 1) / p.level_slices);
    points.set(p, first, last, repack ? p.E : pixel);
    const int64_t first_pixel = p.levels_L[first].start, last_pixel = last < p.L ? p.levels_L[last].start : p.S;
    const V* value = static_cast<const V*>(p.value_BSME) + image * p.S * pixel + head * p.E;
    V* grad_value = static_cast<V*>(p.grad_value_BSME) + image * p.S * pixel + head * p.E;
    const A* read;
    A* add;
    if (repack) {
      A* copy = static_cast<A*>(value_copy.get());
      for (int64_t s = first_pixel; s < last_pixel; ++s) copy_row<A, V, A>(value + s * pixel, p.E, copy + s * p.E);
      read = copy, add = static_cast<A*>(grad_copy.get());
      std::memset(add + first_pixel * p.E, 0, sizeof(A) * (last_pixel - first_pixel) * p.E);
    } else {
      read = reinterpret_cast<const A*>(value), add = reinterpret_cast<A*>(grad_value);  // zeros already
    }
    for (int64_t q = 0; q < p.Q; ++q) {
      prepare<A, true>(p, points, image * p.Q + q, head, at);
      const int64_t row = (image * p.Q + q) * pixel + head * p.E;
      copy_row<A, V, A>(static_cast<const V*>(p.grad_out_BQME) + row, p.E, grad_out);
      scatter<A, kWidth>(read, add, grad_out, at, points.rounded_up, p.E, grads.dots);
      differentiate<A>(p, points, at, grads);
      write_gradients<A>(p, points, image, q, head, at, grads);
    }
    if (repack) {
      for (int64_t s = first_pixel; s < last_pixel; ++s) copy_row<V, A, A>(add + s * p.E, p.E, grad_value + s * pixel);
    }
  }
  return kDone;
}

// Rows (b, q, m) of grad_weights hold gradients of weights, from several slices: make them those of the logits.
template <class A>
static int softmax_items(const Problem& p, int64_t begin, int64_t end) {
  const int count = static_cast<int>(p.L * p.P);
  alignas(64) A padded[kPadded], weights[kPadded];
  for (int64_t row = begin; row < end; ++row) {
    softmax<A>(static_cast<const A*>(p.weights_BQMLP) + row * count, count, padded, weights);
    softmax_backward<A>(weights, count, static_cast<A*>(p.grad_weights_BQMLP) + row * count);
  }
  return kDone;
}

#define TENFOLD_BY_WIDTH(items, V, A)                    \
  switch (p.E) {                                         \
    case 16:                                             \
      return items<V, A, 16>(p, begin, end);             \
    case 32:                                             \
      return items<V, A, 32>(p, begin, end);             \
    case 64:                                             \
      return items<V, A, 64>(p, begin, end);             \
    default:                                             \
      return items<V, A, 0>(p, begin, end);              \
  }
#define TENFOLD_BY_DTYPE(items)                          \
  switch (p.dtype) {                                     \
    case Dtype::kDouble:                                 \
      TENFOLD_BY_WIDTH(items, double, double)            \
    case Dtype::kBfloat16:                               \
      TENFOLD_BY_WIDTH(items, bfloat16, float)           \
    default:                                             \
      TENFOLD_BY_WIDTH(items, float, float)              \
  }

int forward(const Problem& p, int64_t begin, int64_t end) { TENFOLD_BY_DTYPE(forward_items) }
int backward(const Problem& p, int64_t begin, int64_t end) { TENFOLD_BY_DTYPE(backward_items) }
int softmax_rows(const Problem& p, int64_t begin, int64_t end) {
  return p.dtype == Dtype::kDouble ? softmax_items<double>(p, begin, end) : softmax_items<float>(p, begin, end);
}

}  // namespace
}  // namespace tenfold
