#include "kernels_of.h"

#include <atomic>
#include <cstring>

namespace tenfold {
namespace {

bool runs_here(const CpuKernels& kernels) {
#if defined(__x86_64__)
  if (&kernels == &kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (&kernels == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &kernels == &kPortable;
}

constexpr const CpuKernels* kWidestFirst[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#endif
    &kPortable};

const CpuKernels* find(const char* isa) {
  for (const CpuKernels* kernels : kWidestFirst) {
    if ((!*isa || !std::strcmp(isa, kernels->isa)) && runs_here(*kernels)) return kernels;
  }
  return nullptr;
}

std::atomic<const CpuKernels*>& chosen() {
  static std::atomic<const CpuKernels*> kernels{find("")};
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen().load(); }

bool choose_cpu_kernels(const char* isa) {
  const CpuKernels* kernels = find(isa);
  if (kernels) chosen().store(kernels);
  return kernels != nullptr;
}

}  // namespace tenfold
