// The CUDA kernels, thread by thread on the CPU, against the CPU kernels.

#include "emulated_gpu.h"

#include <cstdio>

#include "../../ops/csrc/cpu/kernels_of.h"
#include "../../ops/csrc/cuda/assign.cuh"
#include "../../ops/csrc/cuda/tiled.cuh"
#include "problems.h"

using namespace tenfold;

template <class One, class Other>
static bool close(const Array& one, const Array& other, double tolerance) {
  const auto* a = reinterpret_cast<const One*>(one.bytes.data());
  const auto* b = reinterpret_cast<const Other*>(other.bytes.data());
  for (size_t i = 0; i < one.bytes.size() / sizeof(One); ++i) {
    const double found = to_real(b[i]), expected = to_real(a[i]);
    if (!(std::fabs(found - expected) <= tolerance * (1 + std::fabs(expected)))) return false;
  }
  return true;
}

// Numbers that a kernel left unwritten differ from everything.
static void poison(Array& array) { std::fill(array.bytes.begin(), array.bytes.end(), static_cast<char>(0xff)); }

// Where points lie: near the maps, or also far outside, at infinity and at NaN.
static double (*places)() = tame;

// The outputs of kernels(p, levels) against those of the CPU.
template <class V, class A, class Kernels>
static bool same(Problem p, double tolerance, bool fixed, const Kernels& kernels) {
  const Dtype compute = sizeof(A) == 8 ? Dtype::kDouble : Dtype::kFloat;
  Inputs inputs(p, compute, tame);
  inputs.references = Array(p.B * p.Q * p.L * p.N, compute, places);
  inputs.offsets = Array(2 * p.B * p.Q * p.M * p.L * p.P, compute, places);
  Outputs on_cpu(p, compute), on_gpu(p, compute);
  on_gpu.grad_value = Array(p.B * p.S * p.M * p.E, compute);  // sums are not narrower than A
  inputs.set(p), on_cpu.set(p);
  p.repack = p.dtype == Dtype::kBfloat16, p.head_groups = p.M;
  if (all(kPortable.forward, p, p.B * p.M) || all(kPortable.backward, p, p.B * p.M)) return false;
  for (Array* array : {&on_gpu.out, &on_gpu.grad_offsets, &on_gpu.grad_weights, &on_gpu.grad_references}) {
    poison(*array);
  }
  on_gpu.set(p);
  std::vector<long long> sums(p.B * p.S * p.M * p.E);
  A largest[2] = {};
  if (fixed) {
    p.largest = largest, p.grad_value_BSME = sums.data();
    const int64_t outputs = p.B * p.Q * p.M * p.E, weights = p.B * p.Q * p.M * p.L * p.P;
    emulated::launch(2, kThreads, 0, [&] { largest_kernel(static_cast<const V*>(p.grad_out_BQME), outputs, largest); });
    emulated::launch(2, kThreads, 0, [&] {
      largest_kernel(static_cast<const A*>(p.weights_BQMLP), weights, largest + 1);
    });
  }
  Levels levels;
  for (int l = 0; l < p.L; ++l) levels.level[l] = p.levels_L[l];
  if (!kernels(p, levels)) return false;
  if (fixed) {
    auto* numbers = reinterpret_cast<A*>(on_gpu.grad_value.bytes.data());
    emulated::launch(2, kThreads, 0, [&] { from_fixed_kernel<A, A>(p, numbers); });
  }
  const bool value_too = close<V, A>(on_cpu.grad_value, on_gpu.grad_value, tolerance);
  return value_too && close<V, V>(on_cpu.out, on_gpu.out, tolerance) &&
         close<A, A>(on_cpu.grad_offsets, on_gpu.grad_offsets, tolerance) &&
         close<A, A>(on_cpu.grad_weights, on_gpu.grad_weights, tolerance) &&
         close<A, A>(on_cpu.grad_references, on_gpu.grad_references, tolerance);
}

template <class V, class A>
static bool generic(Problem p, double tolerance, bool fixed) {
  return same<V, A>(p, tolerance, fixed, [](const Problem& p, const Levels& levels) {
    // Fewer blocks than there is work: each has several turns.
    return emulated::launch(2, kThreads, 0, [&] { forward_kernel<V, A>(p, levels); }) &&
           emulated::launch(2, kThreads, 0, [&] { backward_kernel<V, A>(p, levels); });
  });
}

template <class V, int kWidth, int kMost, Adds kAdds>
static bool tiled(Problem p, double tolerance) {
  p.E = kWidth;
  return same<V, float>(p, tolerance, kAdds == Adds::kFixed, [](const Problem& p, const Levels& levels) {
    using F = ForwardGroup<V, kWidth, kMost>;
    using G = BackwardGroup<V, kWidth, kMost>;
    const Tiles forward = tiles_of(p, F::kQueries), backward = tiles_of(p, G::kQueries);
    const int points = static_cast<int>(p.L * p.P);
    const size_t more = kAdds == Adds::kPixels ? sizeof(typename Bins<G>::Shared) : 0;
    // Fewer rows of blocks than heads: each has several turns.
    return emulated::launch({forward.count, 3}, F::kThreads, Stage<F>::bytes_of_query(points) * F::kQueries, [&] {
             tiled_forward<V, kWidth, kMost>(p, levels, forward);
           }) && emulated::launch({backward.count, 3}, G::kThreads, Stage<G>::bytes_of_query(points) * G::kQueries + more, [&] {
             tiled_backward<V, kWidth, kMost, kAdds>(p, levels, backward);
           });
  });
}

template <class V, int kWidth>
static int failures_of_tiled(Problem p, double tolerance) {
  int failed = 0;
  if (p.L * p.P <= 16) {
    failed += !tiled<V, kWidth, 16, Adds::kCorners>(p, tolerance);
    failed += !tiled<V, kWidth, 16, Adds::kPixels>(p, tolerance);
    failed += !tiled<V, kWidth, 16, Adds::kFixed>(p, tolerance);
  }
  failed += !tiled<V, kWidth, 32, Adds::kPixels>(p, tolerance);
  return failed + !tiled<V, kWidth, 32, Adds::kFixed>(p, tolerance);
}

// Adds to grad_value where an encoder's queries look around themselves.
template <Adds kAdds>
static int64_t adds_of_encoder() {
  const std::vector<Level> levels = {{24, 32, 0}, {12, 16, 768}};
  Problem p{};
  p.mode = Mode::kPoints, p.dtype = Dtype::kBfloat16, p.B = 1, p.M = 1, p.E = 32, p.Q = 960, p.P = 4;
  p = completed(p, levels);
  Inputs inputs(p, Dtype::kFloat, tame);
  auto* reference = reinterpret_cast<float*>(inputs.references.bytes.data());
  for (const Level& level : levels) {
    for (int i = 0; i < level.height * level.width * 2; ++i, reference += 2) {
      reference[0] = (i / 2 % level.width + 0.5f) / level.width, reference[1] = (i / 2 / level.width + 0.5f) / level.height;
    }
  }
  Outputs outputs(p, Dtype::kFloat);
  outputs.grad_value = Array(p.S * p.E, Dtype::kFloat);
  inputs.set(p), outputs.set(p);
  Levels of_kernel;
  for (int l = 0; l < p.L; ++l) of_kernel.level[l] = p.levels_L[l];
  using G = BackwardGroup<bfloat16, 32, 16>;
  const size_t bytes = Stage<G>::bytes_of_query(8) * G::kQueries + sizeof(Bins<G>::Shared);
  const Tiles tiles = tiles_of(p, G::kQueries);
  float_adds = 0;
  emulated::launch({tiles.count, 1}, G::kThreads, bytes, [&] {
    tiled_backward<bfloat16, 32, 16, kAdds>(p, of_kernel, tiles);
  });
  return float_adds;
}

// Whether nothing costs less than what the kernel assigns: its prices prove it, as dual solutions of the problem do. No
// pair costs less than its target's price and its query's together, chosen pairs cost just that, and a query has a price
// below 0 only where it is chosen. whole: costs are small whole numbers, many of them equal.
template <int kThreadsOfBlock>
static bool assigned(const std::vector<int>& counts_B, int queries, bool whole) {
  constexpr int kLayers = 2;
  const int images = static_cast<int>(counts_B.size());
  std::vector<int64_t> image_N;
  for (int b = 0; b < images; ++b) image_N.insert(image_N.end(), counts_B[b], b);
  const int64_t targets = image_N.size(), columns = kLayers * images * queries;
  std::vector<float> costs(kLayers * targets * queries);
  for (float& cost : costs) cost = whole ? std::rand() % 4 : std::rand() / (RAND_MAX / 8.0f) - 4;
  std::vector<int64_t> query(kLayers * targets, -2);
  std::vector<double> numbers(2 * columns + kLayers * targets, std::nan(""));
  std::vector<int> indices(3 * columns, 1 << 30);
  double* price_KBQ = numbers.data();
  int* before_KBQ = indices.data();
  const Assignment a{kLayers, images, targets, queries, costs.data(), image_N.data(), query.data(),
                     price_KBQ, price_KBQ + 2 * columns, price_KBQ + columns,
                     before_KBQ, before_KBQ + columns, before_KBQ + 2 * columns};
  const auto work = [&] { assign_kernel<kThreadsOfBlock>(a); };
  if (!emulated::launch({images, kLayers}, kThreadsOfBlock, kAssignShared, work)) return false;
  for (int64_t row = 0; row < kLayers * targets; ++row) {
    const int64_t layer = row / targets, image = image_N[row % targets];
    if (query[row] < 0 || query[row] >= queries) return false;
    for (int64_t column = 0; column < queries; ++column) {
      const int64_t at = (layer * images + image) * queries + column;
      const double more = costs[row * queries + column] - a.price_KN[row] - a.price_KBQ[at];
      if (!(more > -1e-9) || a.price_KBQ[at] > 0 || (a.row_KBQ[at] < 0 && a.price_KBQ[at] != 0)) return false;
      if (column == query[row] && more > 1e-9) return false;
    }
    for (int64_t other = layer * targets; other < row; ++other) {
      if (image_N[other % targets] == image && query[other] == query[row]) return false;
    }
  }
  costs[targets * queries] = std::nanf("");  // of the first target of layer 1
  emulated::launch({images, kLayers}, kThreadsOfBlock, kAssignShared, work);
  for (int64_t row = 0; row < kLayers * targets; ++row) {
    if ((query[row] == -1) != (row >= targets && image_N[row % targets] == image_N[0])) return false;
  }
  return true;
}

int main() {
  const std::vector<Level> levels = {{6, 4, 0}, {3, 11, 24}, {1, 1, 57}};
  int failed = 0;
  for (const Mode mode : {Mode::kLocations, Mode::kPoints, Mode::kBoxes}) {
    for (const int64_t queries : {11, 58}) {  // 58: a query for each pixel
      Problem p{};
      p.mode = mode, p.B = 2, p.M = 3, p.Q = queries, p.P = 4;
      for (const int64_t width : {5, 32}) {
        p.E = width;
        p.dtype = Dtype::kDouble;
        for (const bool fixed : {false, true}) {
          p.dtype = Dtype::kDouble;
          failed += !generic<double, double>(completed(p, levels), 1e-11, fixed);
          p.dtype = Dtype::kFloat;
          failed += !generic<float, float>(completed(p, levels), 1e-3, fixed);
        }
      }
      for (const int64_t points : {1, 4, 10}) {
        if (points != 4 && mode != Mode::kBoxes) continue;
        p.P = points;
        p.dtype = Dtype::kFloat;
        failed += failures_of_tiled<float, 16>(completed(p, levels), 1e-3);
        failed += failures_of_tiled<float, 32>(completed(p, levels), 1e-3);
        failed += failures_of_tiled<float, 64>(completed(p, levels), 1e-3);
        p.dtype = Dtype::kBfloat16;
        failed += failures_of_tiled<bfloat16, 16>(completed(p, levels), 2e-2);
        failed += failures_of_tiled<bfloat16, 32>(completed(p, levels), 2e-2);
        failed += failures_of_tiled<bfloat16, 64>(completed(p, levels), 2e-2);
      }
    }
  }
  places = wild;
  for (const Mode mode : {Mode::kLocations, Mode::kPoints, Mode::kBoxes}) {
    Problem p{};
    p.mode = mode, p.dtype = Dtype::kFloat, p.B = 1, p.M = 3, p.E = 32, p.Q = 58, p.P = 4;
    failed += failures_of_tiled<float, 32>(completed(p, levels), 1e-3);
    failed += !generic<float, float>(completed(p, levels), 1e-3, false);
  }
  for (const bool whole : {false, true}) {
    failed += !assigned<64>({3, 0, 5}, 5, whole) + !assigned<64>({60, 1}, 70, whole) + !assigned<1024>({4}, 2000, whole);
  }
  const int64_t corners = adds_of_encoder<Adds::kCorners>(), pixels = adds_of_encoder<Adds::kPixels>();
  std::printf("%d differ\n%.1f times fewer adds by pixels\n", failed, static_cast<double>(corners) / pixels);
  return failed != 0;
}
