// What a GPU's memory bears, in the patterns of the operator: the ceilings that its figures are held against.
//
// Rows of 32 numbers, as a head has channels, in a slice that one head of one image takes; every group of lanes goes to
// rows of its own, at random over the slice or within a window that slides over it, as neighbouring queries do.
// Prints JSON. Started by benchmarks.op_gpu.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr int kThreads = 256, kRowsOfGroup = 64;
constexpr int kPixels = 22223, kHeads = 8, kChannels = 32;  // COCO at 800 x 1333

// Rows at random in a window of 2^kBits that slides over the slice, so that neighbouring groups share it: a multiply-add
// and a shift for each, or the instructions would be the ceiling.
template <int kBits>
struct Rows {
  unsigned from, seed;
  __device__ Rows(unsigned group, unsigned groups)
      : from(static_cast<unsigned>(static_cast<uint64_t>(group) * (kPixels - (1u << kBits)) / groups)),
        seed((group ^ group >> 7) * 0x7feb352du) {}
  __device__ unsigned operator[](int i) const { return from + ((seed + i * 2654435761u) >> (32 - kBits)); }
};

// kLanes lanes of 16 bytes read a row.
template <int kLanes, int kBits>
__global__ void gather(const uint4* slices, uint4* out) {
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x, group = thread / kLanes;
  const uint4* slice = slices + blockIdx.y * kLanes + thread % kLanes;  // heads lie beside each other
  const Rows<kBits> rows(group, gridDim.x * kThreads / kLanes);
  uint4 sum{};
#pragma unroll 8
  for (int i = 0; i < kRowsOfGroup; ++i) {
    const uint4 read = slice[rows[i] * (kHeads * kLanes)];
    sum.x ^= read.x, sum.y ^= read.y, sum.z ^= read.z, sum.w ^= read.w;
  }
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678u) out[thread] = sum;
}

// 8 lanes add a row: four numbers each, in one instruction or in four.
template <bool kVector, int kBits>
__global__ void add(float* slices) {
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x, group = thread / 8;
  const Rows<kBits> rows(group, gridDim.x * kThreads / 8);
  for (int i = 0; i < kRowsOfGroup; ++i) {
    float* to = slices + (rows[i] * kHeads + blockIdx.y) * kChannels + thread % 8 * 4;
#if __CUDA_ARCH__ >= 900
    constexpr bool kOne = kVector;
#else
    constexpr bool kOne = false;  // no such instruction
#endif
    if constexpr (kOne) {
      asm volatile("red.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(__cvta_generic_to_global(to)), "f"(1.0f)
                   : "memory");
    } else {
      for (int e = 0; e < 4; ++e) atomicAdd(to + e, 1.0f);
    }
  }
}

template <class Launch>
double median_ms(const Launch& launch) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  std::vector<float> times(9);
  launch();
  for (float& time : times) {
    cudaEventRecord(begin);
    launch();
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    cudaEventElapsedTime(&time, begin, end);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <int kBits>
void print_ceilings(void* memory, uint4* out, const char* where, const char* end) {
  const dim3 quads(512, kHeads), octets(1024, kHeads);
  const double rows_4 = double{kRowsOfGroup} * 512 * kHeads * kThreads / 4;
  const double rows_8 = double{kRowsOfGroup} * 1024 * kHeads * kThreads / 8;
  const auto* slices = static_cast<const uint4*>(memory);
  auto* sums = static_cast<float*>(memory);
  const double narrow = median_ms([&] { gather<4, kBits><<<quads, kThreads>>>(slices, out); });
  const double wide = median_ms([&] { gather<8, kBits><<<octets, kThreads>>>(slices, out); });
  const double vectors = median_ms([&] { add<true, kBits><<<octets, kThreads>>>(sums); });
  const double scalars = median_ms([&] { add<false, kBits><<<octets, kThreads>>>(sums); });
  std::printf("\"gather 64 byte rows %s, GB/s\": %.1f, ", where, rows_4 * 64 / narrow / 1e6);
  std::printf("\"gather 128 byte rows %s, GB/s\": %.1f, ", where, rows_8 * 128 / wide / 1e6);
  std::printf("\"add 128 byte rows by four %s, G numbers/s\": %.1f, ", where, rows_8 * kChannels / vectors / 1e6);
  std::printf("\"add 128 byte rows one by one %s, G numbers/s\": %.1f%s", where, rows_8 * kChannels / scalars / 1e6, end);
}

}  // namespace

int main() {
  void* memory = nullptr;
  const size_t bytes = size_t{4} * kPixels * kHeads * kChannels;
  if (cudaMalloc(&memory, bytes) || cudaMemset(memory, 0, bytes)) return std::fprintf(stderr, "no memory\n"), 1;
  uint4* out = nullptr;
  if (cudaMalloc(&out, size_t{1} << 26)) return std::fprintf(stderr, "no memory\n"), 1;
  std::printf("{");
  print_ceilings<14>(memory, out, "anywhere in a head", ", ");
  print_ceilings<10>(memory, out, "near each other", "}\n");
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) return std::fprintf(stderr, "%s\n", cudaGetErrorString(error)), 1;
  return 0;
}
