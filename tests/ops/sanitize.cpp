// Every CPU kernel once over many shapes, on arrays that end where their tensors end, for `make sanitize`: compiled
// with AddressSanitizer and UBSan, which report what reads or writes outside. No numbers are compared here.

#include <algorithm>
#include <cstdio>
#include <vector>

#include "../../ops/csrc/cpu/kernels_of.h"
#include "problems.h"

using namespace tenfold;

namespace {

int run(const CpuKernels& kernels, Problem p) {
  const Dtype compute = p.dtype == Dtype::kDouble ? Dtype::kDouble : Dtype::kFloat;
  const Inputs inputs(p, compute, wild);
  Outputs outputs(p, compute);
  inputs.set(p), outputs.set(p);
  int status = 0;
  for (const int64_t groups : {int64_t{1}, int64_t{2}, p.M}) {
    for (const int64_t parts : {int64_t{1}, p.L}) {
      p.head_groups = groups, p.query_chunks = p.level_slices = parts;
      for (const bool repack : {false, true}) {
        if (repack && groups < p.M) continue;
        p.repack = repack;
        status |= all(kernels.forward, p, p.B * groups * parts);
        if (repack || p.dtype != Dtype::kBfloat16) status |= all(kernels.backward, p, p.B * groups * parts);
      }
    }
  }
  if (p.mode != Mode::kLocations) status |= all(kernels.softmax_rows, p, p.B * p.Q);
  return status;
}

template <class V>
void run_dropout(const CpuKernels& kernels, DropoutMode mode, Dtype dtype, int64_t count) {
  std::vector<V> x(count), other(count), out(count);
  Dropout d{mode, dtype, x.data(), other.data(), out.data(), 3, 1u << 30, 1.5f};
  if (mode == DropoutMode::kPlain || mode == DropoutMode::kRelu) d.other = nullptr;
  for (int64_t begin = 0; begin < count; begin += kDropoutBlock) {
    kernels.dropout(d, begin, std::min(begin + kDropoutBlock, count));
  }
}

}  // namespace

int main() {
  const std::vector<std::vector<Level>> pyramids = {
      {{1, 1, 0}}, {{6, 4, 0}, {3, 8, 24}}, {{5, 9, 0}, {2, 3, 45}, {1, 1, 51}, {1, 7, 52}, {3, 1, 59}}};
  int cases = 0, failed = 0;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    if (!choose_cpu_kernels(isa)) {
      std::printf("%s does not run here\n", isa);
      continue;
    }
    for (const auto mode : {DropoutMode::kPlain, DropoutMode::kRelu, DropoutMode::kAdd, DropoutMode::kGate}) {
      for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{15}, int64_t{64}, kDropoutBlock + 37}) {
        run_dropout<float>(cpu_kernels(), mode, Dtype::kFloat, count);
        run_dropout<uint16_t>(cpu_kernels(), mode, Dtype::kBfloat16, count);
        cases += 2;
      }
    }
    for (const auto& levels : pyramids) {
      for (const Dtype dtype : {Dtype::kFloat, Dtype::kBfloat16, Dtype::kDouble}) {
        for (const Mode mode : {Mode::kLocations, Mode::kPoints, Mode::kBoxes}) {
          for (const int64_t width : {1, 5, 16, 32, 37, 64, 70}) {
            for (const int64_t points : {1, 3, 4, 102}) {
              Problem p{};
              p.mode = mode, p.dtype = dtype, p.B = 2, p.M = 3, p.E = width, p.Q = 11, p.P = points;
              failed += run(cpu_kernels(), completed(p, levels)) != kDone;
              ++cases;
            }
          }
        }
      }
    }
  }
  std::printf("%d cases, %d failed\n", cases, failed);
  return failed != 0 || cases == 0;
}
