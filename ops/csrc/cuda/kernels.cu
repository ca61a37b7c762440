// Starting the kernels.

#include "assign.cuh"
#include "launch.h"
#include "tiled.cuh"

namespace tenfold {
namespace {

// The device of the tensors is the current one while this lives.
struct OnDevice {
  int before = -1;
  bool changed;
  explicit OnDevice(int device) {
    cudaGetDevice(&before);
    changed = before != device;
    if (changed) cudaSetDevice(device);
  }
  ~OnDevice() {
    if (changed) cudaSetDevice(before);
  }
};

int blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads, most = 1 << 20;
  return static_cast<int>(blocks < most ? blocks : most);
}

const char* status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Launch>
const char* launch(const Problem& p, int device, const Launch& with) {
  if (p.L > kMaxLevels) return "spatial_shapes: more than 64 levels, expected at most that on a GPU";
  Levels levels;
  for (int l = 0; l < p.L; ++l) levels.level[l] = p.levels_L[l];
  const OnDevice guard(device);
  switch (p.dtype) {
    case Dtype::kFloat:
      with(float{}, float{}, levels);
      break;
    case Dtype::kDouble:
      with(double{}, double{}, levels);
      break;
    case Dtype::kBfloat16:
      with(__nv_bfloat16{}, float{}, levels);
      break;
    case Dtype::kHalf:
      with(__half{}, float{}, levels);
      break;
  }
  return status();
}

using Tiled = void (*)(Problem, Levels, Tiles);

// A kernel, and the threads and queries of its blocks.
struct Tiling {
  Tiled kernel = nullptr;
  int threads = 0, queries = 0;
  int (*bytes_of_query)(int points) = nullptr;  // of shared memory
  int more_bytes = 0;
};

struct TiledKernels {
  Tiling forward, by_corners, by_pixels, fixed;
};

template <class V, int kWidth, int kMost>
TiledKernels tiled_of() {
  using F = ForwardGroup<V, kWidth, kMost>;
  using G = BackwardGroup<V, kWidth, kMost>;
  const auto backward = [](Tiled kernel, int more_bytes = 0) {
    return Tiling{kernel, G::kThreads, G::kQueries, Stage<G>::bytes_of_query, more_bytes};
  };
  return {{tiled_forward<V, kWidth, kMost>, F::kThreads, F::kQueries, Stage<F>::bytes_of_query},
          backward(tiled_backward<V, kWidth, kMost, Adds::kCorners>),
          backward(tiled_backward<V, kWidth, kMost, Adds::kPixels>, sizeof(typename Bins<G>::Shared)),
          backward(tiled_backward<V, kWidth, kMost, Adds::kFixed>)};
}

template <class V, int kWidth>
TiledKernels tiled_of_width(int64_t points) {
  return points <= 16 ? tiled_of<V, kWidth, 16>() : points <= kTiledPoints ? tiled_of<V, kWidth, kTiledPoints>()
                                                                            : TiledKernels{};
}

template <class V>
TiledKernels tiled_for(const Problem& p) {
  if constexpr (sizeof(V) <= sizeof(float)) {
    if (p.E == 16) return tiled_of_width<V, 16>(p.L * p.P);
    if (p.E == 32) return tiled_of_width<V, 32>(p.L * p.P);
    if (p.E == 64) return tiled_of_width<V, 64>(p.L * p.P);
  }
  return {};
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// False where this problem, or this GPU, is not for the tiled kernels: nothing is started then.
bool start_tiled(const Tiling& with, const Problem& p, const Levels& levels, cudaStream_t stream) {
  if (!with.kernel || p.Q > INT32_MAX / 2 || p.B * p.M > INT32_MAX || p.S * p.M * p.E > UINT32_MAX / 4) return false;
  for (const void* address : {p.value_BSME, static_cast<const void*>(p.out_BQME), p.grad_out_BQME,
                              static_cast<const void*>(p.grad_value_BSME)}) {
    if (!aligned(address)) return false;
  }
  const int bytes = with.bytes_of_query(static_cast<int>(p.L * p.P)) * with.queries + with.more_bytes;
  if (bytes > 48 * 1024 && cudaFuncSetAttribute(with.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
    cudaGetLastError();  // this GPU has not so much; the next launch is not to find that error
    return false;
  }
  const Tiles tiles = tiles_of(p, with.queries);
  constexpr int64_t kMostRows = 65535;  // of a grid
  const dim3 grid(tiles.count, static_cast<unsigned>(p.B * p.M < kMostRows ? p.B * p.M : kMostRows));
  with.kernel<<<grid, with.threads, bytes, stream>>>(p, levels, tiles);
  return true;
}

}  // namespace

const char* forward_cuda(const Problem& p, int device, void* on) {
  return launch(p, device, [&](auto value, auto sum, const Levels& levels) {
    using V = decltype(value);
    using A = decltype(sum);
    const auto stream = static_cast<cudaStream_t>(on);
    const TiledKernels tiled = tiled_for<V>(p);
    if (start_tiled(tiled.forward, p, levels, stream)) return;
    forward_kernel<V, A><<<blocks_for(p.B * p.Q * p.M * p.E), kThreads, 0, stream>>>(p, levels);
  });
}

const char* backward_cuda(const Problem& p, int device, void* on) {
  return launch(p, device, [&](auto value, auto sum, const Levels& levels) {
    using V = decltype(value);
    using A = decltype(sum);
    const auto stream = static_cast<cudaStream_t>(on);
    const TiledKernels tiled = tiled_for<V>(p);
    if (p.largest) {
      A* largest = static_cast<A*>(p.largest);
      const int64_t outputs = p.B * p.Q * p.M * p.E, weights = p.B * p.Q * p.M * p.L * p.P;
      largest_kernel<V, A><<<blocks_for(outputs), kThreads, 0, stream>>>(static_cast<const V*>(p.grad_out_BQME), outputs,
                                                                         largest);
      if (p.mode == Mode::kLocations) {
        largest_kernel<A, A><<<blocks_for(weights), kThreads, 0, stream>>>(static_cast<const A*>(p.weights_BQMLP),
                                                                           weights, largest + 1);
      }
    }
    // Only where queries are pixels do those of a block share many corners.
    if (p.sum_pixels && p.Q == p.S && !p.largest && start_tiled(tiled.by_pixels, p, levels, stream)) return;
    if (start_tiled(p.largest ? tiled.fixed : tiled.by_corners, p, levels, stream)) return;
    backward_kernel<V, A><<<blocks_for(p.B * p.Q * p.M * kWarp), kThreads, 0, stream>>>(p, levels);
  });
}

const char* from_fixed_cuda(const Problem& p, void* grad_value_BSME, int device, void* on) {
  return launch(p, device, [&](auto value, auto sum, const Levels&) {
    using V = decltype(value);
    using A = decltype(sum);
    const int blocks = blocks_for(p.B * p.S * p.M * p.E);
    from_fixed_kernel<V, A><<<blocks, kThreads, 0, static_cast<cudaStream_t>(on)>>>(p,
                                                                                  static_cast<V*>(grad_value_BSME));
  });
}

const char* sum_heads_cuda(const Problem& p, void* sums_BQLN, int device, void* stream) {
  return launch(p, device, [&](auto, auto sum, const Levels&) {
    using A = decltype(sum);
    const int blocks = blocks_for(p.B * p.Q * p.L * p.N);
    sum_heads_kernel<A><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, static_cast<A*>(sums_BQLN));
  });
}

const char* assign_cuda(const Assignment& a, int device, void* stream) {
  constexpr int kFew = 256, kMany = 1024;  // threads
  const OnDevice guard(device);
  const dim3 grid(static_cast<unsigned>(a.B), static_cast<unsigned>(a.K));
  const auto start = [&](auto kernel, int threads) {
    kernel<<<grid, threads, kAssignShared, static_cast<cudaStream_t>(stream)>>>(a);
  };
  a.Q > kMany ? start(assign_kernel<kMany>, kMany) : start(assign_kernel<kFew>, kFew);
  return status();
}

}  // namespace tenfold
