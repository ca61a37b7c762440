// The arithmetic of one sampling point, written once for the kernels of every device: what the tests exercise on
// a CPU is what runs on a GPU.
//
// T is float or double, or on a CPU a vector of them with one point in each lane. Hence `?:` on the result of a
// comparison, which both have, instead of branches.
//
// A coordinate is in pixels of its level: 0 is the centre of the first pixel. Outside of the map there are zeros.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define TENFOLD_HD static __host__ __device__ __forceinline__
#else
// Never shared by the linker: the CPU kernels are compiled once for each instruction set, and a common copy would
// bring AVX-512 into the portable ones.
#define TENFOLD_HD static inline __attribute__((always_inline))
#endif

namespace tenfold {

// What vectors need words for; cpu/simd.h has it for them.
template <class T>
struct Real {
  using Scalar = T;
  using Index = int;
  TENFOLD_HD T all(T number) { return number; }
  TENFOLD_HD Index truncate(T number) { return static_cast<Index>(number); }
  TENFOLD_HD T floor(T number) { return ::floor(number); }
};

// pixel = offset * scale + origin, along one axis. That is a point in each of its three descriptions.
template <class T>
struct Frame {
  T origin, scale;
};

// A location in [0, 1] over the level takes the place of the offset.
template <class T>
TENFOLD_HD Frame<T> over_level(T size) {
  return {Real<T>::all(-0.5f), size};
}

// The offset is in pixels of the level.
template <class T>
TENFOLD_HD Frame<T> around_point(T reference, T size) {
  return {reference * size - 0.5f, Real<T>::all(1)};
}

// An offset of num_points is half of the box.
template <class T>
TENFOLD_HD Frame<T> around_box(T center, T extent, T size, typename Real<T>::Scalar half_over_points) {
  return {center * size - 0.5f, extent * size * half_over_points};
}

// The two pixels beside a coordinate, along one axis.
template <class T>
struct Axis {
  typename Real<T>::Index near, far;  // clamped into the map: reading there is always allowed
  T near_weight, far_weight;          // of linear interpolation; 0 where the pixel is outside
  T near_slope, far_slope;            // the derivatives of the weights by the coordinate
};

// size: pixels of the map along this axis, at least 1. Any coordinate is allowed: NaN and what lies a pixel or more
// outside (1e30, infinity) get no weight and no gradient.
template <class T>
TENFOLD_HD Axis<T> axis(T pixel, T size) {
  using Index = typename Real<T>::Index;
  const T zero = Real<T>::all(0), one = Real<T>::all(1);
  const T first = Real<T>::all(-2), last = size + one;
  pixel = pixel > first ? pixel : first;  // in this order: a comparison with NaN is false
  pixel = pixel < last ? pixel : last;
  const T low = Real<T>::floor(pixel), fraction = pixel - low;
  const Index begin = Real<T>::truncate(low), next = begin + 1, end = Real<T>::truncate(size) - 1, none = end - end;
  Index near = begin < end ? begin : end, far = next < end ? next : end;
  near = near > none ? near : none, far = far > none ? far : none;
  const auto near_inside = near == begin, far_inside = far == next;
  return {
      near,
      far,
      near_inside ? one - fraction : zero,
      far_inside ? fraction : zero,
      near_inside ? -one : zero,
      far_inside ? one : zero,
  };
}

// What the loss gains from a sample's weight and coordinates, but for the attention weight in x and y.
template <class T>
struct PointGrad {
  T sample, x, y;
};

// dots: scalar products of the output's gradient with the rows of the four corners, in the order
// (y near, x near), (y near, x far), (y far, x near), (y far, x far).
template <class T>
TENFOLD_HD PointGrad<T> point_grad(const Axis<T>& x, const Axis<T>& y, T dot0, T dot1, T dot2, T dot3) {
  const T near = x.near_weight * dot0 + x.far_weight * dot1, far = x.near_weight * dot2 + x.far_weight * dot3;
  const T near_x = x.near_slope * dot0 + x.far_slope * dot1, far_x = x.near_slope * dot2 + x.far_slope * dot3;
  return {
      y.near_weight * near + y.far_weight * far,
      y.near_weight * near_x + y.far_weight * far_x,
      y.near_slope * near + y.far_slope * far,
  };
}

// gradient * factor, but 0 for a point outside, even where its infinite coordinate made the factor infinite or NaN.
template <class T>
TENFOLD_HD T chain(T gradient, T factor) {
  const T zero = Real<T>::all(0);
  return gradient == zero ? zero : gradient * factor;
}

}  // namespace tenfold
