// Kernels for every shape and type, float64 too. Plain: the arithmetic of a point is the CPU kernels', from point.h.
//
// In names: A is the type of coordinates and sums, V the type of value. With TENFOLD_EMULATED a C++ compiler takes
// this, so that a machine without a GPU can run it: tests/ops/emulated_gpu.h.
#pragma once

#ifndef TENFOLD_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cmath>

#include "../point.h"
#include "../problem.h"

namespace tenfold {
namespace {

constexpr int kMaxLevels = 64;
constexpr int kThreads = 256, kWarp = 32;

struct Levels {
  Level level[kMaxLevels];
};

template <class A, class V>
__device__ A to_sum(V number) {
  return static_cast<A>(number);
}
template <class V, class A>
__device__ V to_value(A number) {
  return static_cast<V>(number);
}
#ifdef TENFOLD_EMULATED
template <>
float to_sum(bfloat16 number) {
  return to_real(number);
}
template <>
bfloat16 to_value(float number) {
  bfloat16 value;
  set(value, number);
  return value;
}
#else
__device__ inline char* shared_memory() {
  extern __shared__ uint4 bytes[];
  return reinterpret_cast<char*>(bytes);
}
template <>
__device__ float to_sum(__nv_bfloat16 number) {
  return __bfloat162float(number);
}
template <>
__device__ float to_sum(__half number) {
  return __half2float(number);
}
template <>
__device__ __nv_bfloat16 to_value(float number) {
  return __float2bfloat16(number);
}
template <>
__device__ __half to_value(float number) {
  return __float2half(number);
}
#endif

// A point of one query and head, ready to be read.
template <class A>
struct Sample {
  Axis<A> x, y;
  Frame<A> frame_x, frame_y;
  A offset_x, offset_y;
  int pixel[4];  // of the corners (near y, near x), (near y, far x), (far, near), (far, far)
};

template <class A>
__device__ Sample<A> sample_of(const Problem& p, const Level& level, int64_t query, int64_t row, int l, int k) {
  Sample<A> at;
  const A width = static_cast<A>(level.width), height = static_cast<A>(level.height);
  const A* offset = static_cast<const A*>(p.offsets_BQMLP2) + 2 * (row + k);
  at.offset_x = offset[0], at.offset_y = offset[1];
  if (p.mode == Mode::kLocations) {
    at.frame_x = over_level(width), at.frame_y = over_level(height);
  } else {
    const A* reference = static_cast<const A*>(p.references_BQLN) + (query * p.L + l) * p.N;
    if (p.mode == Mode::kPoints) {
      at.frame_x = around_point(reference[0], width), at.frame_y = around_point(reference[1], height);
    } else {
      const A half_over_points = A(0.5) / static_cast<A>(p.P);
      at.frame_x = around_box(reference[0], reference[2], width, half_over_points);
      at.frame_y = around_box(reference[1], reference[3], height, half_over_points);
    }
  }
  at.x = axis<A>(at.offset_x * at.frame_x.scale + at.frame_x.origin, width);
  at.y = axis<A>(at.offset_y * at.frame_y.scale + at.frame_y.origin, height);
  const int upper = level.start + at.y.near * level.width, lower = level.start + at.y.far * level.width;
  at.pixel[0] = upper + at.x.near, at.pixel[1] = upper + at.x.far;
  at.pixel[2] = lower + at.x.near, at.pixel[3] = lower + at.x.far;
  return at;
}

// weight(k) = exp(logits[k] - largest) * scale, or the weights as they are given.
template <class A>
struct Attention {
  const A* given;
  A largest, scale;
  bool logits;

  __device__ Attention(const Problem& p, int64_t row) : given(static_cast<const A*>(p.weights_BQMLP) + row) {
    logits = p.mode != Mode::kLocations;
    if (!logits) return;
    largest = given[0];
    for (int k = 1; k < p.L * p.P; ++k) largest = given[k] > largest ? given[k] : largest;
    A total = 0;
    for (int k = 0; k < p.L * p.P; ++k) total += exp(given[k] - largest);
    scale = 1 / total;
  }
  __device__ A weight(int k) const { return logits ? exp(given[k] - largest) * scale : given[k]; }
};

// A thread for each channel of the output.
template <class V, class A>
__global__ void forward_kernel(const Problem p, const Levels levels) {
  const int64_t channels = p.M * p.E;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.B * p.Q * channels;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t query = i / channels, channel = i % channels, image = query / p.Q;
    const int64_t row = (query * p.M + channel / p.E) * p.L * p.P;
    const V* value = static_cast<const V*>(p.value_BSME) + image * p.S * channels + channel;
    const Attention<A> attention(p, row);
    A sum = 0;
    for (int l = 0, k = 0; l < p.L; ++l) {
      for (int point = 0; point < p.P; ++point, ++k) {
        const Sample<A> at = sample_of<A>(p, levels.level[l], query, row, l, k);
        const A near = at.y.near_weight, far = at.y.far_weight;
        const A weights[4] = {near * at.x.near_weight, near * at.x.far_weight, far * at.x.near_weight,
                              far * at.x.far_weight};
        A here = 0;
        for (int c = 0; c < 4; ++c) here += weights[c] * to_sum<A>(value[at.pixel[c] * channels]);
        sum += attention.weight(k) * here;
      }
    }
    static_cast<V*>(p.out_BQME)[i] = to_value<V>(sum);
  }
}

// The sums of a deterministic backward are integers: gradients times a power of two that their largest possible sum
// bears. Attention weights after a softmax add up to 1 for a query, and a point's corners to no more than its weight.
template <class A>
__device__ A fixed_scale(const Problem& p) {
  const A* largest = static_cast<const A*>(p.largest);
  // In double, which holds what sums of floats may overflow.
  const double weights = p.mode == Mode::kLocations ? static_cast<double>(largest[1]) * static_cast<double>(p.L * p.P) : 1;
  const double bound = static_cast<double>(largest[0]) * weights * static_cast<double>(p.Q);
  if (!(bound > 0) || !(bound < INFINITY)) return 1;
  const int exponent = 61 - ilogb(bound), most = sizeof(A) == 8 ? 1000 : 120;
  return static_cast<A>(ldexp(1.0, exponent < most ? exponent : most));
}

template <class A>
__device__ void add_fixed(void* sums, int64_t element, A scaled) {
  atomicAdd(static_cast<unsigned long long*>(sums) + element, static_cast<unsigned long long>(llrint(scaled)));
}

__device__ inline unsigned bits_of(float number) { return __float_as_uint(number); }
__device__ inline unsigned long long bits_of(double number) {
  return static_cast<unsigned long long>(__double_as_longlong(number));
}

// An attention weight that is no number leaves its mark, which an integer could not.
template <class A>
__device__ void mark_unknown(const Problem& p, A weight) {
  if (weight == weight) return;
  using Bits = decltype(bits_of(A()));
  atomicMax(static_cast<Bits*>(p.largest) + 1, bits_of(weight) & (~Bits{0} >> 1));
}

// The largest magnitude of some numbers; NaN where there is one. As integers, positive numbers have the same order.
template <class V, class A>
__global__ void largest_kernel(const V* numbers, int64_t count, A* largest) {
  using Bits = decltype(bits_of(A()));
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const A number = to_sum<A>(numbers[i]);
    const Bits bits = bits_of(number < 0 ? -number : number) & (~Bits{0} >> 1);
    if (bits > *reinterpret_cast<const volatile Bits*>(largest)) atomicMax(reinterpret_cast<Bits*>(largest), bits);
  }
}

// grad_value from its integers.
template <class V, class A>
__global__ void from_fixed_kernel(const Problem p, V* grad_value) {
  const auto* sums = static_cast<const long long*>(p.grad_value_BSME);
  const A* largest = static_cast<const A*>(p.largest);
  const A scale = fixed_scale<A>(p), unknown = (largest[0] + largest[1]) * 0;  // NaN where one is not finite
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.B * p.S * p.M * p.E;
       i += int64_t{gridDim.x} * kThreads) {
    grad_value[i] = to_value<V>(static_cast<A>(sums[i] / static_cast<double>(scale)) + unknown);
  }
}

template <class A>
__device__ A sum_of_warp(A number) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(0xffffffffu, number, distance);
  }
  return number;
}

// Scalar products of the row of grad_out with those of the corners, and the weighted row added to grad_value.
// first: element of grad_value where the image and head begin.
template <class V, class A>
__device__ void scatter(const Problem& p, const Sample<A>& at, A weight, const V* value, const V* grad_out,
                        int64_t first, A scale, A (&dots)[4]) {
  const int64_t channels = p.M * p.E;
  const A near = weight * at.y.near_weight, far = weight * at.y.far_weight;
  const A weights[4] = {near * at.x.near_weight, near * at.x.far_weight, far * at.x.near_weight,
                        far * at.x.far_weight};
  for (int c = 0; c < 4; ++c) {
    A dot = 0;
    for (int64_t e = threadIdx.x % kWarp; e < p.E; e += kWarp) {
      const A grad = to_sum<A>(grad_out[e]);
      dot += grad * to_sum<A>(value[at.pixel[c] * channels + e]);
      if (weights[c] == 0) continue;
      const int64_t element = first + at.pixel[c] * channels + e;
      if (p.largest) {
        add_fixed(p.grad_value_BSME, element, weights[c] * grad * scale);  // in this order: the product has a bound
      } else {
        atomicAdd(static_cast<A*>(p.grad_value_BSME) + element, weights[c] * grad);
      }
    }
    dots[c] = sum_of_warp(dot);
  }
}

// A warp for each query and head, a lane for each channel; what is one number for a point, lane 0 writes.
template <class V, class A>
__global__ void backward_kernel(const Problem p, const Levels levels) {
  const int64_t channels = p.M * p.E, warps = int64_t{gridDim.x} * (kThreads / kWarp);
  const bool writes = threadIdx.x % kWarp == 0;
  const A scale = p.largest ? fixed_scale<A>(p) : A(1);
  for (int64_t i = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp; i < p.B * p.Q * p.M; i += warps) {
    const int64_t query = i / p.M, head = i % p.M, image = query / p.Q, q = query % p.Q, row = i * p.L * p.P;
    const int64_t first = image * p.S * channels + head * p.E;
    const V* value = static_cast<const V*>(p.value_BSME) + first;
    const V* grad_out = static_cast<const V*>(p.grad_out_BQME) + i * p.E;
    A* grad_offsets = static_cast<A*>(p.grad_offsets_BQMLP2) + 2 * row;
    A* grad_weights = static_cast<A*>(p.grad_weights_BQMLP) + row;
    A* grad_references = static_cast<A*>(p.grad_references_BMQLN);
    const Attention<A> attention(p, row);
    A common = 0;
    for (int l = 0, k = 0; l < p.L; ++l) {
      const A width = static_cast<A>(levels.level[l].width), height = static_cast<A>(levels.level[l].height);
      A references[4] = {0, 0, 0, 0};
      for (int point = 0; point < p.P; ++point, ++k) {
        const Sample<A> at = sample_of<A>(p, levels.level[l], query, row, l, k);
        const A weight = attention.weight(k);
        if (p.largest) mark_unknown(p, weight);
        A dots[4];
        scatter<V, A>(p, at, weight, value, grad_out, first, scale, dots);
        const PointGrad<A> grad = point_grad(at.x, at.y, dots[0], dots[1], dots[2], dots[3]);
        const A x = chain(grad.x, weight), y = chain(grad.y, weight);
        common += weight * grad.sample;
        const A half_over_points = A(0.5) / static_cast<A>(p.P);
        references[0] += x * width, references[1] += y * height;
        references[2] += chain(x * width, at.offset_x * half_over_points);
        references[3] += chain(y * height, at.offset_y * half_over_points);
        if (writes) {
          grad_offsets[2 * k] = chain(x, at.frame_x.scale), grad_offsets[2 * k + 1] = chain(y, at.frame_y.scale);
          grad_weights[k] = grad.sample;
        }
      }
      if (writes && grad_references) {
        A* to = grad_references + (((image * p.M + head) * p.Q + q) * p.L + l) * p.N;
        for (int n = 0; n < p.N; ++n) to[n] = references[n];
      }
    }
    if (writes && attention.logits) {
      for (int k = 0; k < p.L * p.P; ++k) grad_weights[k] = attention.weight(k) * (grad_weights[k] - common);
    }
  }
}

template <class A>
__global__ void sum_heads_kernel(const Problem p, A* sums_BQLN) {
  const int64_t block = p.Q * p.L * p.N;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.B * block; i += int64_t{gridDim.x} * kThreads) {
    const A* first = static_cast<const A*>(p.grad_references_BMQLN) + i / block * p.M * block + i % block;
    A sum = 0;
    for (int64_t m = 0; m < p.M; ++m) sum += first[m * block];
    sums_BQLN[i] = sum;
  }
}

}  // namespace
}  // namespace tenfold
