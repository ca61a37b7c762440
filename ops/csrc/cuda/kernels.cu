// Starting the kernels.

#include "kernels.cuh"
#include "launch.h"

namespace tenfold {
namespace {

// The device of the tensors is the current one while this lives.
struct OnDevice {
  int before = -1;
  explicit OnDevice(int device) {
    cudaGetDevice(&before);
    cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before); }
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

}  // namespace

const char* forward_cuda(const Problem& p, int device, void* stream) {
  return launch(p, device, [&](auto value, auto sum, const Levels& levels) {
    using V = decltype(value);
    using A = decltype(sum);
    const int blocks = blocks_for(p.B * p.Q * p.M * p.E);
    forward_kernel<V, A><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, levels);
  });
}

const char* backward_cuda(const Problem& p, int device, void* stream) {
  return launch(p, device, [&](auto value, auto sum, const Levels& levels) {
    using V = decltype(value);
    using A = decltype(sum);
    const int blocks = blocks_for(p.B * p.Q * p.M * kWarp);
    backward_kernel<V, A><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, levels);
  });
}

const char* sum_heads_cuda(const Problem& p, void* sums_BQLN, int device, void* stream) {
  return launch(p, device, [&](auto, auto sum, const Levels&) {
    using A = decltype(sum);
    const int blocks = blocks_for(p.B * p.Q * p.L * p.N);
    sum_heads_kernel<A><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, static_cast<A*>(sums_BQLN));
  });
}

}  // namespace tenfold
