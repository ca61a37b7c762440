// The CUDA kernels, thread after thread on the CPU, against the CPU kernels: their arithmetic and addresses, not what
// only a GPU shows (the sum over a warp, races, launches).

#define TENFOLD_EMULATED
#define __global__ static
#define __device__
#define __host__

#include <cmath>
#include <cstdio>

struct Index {
  int64_t x;
};
static Index blockIdx, threadIdx, gridDim;

template <class A>
static void atomicAdd(A* sum, A number) {
  *sum += number;
}
template <class A>
static A __shfl_xor_sync(unsigned, A number, int) {
  return number;
}

using std::exp;

#include "../../ops/csrc/cpu/kernels_of.h"
#include "../../ops/csrc/cuda/kernels.cuh"
#include "problems.h"

using namespace tenfold;

template <class Kernel>
static void on_all_blocks(int64_t blocks, const Kernel& kernel) {
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) kernel();
}

template <class A>
static bool close(const Array& one, const Array& other, double tolerance) {
  const auto* a = reinterpret_cast<const A*>(one.bytes.data());
  const auto* b = reinterpret_cast<const A*>(other.bytes.data());
  for (size_t i = 0; i < one.bytes.size() / sizeof(A); ++i) {
    if (!(std::fabs(a[i] - b[i]) <= tolerance * (1 + std::fabs(b[i])))) return false;
  }
  return true;
}

template <class A>
static bool same(Problem p, double tolerance) {
  const Inputs inputs(p, p.dtype, tame);
  Outputs on_cpu(p, p.dtype), emulated(p, p.dtype);
  inputs.set(p), on_cpu.set(p);
  if (all(kPortable.forward, p, p.B) || all(kPortable.backward, p, p.B)) return false;
  emulated.set(p);
  Levels levels;
  for (int l = 0; l < p.L; ++l) levels.level[l] = p.levels_L[l];
  // Fewer blocks than there is work: each has several turns.
  on_all_blocks(7, [&] { forward_kernel<A, A>(p, levels); });
  on_all_blocks(7, [&] { backward_kernel<A, A>(p, levels); });
  return close<A>(emulated.out, on_cpu.out, tolerance) &&
         close<A>(emulated.grad_value, on_cpu.grad_value, tolerance) &&
         close<A>(emulated.grad_offsets, on_cpu.grad_offsets, tolerance) &&
         close<A>(emulated.grad_weights, on_cpu.grad_weights, tolerance) &&
         close<A>(emulated.grad_references, on_cpu.grad_references, tolerance);
}

int main() {
  const std::vector<Level> levels = {{6, 4, 0}, {3, 8, 24}, {1, 1, 48}};
  int failed = 0;
  for (const Mode mode : {Mode::kLocations, Mode::kPoints, Mode::kBoxes}) {
    for (const int64_t width : {5, 32}) {
      Problem p{};
      p.mode = mode, p.B = 2, p.M = 3, p.E = width, p.Q = 11, p.P = 4;
      p.dtype = Dtype::kDouble;
      failed += !same<double>(completed(p, levels), 1e-11);
      p.dtype = Dtype::kFloat;
      failed += !same<float>(completed(p, levels), 1e-3);
    }
  }
  std::printf("%d of 12 differ\n", failed);
  return failed != 0;
}
