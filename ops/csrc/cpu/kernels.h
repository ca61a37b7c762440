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
#include "pages.h"
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
  alignas(64) int32_t start[kPadded], line[kPadded], pixel[kPadded];  // in elements of the array that is read
  alignas(64) int32_t level[kPadded];

  // stride: elements from one pixel to the next.
  void set(const Problem& p, int first, int last, int64_t stride) {
    first_level = first, last_level = last;
    count = static_cast<int>((last - first) * p.P);
    rounded_up = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    for (int k = 0; k < rounded_up; ++k) {
      const int l = first + (k < count ? k : count - 1) / static_cast<int>(p.P);
      const Level& at = p.levels_L[l];
      level[k] = l - first;
      width[k] = static_cast<A>(at.width), height[k] = static_cast<A>(at.height);
      start[k] = static_cast<int32_t>(at.start * stride), pixel[k] = static_cast<int32_t>(stride);
      line[k] = static_cast<int32_t>(at.width * stride);
    }
  }
};

// A vector of prepared points.
template <class A>
struct Block {
  alignas(64) A weight[4][kLanes<A>];  // of the corners (near y, near x), (near y, far x), (far, near), (far, far)
  int32_t address[4][kLanes<A>];       // of their first channel, in elements
};

// For the backward: where the corners of a vector of points lie, and how a pixel moves with its offset.
template <class A>
struct Tangent {
  Axis<Vec<A>> x, y;
  Vec<A> scale_x, scale_y, offset_x, offset_y;
};

// Queries of one head prepared together: their long chains of dependent instructions overlap.
constexpr int kBatch = 8;

// What one thread works in. Rows of a batch lie close together, not a row of the largest size apart.
template <class A>
struct Workspace {
  Points<A> points;
  int blocks;     // of a query
  int attention;  // from one query to the next
  Block<A> block[kBatch * kPadded / kLanes<A>];
  Tangent<A> tangent[kBatch * kPadded / kLanes<A>];
  alignas(64) A attentions[kBatch * 2 * kPadded];
  alignas(64) A padded_row[2 * kPadded], padded_references[4 * kPadded];
  alignas(64) A dots[4 * kPadded], grad_xy[2 * kPadded], grad_weights[kPadded], grad_references[4][kPadded];

  void set(const Problem& p, int first_level, int last_level, int64_t stride) {
    points.set(p, first_level, last_level, stride);
    blocks = points.rounded_up / kLanes<A>;
    attention = (static_cast<int>(p.L * p.P) / kLanes<A> + 2) * kLanes<A>;
  }
};

// The heads of an item of work, one of the head_groups of an image, and one of `parts` of their queries or levels.
struct Item {
  int64_t image, first_head, last_head, part;

  Item(const Problem& p, int64_t number, int64_t parts) : part(number % parts) {
    const int64_t group = number / parts % p.head_groups;
    image = number / parts / p.head_groups;
    first_head = p.M * group / p.head_groups, last_head = p.M * (group + 1) / p.head_groups;
  }
};

// A row is a head of a query. One query's heads follow each other: they look around the same place, where their
// channels lie side by side.
struct Rows {
  int64_t first_head, last_head;
  int64_t query, head;  // query: of B*Q

  Rows(const Problem& p, const Item& item, int64_t query_of_image)
      : first_head(item.first_head), last_head(item.last_head), query(item.image * p.Q + query_of_image),
        head(item.first_head) {}
  int64_t index(const Problem& p) const { return query * p.M + head; }
  void advance() {
    if (++head == last_head) head = first_head, ++query;
  }
};

// A row that is read, or written, soon: those of one head lie too far apart for the hardware to foresee them.
template <bool kWrite, class T>
TENFOLD_INLINE void prefetch_row(const T* row, int64_t width) {
  for (int64_t e = 0; e < width; e += 64 / sizeof(T)) __builtin_prefetch(row + e, kWrite);
}

// A row that may be read in whole vectors: in place where it ends before the tensor does.
template <class A>
TENFOLD_INLINE const A* whole_vectors(const A* row, int count, const A* end, A* padded) {
  const int whole = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  if (whole <= end - row) return row;
  std::memcpy(padded, row, sizeof(A) * count);
  std::memset(padded + count, 0, sizeof(A) * (whole - count));
  return padded;
}

template <class A>
TENFOLD_INLINE Vec<A> lane_numbers() {
  Vec<A> numbers;
  for (int i = 0; i < kLanes<A>; ++i) numbers[i] = static_cast<A>(i);
  return numbers;
}

// The vector at logits + k, and in the lanes from count on what has no weight.
template <class A>
TENFOLD_INLINE Vec<A> logits_at(const A* logits, int k, int count) {
  const Vec<A> all = load(logits + k);
  if (k + kLanes<A> <= count) return all;
  return lane_numbers<A>() < static_cast<A>(count - k) ? all : Vec<A>{} - static_cast<A>(INFINITY);
}

// logits may be read, and weights written, in whole vectors. Weights after the last are 0.
template <class A>
TENFOLD_INLINE void softmax(const A* logits, int count, A* weights) {
  Vec<A> largest = logits_at(logits, 0, count), total{};
  for (int k = kLanes<A>; k < count; k += kLanes<A>) {
    const Vec<A> next = logits_at(logits, k, count);
    largest = next > largest ? next : largest;
  }
  const A shift = max_lanes<A>(largest);
  for (int k = 0; k < count; k += kLanes<A>) {
    const Vec<A> power = exp_lanes(logits_at(logits, k, count) - shift);
    store(weights + k, power);
    total += power;
  }
  const A scale = 1 / sum_lanes<A>(total);
  for (int k = 0; k < count; k += kLanes<A>) store(weights + k, load(weights + k) * scale);
}

// grad_weights becomes the gradient of the logits. Both may be read and written in whole vectors; weights after the
// last are 0.
template <class A>
TENFOLD_INLINE void softmax_backward(const A* weights, int count, A* grad_weights) {
  Vec<A> products{};
  for (int k = 0; k < count; k += kLanes<A>) products += load(weights + k) * load(grad_weights + k);
  const A common = sum_lanes<A>(products);
  for (int k = 0; k < count; k += kLanes<A>) {
    store(grad_weights + k, load(weights + k) * (load(grad_weights + k) - common));
  }
}

// Lane i: row[numbers * level[i] + number], for a row of few elements a permutation of registers.
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

template <class A>
TENFOLD_INLINE void set_addresses(const Points<A>& points, int k, const Axis<Vec<A>>& x, const Axis<Vec<A>>& y,
                                  Block<A>& to) {
  using Int32 = typename Types<A>::Int32;
  const Int32 start = load_as<Int32>(points.start + k);
  const Int32 line = load_as<Int32>(points.line + k), pixel = load_as<Int32>(points.pixel + k);
  const Int32 upper = start + __builtin_convertvector(y.near, Int32) * line;
  const Int32 lower = start + __builtin_convertvector(y.far, Int32) * line;
  const Int32 left = __builtin_convertvector(x.near, Int32) * pixel;
  const Int32 right = __builtin_convertvector(x.far, Int32) * pixel;
  const Int32 addresses[4] = {upper + left, upper + right, lower + left, lower + right};
  for (int c = 0; c < 4; ++c) std::memcpy(to.address[c], &addresses[c], sizeof(Int32));
}

// The points of a query, from its weights on. attention: of the first of these points.
template <class A, Mode kMode, bool kBackward>
TENFOLD_INLINE void place(const Problem& p, Workspace<A>& work, int64_t row, int64_t query, const A* attention,
                          Block<A>* block, Tangent<A>* tangent) {
  const Points<A>& points = work.points;
  const A* all_offsets = static_cast<const A*>(p.offsets_BQMLP2);
  const A* offsets = all_offsets + 2 * (row + points.first_level * p.P);
  const int64_t numbers = p.B * p.Q * p.M * p.L * p.P * 2;
  const A* xy = offsets;
  if (2 * points.rounded_up > all_offsets + numbers - offsets) {
    std::memcpy(work.padded_row, offsets, sizeof(A) * 2 * points.count);
    std::memset(work.padded_row + 2 * points.count, 0, sizeof(A) * 2 * (points.rounded_up - points.count));
    xy = work.padded_row;
  }
  const A* references = nullptr;
  if constexpr (kMode != Mode::kLocations) {
    constexpr int kNumbers = kMode == Mode::kPoints ? 2 : 4;
    const A* all = static_cast<const A*>(p.references_BQLN);
    references = whole_vectors<A>(all + (query * p.L + points.first_level) * kNumbers,
                                  (points.last_level - points.first_level) * kNumbers,
                                  all + p.B * p.Q * p.L * kNumbers, work.padded_references);
  }
  for (int k = 0; k < points.rounded_up; k += kLanes<A>, ++block, ++tangent) {
    Vec<A> offset_x, offset_y;
    deinterleave<A>(load(xy + 2 * k), load(xy + 2 * k + kLanes<A>), offset_x, offset_y);
    // Lanes after the last point repeat it, without weight: what they read, and add nothing to, its lane does too.
    const int left = points.count - k;
    const auto real = lane_numbers<A>() < static_cast<A>(left);
    if (left < kLanes<A>) {
      offset_x = real ? offset_x : Vec<A>{} + offset_x[left - 1];
      offset_y = real ? offset_y : Vec<A>{} + offset_y[left - 1];
    }
    const FramesXY<A> frame = frames<A, kMode>(p, points, k, references);
    const auto x = axis<Vec<A>>(offset_x * frame.x.scale + frame.x.origin, load(points.width + k));
    const auto y = axis<Vec<A>>(offset_y * frame.y.scale + frame.y.origin, load(points.height + k));
    Vec<A> weight = load(attention + k);
    if (left < kLanes<A>) weight = real ? weight : Vec<A>{};
    const Vec<A> near = weight * y.near_weight, far = weight * y.far_weight;
    store(block->weight[0], near * x.near_weight);
    store(block->weight[1], near * x.far_weight);
    store(block->weight[2], far * x.near_weight);
    store(block->weight[3], far * x.far_weight);
    set_addresses(points, k, x, y, *block);
    if constexpr (kBackward) *tangent = {x, y, frame.x.scale, frame.y.scale, offset_x, offset_y};
  }
}

// The points of `count` rows from `row` on.
template <class A, Mode kMode, bool kBackward>
static void prepare(const Problem& p, Workspace<A>& work, Rows row, int count) {
  const int64_t LP = p.L * p.P;
  const A* all = static_cast<const A*>(p.weights_BQMLP);
  const A* end = all + p.B * p.Q * p.M * LP;
  const A* offsets = static_cast<const A*>(p.offsets_BQMLP2);
  Rows at = row, ahead = row;
  for (int i = 0; i < kBatch; ++i) ahead.advance();
  for (int i = 0; i < count; ++i, at.advance(), ahead.advance()) {
    prefetch_row<false>(all + ahead.index(p) * LP, LP);
    prefetch_row<false>(offsets + 2 * ahead.index(p) * LP, 2 * LP);
    const A* given = whole_vectors<A>(all + at.index(p) * LP, static_cast<int>(LP), end, work.padded_row);
    A* attention = work.attentions + i * work.attention;
    if constexpr (kMode == Mode::kLocations) {
      for (int64_t k = 0; k < LP; k += kLanes<A>) store(attention + k, load(given + k));
    } else {
      softmax<A>(given, static_cast<int>(LP), attention);
    }
  }
  for (int i = 0; i < count; ++i, row.advance()) {
    const A* attention = work.attentions + i * work.attention + work.points.first_level * p.P;
    place<A, kMode, kBackward>(p, work, row.index(p) * LP, row.query, attention, work.block + i * work.blocks,
                               work.tangent + i * work.blocks);
  }
}

template <class A, bool kBackward>
TENFOLD_INLINE void prepare(const Problem& p, Workspace<A>& work, Rows row, int count) {
  switch (p.mode) {
    case Mode::kLocations:
      return prepare<A, Mode::kLocations, kBackward>(p, work, row, count);
    case Mode::kPoints:
      return prepare<A, Mode::kPoints, kBackward>(p, work, row, count);
    case Mode::kBoxes:
      return prepare<A, Mode::kBoxes, kBackward>(p, work, row, count);
  }
}

// Sum kVectors vectors of channels over all points. Two sums of half the corners, for the latency of multiply-add.
template <class V, class A, int kVectors>
TENFOLD_INLINE void gather(const V* value, const Block<A>* block, int count, V* out) {
  Vec<A> upper[kVectors]{}, lower[kVectors]{};
  for (; count > 0; count -= kLanes<A>, ++block) {
    const int here = count < kLanes<A> ? count : kLanes<A>;
    for (int k = 0; k < here; ++k) {
      for (int c = 0; c < 2; ++c) {
        const V *above = value + block->address[c][k], *below = value + block->address[c + 2][k];
        for (int i = 0; i < kVectors; ++i) {
          upper[i] += load<A>(above + i * kLanes<A>) * block->weight[c][k];
          lower[i] += load<A>(below + i * kLanes<A>) * block->weight[c + 2][k];
        }
      }
    }
  }
  for (int i = 0; i < kVectors; ++i) store<A>(out + i * kLanes<A>, upper[i] + lower[i]);
}

template <class V, class A>
TENFOLD_INLINE void gather_one(const V* value, const Block<A>* block, int count, V* out) {
  A sum = 0;
  for (int k = 0; k < count; ++k) {
    const Block<A>& at = block[k / kLanes<A>];
    const int lane = k % kLanes<A>;
    for (int c = 0; c < 4; ++c) sum += at.weight[c][lane] * to_real(value[at.address[c][lane]]);
  }
  set(*out, sum);
}

// kWidth: channels of a head where known to the compiler, else 0.
template <class V, class A, int kWidth>
static void gather_all(const V* value, const Block<A>* at, int count, int64_t width, V* out) {
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

// Rows [begin, end) from one array of pixels to another; strides in elements.
template <class To, class From, class A, int kWidth>
static void copy_rows(const From* from, int64_t from_stride, int64_t begin, int64_t end, int64_t given_width,
                      int64_t to_stride, To* to) {
  constexpr int kAhead = 16;
  const int64_t width = kWidth ? kWidth : given_width;
  for (int64_t s = begin; s < end; ++s) {
    prefetch_row<false>(from + (s + kAhead) * from_stride, width);
    prefetch_row<true>(to + (s + kAhead) * to_stride, width);
    copy_row<To, From, A>(from + s * from_stride, width, to + s * to_stride);
  }
}

// Memory of one thread. Where there is none, the caller does without or says so.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {
    if (memory_) use_huge_pages(memory_, static_cast<int64_t>(bytes));
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

// The next item that no thread has taken.
TENFOLD_INLINE int64_t take(int64_t* next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

// An item's part is one of the query_chunks.
template <class V, class A, int kWidth>
static int forward_items(const Problem& p, int64_t* next, int64_t items) {
  const int64_t pixel = p.M * p.E;
  // A copy lies in A: the conversion of bfloat16 is paid once for a row, which is read many times.
  constexpr bool kSame = sizeof(V) == sizeof(A), kCanCopy = kSame || kWidth != 0;
  const Scratch scratch(p.repack && kCanCopy ? sizeof(A) * p.S * p.E : 0);
  A* copy = static_cast<A*>(scratch.get());
  const Scratch memory(sizeof(Workspace<A>));
  if (!memory.get()) return kOutOfMemory;
  auto& work = *static_cast<Workspace<A>*>(memory.get());
  work.set(p, 0, static_cast<int>(p.L), copy ? p.E : pixel);
  const int count = work.points.count;
  int64_t copied = -1;
  for (int64_t number = take(next); number < items; number = take(next)) {
    const Item item(p, number, p.query_chunks);
    const V* value = static_cast<const V*>(p.value_BSME) + item.image * p.S * pixel;
    if (copy && copied != number / p.query_chunks) {
      copy_rows<A, V, A, kWidth>(value + item.first_head * p.E, pixel, 0, p.S, p.E, p.E, copy);
      copied = number / p.query_chunks;
    }
    const int64_t first = p.Q * item.part / p.query_chunks, last = p.Q * (item.part + 1) / p.query_chunks;
    int64_t left = (last - first) * (item.last_head - item.first_head);
    for (Rows row(p, item, first); left > 0; left -= kBatch) {
      const int rows = static_cast<int>(left < kBatch ? left : kBatch);
      prepare<A, false>(p, work, row, rows);
      for (int i = 0; i < rows; ++i, row.advance()) {
        V* out = static_cast<V*>(p.out_BQME) + row.index(p) * p.E;
        const Block<A>* at = work.block + i * work.blocks;
        if (copy) prefetch_row<true>(out + kBatch * pixel, p.E);
        if (!copy) {
          gather_all<V, A, kWidth>(value + row.head * p.E, at, count, p.E, out);
        } else if constexpr (kSame) {
          gather_all<A, A, kWidth>(copy, at, count, p.E, reinterpret_cast<A*>(out));
        } else if constexpr (kCanCopy) {
          alignas(64) A sums[kWidth];
          gather_all<A, A, kWidth>(copy, at, count, p.E, sums);
          copy_row<V, A, A>(sums, p.E, out);
        }
      }
    }
  }
  return kDone;
}

// dots[4 * k + c]: product of grad with the row of corner c of point k; the weighted grad is added to grad_value.
// count: rounded up to whole vectors; the last point fills the last one, without weight.
template <class A, int kWidth>
static void scatter(const A* value, A* grad_value, const A* grad, const Block<A>* block, int count, int64_t width,
                    A* dots) {
  const int64_t channels = kWidth ? kWidth : width, whole = channels / kLanes<A> * kLanes<A>;
  constexpr int kTogether = kLanes<A> / 4;  // points whose dots fill a vector
  constexpr int kKept = kWidth / kLanes<A>;  // vectors of grad in registers, which stores cannot change
  Vec<A> kept[kKept ? kKept : 1];
  for (int i = 0; i < kKept; ++i) kept[i] = load(grad + i * kLanes<A>);
  for (int k = 0; k < count; k += kTogether) {
    const Block<A>& at = block[k / kLanes<A>];
    const int lane = k % kLanes<A>;
    Vec<A> sums[4]{};
    for (int j = 0; j < kTogether; ++j) {
      Vec<A> products[4]{};
      for (int c = 0; c < 4; ++c) {
        const A* row = value + at.address[c][lane + j];
        A* grad_row = grad_value + at.address[c][lane + j];
        const A weight = at.weight[c][lane + j];
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
static void differentiate(const Problem& p, Workspace<A>& work, const A* attention, const Tangent<A>* tangent) {
  const A half_over_points = A(0.5) / static_cast<A>(p.P);
  const Points<A>& points = work.points;
  for (int k = 0; k < points.rounded_up; k += kLanes<A>, ++tangent) {
    Vec<A> corner[4], low, high;
    dots_of<A>(work.dots + 4 * k, corner);
    const auto grad = point_grad(tangent->x, tangent->y, corner[0], corner[1], corner[2], corner[3]);
    const Vec<A> weight = load(attention + k), x = chain(grad.x, weight), y = chain(grad.y, weight);
    interleave<A>(chain(x, tangent->scale_x), chain(y, tangent->scale_y), low, high);
    store<A>(work.grad_xy + 2 * k, low);
    store<A>(work.grad_xy + 2 * k + kLanes<A>, high);
    store<A>(work.grad_weights + k, grad.sample);
    if (p.grad_references_BMQLN) {
      const Vec<A> center_x = x * load(points.width + k), center_y = y * load(points.height + k);
      store<A>(work.grad_references[0] + k, center_x);
      store<A>(work.grad_references[1] + k, center_y);
      store<A>(work.grad_references[2] + k, chain(center_x, tangent->offset_x * half_over_points));
      store<A>(work.grad_references[3] + k, chain(center_y, tangent->offset_y * half_over_points));
    }
  }
}

// attention: of the first point of the query's first level.
template <class A>
static void write_gradients(const Problem& p, Workspace<A>& work, const Rows& at, const A* attention) {
  const Points<A>& points = work.points;
  const int64_t row = at.index(p) * p.L * p.P + points.first_level * p.P;
  if (p.mode != Mode::kLocations && p.level_slices == 1) {
    softmax_backward<A>(attention, points.count, work.grad_weights);
  }
  std::memcpy(static_cast<A*>(p.grad_weights_BQMLP) + row, work.grad_weights, sizeof(A) * points.count);
  std::memcpy(static_cast<A*>(p.grad_offsets_BQMLP2) + 2 * row, work.grad_xy, sizeof(A) * 2 * points.count);
  if (!p.grad_references_BMQLN) return;
  const int64_t image = at.query / p.Q, query = at.query % p.Q;
  A* references = static_cast<A*>(p.grad_references_BMQLN) + ((image * p.M + at.head) * p.Q + query) * p.L * p.N;
  for (int l = points.first_level; l < points.last_level; ++l) {
    for (int n = 0; n < p.N; ++n) {
      const A* each = work.grad_references[n] + (l - points.first_level) * p.P;
      A sum = 0;
      for (int64_t point = 0; point < p.P; ++point) sum += each[point];
      references[l * p.N + n] = sum;
    }
  }
}

// An item's part is one of the level_slices: the only item to touch that part of grad_value, so that the order of sums
// depends on nothing.
template <class V, class A, int kWidth>
static int backward_items(const Problem& p, int64_t* next, int64_t items) {
  const int64_t pixel = p.M * p.E;
  const size_t map = p.repack ? sizeof(A) * p.S * p.E : 0;
  const Scratch value_copy(map), grad_copy(map), memory(sizeof(Workspace<A>) + sizeof(A) * p.E);
  if (!memory.get() || (p.repack && !(value_copy.get() && grad_copy.get()))) return kOutOfMemory;
  auto& work = *static_cast<Workspace<A>*>(memory.get());
  A* grad_out = reinterpret_cast<A*>(&work + 1);
  for (int64_t number = take(next); number < items; number = take(next)) {
    const Item item(p, number, p.level_slices);
    const int first = static_cast<int>(p.L * item.part / p.level_slices);
    const int last = static_cast<int>(p.L * (item.part + 1) / p.level_slices);
    work.set(p, first, last, p.repack ? p.E : pixel);
    const int64_t first_pixel = p.levels_L[first].start, last_pixel = last < p.L ? p.levels_L[last].start : p.S;
    const V* value = static_cast<const V*>(p.value_BSME) + item.image * p.S * pixel;
    V* grad_value = static_cast<V*>(p.grad_value_BSME) + item.image * p.S * pixel;
    const A* read;
    A* add;
    if (p.repack) {
      A* copy = static_cast<A*>(value_copy.get());
      copy_rows<A, V, A, kWidth>(value + item.first_head * p.E, pixel, first_pixel, last_pixel, p.E, p.E, copy);
      read = copy, add = static_cast<A*>(grad_copy.get());
      std::memset(add + first_pixel * p.E, 0, sizeof(A) * (last_pixel - first_pixel) * p.E);
    } else {
      read = reinterpret_cast<const A*>(value), add = reinterpret_cast<A*>(grad_value);  // zeros already
    }
    int64_t left = p.Q * (item.last_head - item.first_head);
    for (Rows row(p, item, 0); left > 0; left -= kBatch) {
      const int rows = static_cast<int>(left < kBatch ? left : kBatch);
      prepare<A, true>(p, work, row, rows);
      for (int i = 0; i < rows; ++i, row.advance()) {
        const V* grad_row = static_cast<const V*>(p.grad_out_BQME) + row.index(p) * p.E;
        if (p.repack) prefetch_row<false>(grad_row + kBatch * pixel, p.E);
        copy_row<A, V, A>(grad_row, p.E, grad_out);
        const int64_t channel = p.repack ? 0 : row.head * p.E;
        scatter<A, kWidth>(read + channel, add + channel, grad_out, work.block + i * work.blocks,
                           work.points.rounded_up, p.E, work.dots);
        const A* attention = work.attentions + i * work.attention + first * p.P;
        differentiate<A>(p, work, attention, work.tangent + i * work.blocks);
        write_gradients<A>(p, work, row, attention);
      }
    }
    if (p.repack) {
      copy_rows<V, A, A, kWidth>(add, p.E, first_pixel, last_pixel, p.E, pixel, grad_value + item.first_head * p.E);
    }
  }
  return kDone;
}

// The rows of grad_weights hold gradients of weights, from several slices: make them those of the logits. An item is
// one query.
template <class A>
static int softmax_items(const Problem& p, int64_t* next, int64_t items) {
  const int count = static_cast<int>(p.L * p.P);
  alignas(64) A padded[kPadded], weights[kPadded], grads[kPadded];
  const A* all = static_cast<const A*>(p.weights_BQMLP);
  for (int64_t item = take(next); item < items; item = take(next)) {
    for (int64_t row = item * p.M; row < (item + 1) * p.M; ++row) {
      softmax<A>(whole_vectors<A>(all + row * count, count, all + p.B * p.Q * p.M * count, padded), count, weights);
      A* grad = static_cast<A*>(p.grad_weights_BQMLP) + row * count;
      std::memcpy(grads, grad, sizeof(A) * count);
      std::memset(grads + count, 0, sizeof(A) * kLanes<A>);
      softmax_backward<A>(weights, count, grads);
      std::memcpy(grad, grads, sizeof(A) * count);
    }
  }
  return kDone;
}

#define TENFOLD_BY_WIDTH(kernel, V, A)             \
  switch (p.E) {                                   \
    case 16:                                       \
      return kernel<V, A, 16>(p, next, items);     \
    case 32:                                       \
      return kernel<V, A, 32>(p, next, items);     \
    case 64:                                       \
      return kernel<V, A, 64>(p, next, items);     \
    default:                                       \
      return kernel<V, A, 0>(p, next, items);      \
  }
#define TENFOLD_BY_DTYPE(kernel)                   \
  switch (p.dtype) {                               \
    case Dtype::kDouble:                           \
      TENFOLD_BY_WIDTH(kernel, double, double)     \
    case Dtype::kBfloat16:                         \
      TENFOLD_BY_WIDTH(kernel, bfloat16, float)    \
    default:                                       \
      TENFOLD_BY_WIDTH(kernel, float, float)       \
  }

int forward(const Problem& p, int64_t* next, int64_t items) { TENFOLD_BY_DTYPE(forward_items) }
int backward(const Problem& p, int64_t* next, int64_t items) { TENFOLD_BY_DTYPE(backward_items) }
int softmax_rows(const Problem& p, int64_t* next, int64_t items) {
  return p.dtype == Dtype::kDouble ? softmax_items<double>(p, next, items) : softmax_items<float>(p, next, items);
}

}  // namespace
}  // namespace tenfold
