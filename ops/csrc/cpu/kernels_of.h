// The same kernels compiled for several instruction sets, and which of them this machine runs.
#pragma once

#include "../problem.h"

namespace tenfold {

constexpr int kDone = 0, kOutOfMemory = 1;

// What to do with each of the elements of x, of which those are kept whose 16 bits are not below the threshold: times
// scale, else 0. kRelu: of max(x, 0). kAdd: and add `other`. kGate: the backward of kRelu, whose result is `other`.
enum class DropoutMode { kPlain, kRelu, kAdd, kGate };

struct Dropout {
  DropoutMode mode;
  Dtype dtype;  // float or bfloat16
  const void *x, *other;
  void* out;  // may be x or other
  uint64_t seed;
  uint32_t threshold;
  float scale;
};

constexpr int64_t kDropoutBlock = 1 << 14;  // elements; every begin is a multiple

// Each takes items of the problem until none is left, on one thread of those that share `next`, which starts at 0;
// returns kDone or kOutOfMemory. Who takes an item changes no number.
struct CpuKernels {
  const char* isa;
  int (*forward)(const Problem&, int64_t* next, int64_t items);       // items: B * head_groups * query_chunks
  int (*backward)(const Problem&, int64_t* next, int64_t items);      // items: B * head_groups * level_slices
  int (*softmax_rows)(const Problem&, int64_t* next, int64_t items);  // items: B * Q
  void (*dropout)(const Dropout&, int64_t begin, int64_t end);        // elements
};

extern const CpuKernels kPortable;
#if defined(__x86_64__)
extern const CpuKernels kAvx2, kAvx512;
#endif

// The widest that runs here, unless choose_cpu_kernels() chose another.
const CpuKernels& cpu_kernels();

// isa: "avx512", "avx2", "portable", or "" for the widest. False, and nothing changes, where it cannot run here.
bool choose_cpu_kernels(const char* isa);

}  // namespace tenfold
