// Every CPU kernel once over many shapes, on arrays that end where their tensors end, for `make sanitize`: compiled
// with AddressSanitizer and UBSan, which report what reads or writes outside. No numbers are compared here.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../ops/csrc/cpu/kernels_of.h"

using namespace tenfold;

namespace {

std::mt19937 random_bits(0);

// Locations far outside, infinite and no numbers at all among ordinary ones.
double coordinate() {
  const double limit = std::numeric_limits<double>::infinity();
  const double special[] = {NAN, limit, -limit, 1e30, -1e30, 2147483648.0, -2147483649.0, 0, 1, -0.5, 1e-30};
  const unsigned bits = random_bits();
  if (bits % 8 == 0) return special[bits / 8 % (sizeof special / sizeof *special)];
  return std::normal_distribution<double>(0, 2)(random_bits);
}

struct Array {
  std::vector<char> bytes;
  Array(int64_t numbers, Dtype dtype, bool random) : bytes(numbers * size_of(dtype)) {
    if (!random) return;
    for (int64_t i = 0; i < numbers; ++i) {
      const double number = coordinate();
      const float narrow = static_cast<float>(number);
      char* to = bytes.data() + i * size_of(dtype);
      if (dtype == Dtype::kDouble) std::memcpy(to, &number, sizeof number);
      if (dtype == Dtype::kFloat) std::memcpy(to, &narrow, sizeof narrow);
      if (dtype == Dtype::kBfloat16) std::memcpy(to, reinterpret_cast<const char*>(&narrow) + 2, 2);
    }
  }
  static int64_t size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }
};

int run(const CpuKernels& kernels, Problem p, const std::vector<Level>& levels) {
  const Dtype compute = p.dtype == Dtype::kDouble ? Dtype::kDouble : Dtype::kFloat;
  p.levels_L = levels.data(), p.L = static_cast<int64_t>(levels.size());
  p.S = levels.back().start + levels.back().height * levels.back().width;
  p.N = p.mode == Mode::kLocations ? 0 : p.mode == Mode::kPoints ? 2 : 4;
  const int64_t rows = p.B * p.Q * p.M, points = rows * p.L * p.P;
  const Array value(p.B * p.S * p.M * p.E, p.dtype, true), grad_out(rows * p.E, p.dtype, true);
  const Array references(p.B * p.Q * p.L * p.N, compute, true), offsets(2 * points, compute, true);
  const Array weights(points, compute, true);
  Array out(rows * p.E, p.dtype, false), grad_value(p.B * p.S * p.M * p.E, p.dtype, false);
  Array grad_offsets(2 * points, compute, false), grad_weights(points, compute, false);
  Array grad_references(rows * p.L * p.N, compute, false);
  p.value_BSME = value.bytes.data(), p.references_BQLN = references.bytes.data();
  p.offsets_BQMLP2 = offsets.bytes.data(), p.weights_BQMLP = weights.bytes.data();
  p.out_BQME = out.bytes.data(), p.grad_out_BQME = grad_out.bytes.data();
  p.grad_value_BSME = grad_value.bytes.data(), p.grad_offsets_BQMLP2 = grad_offsets.bytes.data();
  p.grad_weights_BQMLP = grad_weights.bytes.data();
  p.grad_references_BMQLN = p.N ? grad_references.bytes.data() : nullptr;
  int status = 0;
  for (p.repack = false;; p.repack = true) {
    for (const int64_t parts : {int64_t{1}, p.L}) {
      p.query_chunks = p.level_slices = parts;
      status |= kernels.forward(p, 0, p.B * p.M * parts);
      status |= kernels.backward(p, 0, p.B * p.M * parts);
    }
    if (p.repack) break;
  }
  if (p.mode != Mode::kLocations) status |= kernels.softmax_rows(p, 0, rows);
  return status;
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
    for (const auto& levels : pyramids) {
      for (const Dtype dtype : {Dtype::kFloat, Dtype::kBfloat16, Dtype::kDouble}) {
        for (const Mode mode : {Mode::kLocations, Mode::kPoints, Mode::kBoxes}) {
          for (const int64_t width : {1, 5, 16, 32, 37, 64, 70}) {
            for (const int64_t points : {1, 3, 4, 102}) {
              Problem p{};
              p.mode = mode, p.dtype = dtype, p.B = 2, p.M = 3, p.E = width, p.Q = 11, p.P = points;
              failed += run(cpu_kernels(), p, levels) != kDone;
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
