// Problems for the kernels, in arrays that end where their tensors end.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../ops/csrc/problem.h"

namespace tenfold {

inline std::mt19937 random_bits(0);

// Locations far outside, infinite and no numbers at all among ordinary ones.
inline double wild() {
  const double limit = std::numeric_limits<double>::infinity();
  const double special[] = {NAN, limit, -limit, 1e30, -1e30, 2147483648.0, -2147483649.0, 0, 1, -0.5, 1e-30};
  const unsigned bits = random_bits();
  if (bits % 8 == 0) return special[bits / 8 % (sizeof special / sizeof *special)];
  return std::normal_distribution<double>(0, 2)(random_bits);
}

inline double tame() { return std::normal_distribution<double>(0.5, 1)(random_bits); }

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

struct Array {
  Dtype dtype;
  std::vector<char> bytes;
  Array(int64_t numbers, Dtype dtype, double (*draw)() = nullptr) : dtype(dtype), bytes(numbers * size_of(dtype)) {
    for (int64_t i = 0; draw && i < numbers; ++i) {
      const double number = draw();
      const float narrow = static_cast<float>(number);
      char* to = bytes.data() + i * size_of(dtype);
      if (dtype == Dtype::kDouble) std::memcpy(to, &number, sizeof number);
      if (dtype == Dtype::kFloat) std::memcpy(to, &narrow, sizeof narrow);
      if (dtype == Dtype::kBfloat16) std::memcpy(to, reinterpret_cast<const char*>(&narrow) + 2, 2);
    }
  }
};

inline Problem completed(Problem p, const std::vector<Level>& levels) {
  p.levels_L = levels.data(), p.L = static_cast<int64_t>(levels.size());
  p.S = levels.back().start + levels.back().height * levels.back().width;
  p.N = p.mode == Mode::kLocations ? 0 : p.mode == Mode::kPoints ? 2 : 4;
  p.head_groups = p.query_chunks = p.level_slices = 1;
  return p;
}

struct Inputs {
  Array value, grad_out, references, offsets, weights;
  Inputs(const Problem& p, Dtype compute, double (*draw)())
      : value(p.B * p.S * p.M * p.E, p.dtype, draw),
        grad_out(p.B * p.Q * p.M * p.E, p.dtype, draw),
        references(p.B * p.Q * p.L * p.N, compute, draw),
        offsets(2 * p.B * p.Q * p.M * p.L * p.P, compute, draw),
        weights(p.B * p.Q * p.M * p.L * p.P, compute, draw) {}
  void set(Problem& p) const {
    p.value_BSME = value.bytes.data(), p.grad_out_BQME = grad_out.bytes.data();
    p.references_BQLN = references.bytes.data();
    p.offsets_BQMLP2 = offsets.bytes.data(), p.weights_BQMLP = weights.bytes.data();
  }
};

struct Outputs {
  Array out, grad_value, grad_offsets, grad_weights, grad_references;
  Outputs(const Problem& p, Dtype compute)
      : out(p.B * p.Q * p.M * p.E, p.dtype),
        grad_value(p.B * p.S * p.M * p.E, p.dtype),
        grad_offsets(2 * p.B * p.Q * p.M * p.L * p.P, compute),
        grad_weights(p.B * p.Q * p.M * p.L * p.P, compute),
        grad_references(p.B * p.Q * p.M * p.L * p.N, compute) {}
  void set(Problem& p) {
    p.out_BQME = out.bytes.data(), p.grad_value_BSME = grad_value.bytes.data();
    p.grad_offsets_BQMLP2 = grad_offsets.bytes.data(), p.grad_weights_BQMLP = grad_weights.bytes.data();
    p.grad_references_BMQLN = p.N ? grad_references.bytes.data() : nullptr;
  }
};

// A kernel over all items.
inline int all(int (*kernel)(const Problem&, int64_t*, int64_t), const Problem& p, int64_t items) {
  int64_t next = 0;
  return kernel(p, &next, items);
}

}  // namespace tenfold
