// Which query explains which target: the assignment of least total cost, a block for each layer and image.
//
// Shortest augmenting paths (Crouse, "On implementing 2D rectangular assignment algorithms", 2016), as scipy's
// linear_sum_assignment has them, with the columns shared among the threads. In double: other results than scipy's are
// of the same total cost.
#pragma once

#include "generic.cuh"

namespace tenfold {
namespace {

constexpr double kUnreached = 1.7976931348623157e308;
constexpr int kNoColumn = 0x7fffffff;

// A column and the length of the shortest path to it; rank: the column, plus Q where it is taken already.
struct Nearest {
  double distance;
  int rank;
};

__device__ inline Nearest nearer(Nearest one, Nearest other) {
  if (one.distance != other.distance) return one.distance < other.distance ? one : other;
  return one.rank < other.rank ? one : other;
}

__device__ inline Nearest nearest_of_warp(Nearest own) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const double of_other = __shfl_xor_sync(0xffffffffu, own.distance, distance);
    own = nearer(own, {of_other, __shfl_xor_sync(0xffffffffu, own.rank, distance)});
  }
  return own;
}

constexpr int kAssignShared = kWarp * sizeof(Nearest) + sizeof(int);  // bytes

// The same for all threads. of_warps: shared, kWarp of them.
template <int kThreadsOfBlock>
__device__ Nearest nearest_of_block(Nearest own, Nearest* of_warps) {
  own = nearest_of_warp(own);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = own;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  own = lane < kThreadsOfBlock / kWarp ? of_warps[lane] : Nearest{kUnreached, kNoColumn};
  own = nearest_of_warp(own);
  __syncthreads();
  return own;
}

// Targets of the images before this one: image_N ascends.
__device__ inline int64_t targets_before(const Assignment& a, int64_t image) {
  int64_t low = 0, high = a.N;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    a.image_N[middle] < image ? low = middle + 1 : high = middle;
  }
  return low;
}

template <int kThreadsOfBlock>
__global__ void __launch_bounds__(kThreadsOfBlock) assign_kernel(const Assignment a) {
  const int64_t layer = blockIdx.y, image = blockIdx.x, first = targets_before(a, image);
  const int rows = static_cast<int>(targets_before(a, image + 1) - first), columns = static_cast<int>(a.Q);
  const int thread = static_cast<int>(threadIdx.x);
  const float* cost_NQ = a.cost_KNQ + (layer * a.N + first) * a.Q;
  int64_t* query_N = a.query_KN + layer * a.N + first;
  // In a search only the thread that has a column reads or writes its price, distance, before and done.
  const int64_t place = (layer * a.B + image) * a.Q;
  double *price_Q = a.price_KBQ + place, *distance_Q = a.distance_KBQ + place;
  double* price_N = a.price_KN + layer * a.N + first;
  int *before_Q = a.before_KBQ + place, *row_Q = a.row_KBQ + place, *done_Q = a.done_KBQ + place;
  auto* of_warps = reinterpret_cast<Nearest*>(shared_memory());
  int* unknown = reinterpret_cast<int*>(of_warps + kWarp);

  if (thread == 0) *unknown = rows > columns;
  __syncthreads();
  for (int64_t i = thread; i < rows * a.Q; i += kThreadsOfBlock) {
    const float none = cost_NQ[i] * 0;
    if (none != 0) *unknown = 1;
  }
  for (int column = thread; column < columns; column += kThreadsOfBlock) {
    price_Q[column] = 0, row_Q[column] = done_Q[column] = -1;
  }
  for (int row = thread; row < rows; row += kThreadsOfBlock) price_N[row] = 0, query_N[row] = -1;
  __syncthreads();
  if (*unknown) return;

  for (int row = 0; row < rows; ++row) {
    for (int column = thread; column < columns; column += kThreadsOfBlock) distance_Q[column] = kUnreached;
    Nearest found{0, kNoColumn};
    int at = row;
    for (;;) {
      const float* cost_Q = cost_NQ + at * a.Q;
      const double so_far = found.distance, price = price_N[at];
      Nearest own{kUnreached, kNoColumn};
      for (int column = thread; column < columns; column += kThreadsOfBlock) {
        if (done_Q[column] == row) continue;
        const double through = so_far + cost_Q[column] - price - price_Q[column];
        if (through < distance_Q[column]) distance_Q[column] = through, before_Q[column] = at;
        own = nearer(own, {distance_Q[column], row_Q[column] < 0 ? column : column + columns});
      }
      found = nearest_of_block<kThreadsOfBlock>(own, of_warps);
      const int column = found.rank % columns;
      if (column % kThreadsOfBlock == thread) done_Q[column] = row;
      if (found.rank < columns) break;
      at = row_Q[column];
    }
    for (int column = thread; column < columns; column += kThreadsOfBlock) {
      if (done_Q[column] != row) continue;
      const double less = found.distance - distance_Q[column];
      price_Q[column] -= less;
      if (row_Q[column] >= 0) price_N[row_Q[column]] += less;
    }
    __syncthreads();
    if (thread == 0) {
      price_N[row] += found.distance;
      for (int column = found.rank, changed = -1; changed != row;) {  // every row on the path takes the next column
        changed = before_Q[column];
        const int left = static_cast<int>(query_N[changed]);
        row_Q[column] = changed, query_N[changed] = column, column = left;
      }
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace tenfold
