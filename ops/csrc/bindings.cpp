// The operators of torch.ops.tenfold, on torch's stable ABI: one library for torch 2.10 and later and every Python.
//
// ops/ms_deform_attn.py checks arguments in the caller's terms. Here everything is checked again that would make a
// kernel read or write outside, since these operators can be called directly. Fake tensors, autograd: ops/library.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/kernels_of.h"
#include "cpu/pages.h"
#include "problem.h"

#ifdef TENFOLD_CUDA_ARCHS
#include "cuda/launch.h"
#endif

// B image, S pixel of all levels, M head, E channel of a head, Q query, L level, P point, N = 2 or 4 numbers of a
// reference

namespace tenfold {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shown(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}

Sizes sizes_of(const Tensor& tensor) { return Sizes(tensor.sizes().begin(), tensor.sizes().end()); }

void check_shape(const char* name, const Tensor& tensor, const Sizes& expected) {
  const Sizes found = sizes_of(tensor);
  if (found != expected) {
    fail(name, ": shape ", shown(found.data(), found.size()), ", expected ", shown(expected.data(), expected.size()));
  }
}

void check_like(const char* name, const Tensor& tensor, const Tensor& value, ScalarType dtype) {
  if (tensor.device() != value.device()) fail(name, ": on another device than value, expected the same");
  if (tensor.scalar_type() != dtype) {
    fail(name, ": ", torch::headeronly::toString(tensor.scalar_type()), ", expected ",
         torch::headeronly::toString(dtype));
  }
}

Dtype dtype_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    case ScalarType::Half:
      if (!value.is_cpu()) return Dtype::kHalf;
      [[fallthrough]];
    default:
      fail("value: ", torch::headeronly::toString(value.scalar_type()), ", expected Float, BFloat16 or Double",
           value.is_cpu() ? "" : " or Half");
  }
}

std::vector<Level> levels_of(const Sizes& spatial_shapes) {
  if (spatial_shapes.empty() || spatial_shapes.size() % 2) {
    fail("spatial_shapes: ", spatial_shapes.size(), " integers, expected H, W of each level");
  }
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i], width = spatial_shapes[i + 1];
    if (height < 1 || width < 1 || height > kMaxSide || width > kMaxSide) {
      fail("spatial_shapes: ", height, " x ", width, ", expected 1 to ", kMaxSide);
    }
    levels.push_back({static_cast<int>(height), static_cast<int>(width), static_cast<int>(start)});
    start += height * width;
    if (start > INT32_MAX) fail("spatial_shapes: ", start, " pixels and more, expected at most ", INT32_MAX);
  }
  return levels;
}

// The tensors that a problem's addresses point into, and the problem.
struct Call {
  std::vector<Level> levels;
  Tensor value, references, offsets, weights, grad_out;
  Problem p{};

  // references: not read in mode kLocations. The arguments in the order of the operators.
  Call(Mode mode, const Tensor& value_BSME, const Sizes& spatial_shapes, const Tensor& references_BQLN,
       const Tensor& offsets_BQMLP2, const Tensor& weights)
      : levels(levels_of(spatial_shapes)), value(value_BSME), references(references_BQLN), offsets(offsets_BQMLP2),
        weights(weights), grad_out(value_BSME) {
    p.mode = mode;
    p.dtype = dtype_of(value);
    const Sizes value_sizes = sizes_of(value), offset_sizes = sizes_of(offsets);
    if (value_sizes.size() != 4) fail("value: ", value_sizes.size(), " axes, expected (B, S, M, E)");
    const char* offsets_name = mode == Mode::kLocations ? "sampling_locations" : "sampling_offsets";
    if (offset_sizes.size() != 6) fail(offsets_name, ": ", offset_sizes.size(), " axes, expected (B, Q, M, L, P, 2)");
    p.B = value_sizes[0], p.S = value_sizes[1], p.M = value_sizes[2], p.E = value_sizes[3];
    p.Q = offset_sizes[1], p.L = static_cast<int64_t>(levels.size()), p.P = offset_sizes[4];
    check_sizes(offsets_name);
    check_shape(offsets_name, offsets, {p.B, p.Q, p.M, p.L, p.P, 2});
    const ScalarType compute = p.dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float;
    check_like(offsets_name, offsets, value, compute);
    if (mode == Mode::kLocations) {
      check_shape("attention_weights", weights, {p.B, p.Q, p.M, p.L, p.P});
      check_like("attention_weights", weights, value, compute);
    } else {
      check_shape("attention_logits", weights, {p.B, p.Q, p.M, p.L * p.P});
      check_like("attention_logits", weights, value, compute);
      const Sizes reference_sizes = sizes_of(references);
      p.N = reference_sizes.empty() ? 0 : reference_sizes.back();
      if (p.N != 2 && p.N != 4) fail("reference_points: ", p.N, " numbers each, expected 2 or 4");
      p.mode = p.N == 2 ? Mode::kPoints : Mode::kBoxes;
      check_shape("reference_points", references, {p.B, p.Q, p.L, p.N});
      check_like("reference_points", references, value, compute);
    }
    set_addresses();
  }

  void set_grad_out(const Tensor& grad_BQD) {
    check_shape("grad", grad_BQD, {p.B, p.Q, p.M * p.E});
    check_like("grad", grad_BQD, value, value.scalar_type());
    grad_out = torch::stable::contiguous(grad_BQD);
    p.grad_out_BQME = grad_out.const_data_ptr();
  }

  bool nothing_to_do() const { return p.B == 0 || p.Q == 0; }

 private:
  void check_sizes(const char* offsets_name) const {
    const Level& last = levels.back();
    const int64_t pixels = last.start + static_cast<int64_t>(last.height) * last.width;
    if (p.S != pixels) fail("value: S = ", p.S, ", expected ", pixels, ", the sum of H*W in spatial_shapes");
    if (p.M < 1 || p.E < 1) fail("value: M = ", p.M, ", E = ", p.E, ", expected at least 1");
    if (p.M > INT32_MAX / p.S || p.E > INT32_MAX / (p.S * p.M)) {
      fail("value: ", p.S, " x ", p.M, " x ", p.E, " numbers an image, expected at most ", INT32_MAX);
    }
    if (p.P < 1 || p.P > kMaxPoints / p.L) {
      fail(offsets_name, ": L = ", p.L, ", P = ", p.P, ", expected L*P of 1 to ", kMaxPoints);
    }
  }

  void set_addresses() {
    value = torch::stable::contiguous(value);
    offsets = torch::stable::contiguous(offsets);
    weights = torch::stable::contiguous(weights);
    p.levels_L = levels.data();
    p.value_BSME = value.const_data_ptr();
    p.offsets_BQMLP2 = offsets.const_data_ptr();
    p.weights_BQMLP = weights.const_data_ptr();
    if (p.mode != Mode::kLocations) {
      references = torch::stable::contiguous(references);
      p.references_BQLN = references.const_data_ptr();
    }
    // Worth it where rows are read several times; a row of one head may lie a multiple of 4096 bytes from the next,
    // which keeps a cache from holding many.
    p.repack = p.M > 1 && p.Q * 8 >= p.S;
    p.head_groups = p.query_chunks = p.level_slices = 1;
  }
};

// --- CPU ---

using Kernel = int (*)(const Problem&, int64_t*, int64_t);

// Threads take item after item: one that the system interrupts does not hold the others up for long.
void in_parallel(const Problem& p, Kernel kernel, int64_t items, int64_t work_of_item) {
  constexpr int64_t kWorthAThread = 1 << 16;  // multiply-adds
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + items * work_of_item / kWorthAThread);
  int64_t next = 0;
  std::atomic<int> status{kDone};
  torch::stable::parallel_for(0, std::min(threads, items), 1, [&](int64_t begin, int64_t end) {
    const int result = begin < end ? kernel(p, &next, items) : kDone;
    if (result != kDone) status = result;
  });
  if (status != kDone) fail("out of memory for ", p.S, " x ", p.E, " sums a thread");
}

int64_t parts_for(int64_t threads, int64_t items) { return (threads + items - 1) / items; }

void forward_cpu(Problem& p) {
  p.head_groups = p.repack ? p.M : 1;
  const int64_t items = p.B * p.head_groups;
  p.query_chunks = std::min(parts_for(4 * torch::stable::get_num_threads(), items), 1 + p.Q / 32);
  const int64_t work = p.Q * p.L * p.P * p.M * p.E * 4 / p.head_groups / p.query_chunks;
  in_parallel(p, cpu_kernels().forward, items * p.query_chunks, work);
}

void backward_cpu(Problem& p) {
  const int64_t threads = torch::stable::get_num_threads();
  p.head_groups = p.repack ? p.M : std::min(parts_for(threads, p.B), p.M);
  const int64_t items = p.B * p.head_groups;
  p.level_slices = std::min(parts_for(threads, items), p.L);
  const int64_t work = (p.Q * p.P * 8 + p.S) * p.L * p.M * p.E / p.head_groups / p.level_slices;
  const CpuKernels& kernels = cpu_kernels();
  in_parallel(p, kernels.backward, items * p.level_slices, work);
  if (p.mode != Mode::kLocations && p.level_slices > 1) {
    in_parallel(p, kernels.softmax_rows, p.B * p.Q, p.M * p.L * p.P * 16);
  }
}

// (B, M, Q, L, N) -> (B, Q, L, N), heads in their order.
template <class A>
void sum_heads(const Problem& p, A* sums_BQLN) {
  const int64_t block = p.Q * p.L * p.N;
  const A* of_heads = static_cast<const A*>(p.grad_references_BMQLN);
  for (int64_t i = 0; i < p.B * block; ++i) {
    const A* first = of_heads + i / block * p.M * block + i % block;
    A sum = 0;
    for (int64_t m = 0; m < p.M; ++m) sum += first[m * block];
    sums_BQLN[i] = sum;
  }
}

// --- CUDA ---

#ifdef TENFOLD_CUDA_ARCHS
// Of torch's C shim, where torch has CUDA; weak, so that the library also loads beside a torch without.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

void check_launch(const char* problem) {
  if (problem) fail("CUDA: ", problem);
}

bool sum_pixels = true;

struct CudaStream {
  int device;
  void* stream = nullptr;
  explicit CudaStream(const Tensor& tensor) : device(tensor.get_device_index()) {
    if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(device, &stream)) {
      fail("CUDA: torch gives no stream of device ", device);
    }
  }
};
#endif

// --- The operators ---

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  if (!like.is_cpu()) return torch::stable::new_empty(like, sizes, dtype);
  Tensor tensor;
  try {
    tensor = torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::exception&) {  // whose words name no cause
    fail("out of memory for ", shown(sizes.data(), sizes.size()), " of ", torch::headeronly::toString(dtype));
  }
  use_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}
Tensor empty(const Tensor& like, const Sizes& sizes) { return empty(like, sizes, like.scalar_type()); }

Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Tensor tensor = empty(like, sizes, dtype);
  torch::stable::zero_(tensor);
  return tensor;
}
Tensor zeros(const Tensor& like, const Sizes& sizes) { return zeros(like, sizes, like.scalar_type()); }

Tensor forward(Call& call) {
  Problem& p = call.p;
  const Tensor out_BQD = empty(call.value, {p.B, p.Q, p.M * p.E});
  if (call.nothing_to_do()) return out_BQD;
  p.out_BQME = out_BQD.mutable_data_ptr();
#ifdef TENFOLD_CUDA_ARCHS
  if (call.value.is_cuda()) {
    const CudaStream at(call.value);
    check_launch(forward_cuda(p, at.device, at.stream));
    return out_BQD;
  }
#endif
  forward_cpu(p);
  return out_BQD;
}

struct Grads {
  Tensor value, references, offsets, weights;
};

void backward_on_cpu(Problem& p, const Grads& grads) {
  backward_cpu(p);
  if (!p.grad_references_BMQLN) return;
  void* sums = grads.references.mutable_data_ptr();
  p.dtype == Dtype::kDouble ? sum_heads(p, static_cast<double*>(sums)) : sum_heads(p, static_cast<float*>(sums));
}

void backward_on_cuda([[maybe_unused]] Problem& p, [[maybe_unused]] const Grads& grads) {
#ifdef TENFOLD_CUDA_ARCHS
  const CudaStream at(grads.value);
  p.sum_pixels = sum_pixels;
  check_launch(backward_cuda(p, at.device, at.stream));
  if (p.largest) check_launch(from_fixed_cuda(p, grads.value.mutable_data_ptr(), at.device, at.stream));
  if (!p.grad_references_BMQLN) return;
  check_launch(sum_heads_cuda(p, grads.references.mutable_data_ptr(), at.device, at.stream));
#endif
}

// deterministic: the same bits from the same arguments, which on a CPU is always so.
Grads backward(Call& call, bool references_too, bool deterministic) {
  Problem& p = call.p;
  const bool cpu = call.value.is_cpu(), fixed = deterministic && !cpu && !call.nothing_to_do();
  // The CPU kernels add to it, unless they sum in a copy of their own and overwrite it. Those for CUDA add always,
  // in the type of sums, or in integers.
  if (cpu && p.dtype == Dtype::kBfloat16) p.repack = true;
  const bool overwritten = cpu && p.repack && !call.nothing_to_do();
  const Tensor& value_like = cpu ? call.value : call.offsets;
  const Sizes value_sizes = {p.B, p.S, p.M, p.E};
  Grads grads{
      overwritten || fixed ? empty(fixed ? call.value : value_like, value_sizes) : zeros(value_like, value_sizes),
      references_too ? empty(call.offsets, {p.B, p.Q, p.L, p.N}) : empty(call.offsets, {0}),
      empty(call.offsets, sizes_of(call.offsets)),
      empty(call.weights, sizes_of(call.weights)),
  };
  const Tensor of_heads = references_too ? empty(call.offsets, {p.B, p.M, p.Q, p.L, p.N}) : grads.references;
  const Tensor largest = fixed ? zeros(call.offsets, {2}) : grads.references;
  const Tensor sums = fixed ? zeros(grads.value, value_sizes, ScalarType::Long) : grads.value;
  if (fixed) p.largest = largest.mutable_data_ptr();
  p.grad_value_BSME = sums.mutable_data_ptr();
  p.grad_offsets_BQMLP2 = grads.offsets.mutable_data_ptr();
  p.grad_weights_BQMLP = grads.weights.mutable_data_ptr();
  p.grad_references_BMQLN = references_too ? of_heads.mutable_data_ptr() : nullptr;
  if (!call.nothing_to_do()) cpu ? backward_on_cpu(p, grads) : backward_on_cuda(p, grads);
  if (!cpu && grads.value.scalar_type() != call.value.scalar_type()) {
    grads.value = torch::stable::to(grads.value, call.value.scalar_type());
  }
  return grads;
}

Tensor ms_deform_attn(const Tensor& value, Sizes spatial_shapes, const Tensor& sampling_locations,
                      const Tensor& attention_weights) {
  Call call(Mode::kLocations, value, spatial_shapes, value, sampling_locations, attention_weights);
  return forward(call);
}

Tensor fused_ms_deform_attn(const Tensor& value, Sizes spatial_shapes, const Tensor& reference_points,
                            const Tensor& sampling_offsets, const Tensor& attention_logits) {
  Call call(Mode::kPoints, value, spatial_shapes, reference_points, sampling_offsets, attention_logits);
  return forward(call);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value,
                                                           Sizes spatial_shapes, const Tensor& sampling_locations,
                                                           const Tensor& attention_weights, bool deterministic) {
  Call call(Mode::kLocations, value, spatial_shapes, value, sampling_locations, attention_weights);
  call.set_grad_out(grad);
  const Grads grads = backward(call, false, deterministic);
  return {grads.value, grads.offsets, grads.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_ms_deform_attn_backward(
    const Tensor& grad, const Tensor& value, Sizes spatial_shapes, const Tensor& reference_points,
    const Tensor& sampling_offsets, const Tensor& attention_logits, bool references_too, bool deterministic) {
  Call call(Mode::kPoints, value, spatial_shapes, reference_points, sampling_offsets, attention_logits);
  call.set_grad_out(grad);
  const Grads grads = backward(call, references_too, deterministic);
  return {grads.value, grads.references, grads.offsets, grads.weights};
}

// seed: one integer, in a tensor so that it can be traced. mode: a DropoutMode. All in x's dtype.
void dropout(const Tensor& x, std::optional<Tensor> other, const Tensor& seed, double p, int64_t mode, Tensor out) {
  Dropout d{};
  if (mode < 0 || mode > static_cast<int64_t>(DropoutMode::kGate)) fail("mode: ", mode, ", expected 0 to 3");
  d.mode = static_cast<DropoutMode>(mode);
  const bool reads_other = d.mode == DropoutMode::kAdd || d.mode == DropoutMode::kGate;
  if (reads_other != other.has_value()) fail("other: ", reads_other ? "expected" : "not expected", " in mode ", mode);
  if (!(p >= 0 && p < 1)) fail("p: ", p, ", expected 0 <= p < 1");
  d.dtype = dtype_of(x);
  if (d.dtype == Dtype::kDouble) fail("x: Double, expected Float or BFloat16");
  check_like("seed", seed, x, ScalarType::Long);
  check_shape("seed", seed, {});
  const auto check = [&](const char* name, const Tensor& tensor) {
    check_shape(name, tensor, sizes_of(x));
    check_like(name, tensor, x, x.scalar_type());
    if (!tensor.is_contiguous()) fail(name, ": expected contiguous");
  };
  check("x", x), check("out", out);
  if (other) check("other", *other);
  d.x = x.const_data_ptr(), d.other = other ? other->const_data_ptr() : nullptr, d.out = out.mutable_data_ptr();
  d.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  d.threshold = static_cast<uint32_t>(std::min(std::lround(p * 0x1p16), 0xffffl));
  d.scale = static_cast<float>(0x1p16 / (0x1p16 - d.threshold));
  const auto kernel = cpu_kernels().dropout;
  const int64_t count = x.numel();
  if (d.out != d.x) use_huge_pages(d.out, count * x.element_size());
  torch::stable::parallel_for(0, parts_for(count, kDropoutBlock), 2, [&](int64_t first, int64_t last) {
    if (first < last) kernel(d, first * kDropoutBlock, std::min(last * kDropoutBlock, count));
  });
}

#ifdef TENFOLD_CUDA_ARCHS
Tensor assign(const Tensor& cost, const Tensor& image, int64_t images) {
  const auto sizes = cost.sizes();
  if (sizes.size() != 3) fail("cost: ", sizes.size(), " axes, expected (K, N, Q)");
  Assignment a{sizes[0], images, sizes[1], sizes[2]};
  check_like("cost", cost, cost, ScalarType::Float);
  check_like("image", image, cost, ScalarType::Long);
  check_shape("image", image, {a.N});
  if (a.Q < 1 || a.Q > INT32_MAX / 2) fail("cost: Q = ", a.Q, ", expected 1 to ", INT32_MAX / 2);
  if (a.K > 65535 || images > INT32_MAX) fail("cost: K = ", a.K, ", images: ", images, ", expected at most 65535");
  const Tensor query = empty(cost, {a.K, a.N}, ScalarType::Long);
  if (a.K == 0 || a.N == 0 || images == 0) return query;
  const Tensor costs = torch::stable::contiguous(cost), image_of = torch::stable::contiguous(image);
  const int64_t of_columns = a.K * a.B * a.Q;
  const Tensor numbers = empty(cost, {2 * of_columns + a.K * a.N}, ScalarType::Double);
  const Tensor indices = empty(cost, {3 * of_columns}, ScalarType::Int);
  a.cost_KNQ = static_cast<const float*>(costs.const_data_ptr());
  a.image_N = static_cast<const int64_t*>(image_of.const_data_ptr());
  a.query_KN = static_cast<int64_t*>(query.mutable_data_ptr());
  a.price_KBQ = static_cast<double*>(numbers.mutable_data_ptr());
  a.distance_KBQ = a.price_KBQ + of_columns, a.price_KN = a.distance_KBQ + of_columns;
  a.before_KBQ = static_cast<int*>(indices.mutable_data_ptr());
  a.row_KBQ = a.before_KBQ + of_columns, a.done_KBQ = a.row_KBQ + of_columns;
  const CudaStream at(cost);
  check_launch(assign_cuda(a, at.device, at.stream));
  return query;
}
#endif

}  // namespace
}  // namespace tenfold

STABLE_TORCH_LIBRARY(tenfold, m) {
  // Gradients come in the order of the arguments; that of reference_points has no elements unless references_too.
  m.def("ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
        " -> Tensor");
  m.def("ms_deform_attn_backward(Tensor grad, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
        " Tensor attention_weights, bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def("fused_ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor reference_points,"
        " Tensor sampling_offsets, Tensor attention_logits) -> Tensor");
  m.def("fused_ms_deform_attn_backward(Tensor grad, Tensor value, SymInt[] spatial_shapes, Tensor reference_points,"
        " Tensor sampling_offsets, Tensor attention_logits, bool references_too, bool deterministic)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  // cost (K, N, Q), image (N) of each target, ascending from 0 to images - 1, which is not checked: the processor would
  // wait -> query (K, N). CUDA only: ops/assignment.py.
  m.def("assign(Tensor cost, Tensor image, int images) -> Tensor");
  m.def("dropout(Tensor x, Tensor? other, Tensor seed, float p, int mode, Tensor(a!) out) -> ()");
}

#define TENFOLD_IMPLEMENT(m)                                                               \
  m.impl("ms_deform_attn", TORCH_BOX(&tenfold::ms_deform_attn));                           \
  m.impl("ms_deform_attn_backward", TORCH_BOX(&tenfold::ms_deform_attn_backward));         \
  m.impl("fused_ms_deform_attn", TORCH_BOX(&tenfold::fused_ms_deform_attn));               \
  m.impl("fused_ms_deform_attn_backward", TORCH_BOX(&tenfold::fused_ms_deform_attn_backward))

STABLE_TORCH_LIBRARY_IMPL(tenfold, CPU, m) {
  TENFOLD_IMPLEMENT(m);
  m.impl("dropout", TORCH_BOX(&tenfold::dropout));
}
#ifdef TENFOLD_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(tenfold, CUDA, m) {
  TENFOLD_IMPLEMENT(m);
  m.impl("assign", TORCH_BOX(&tenfold::assign));
}
#endif

// For ops/library.py, through ctypes.
#define TENFOLD_EXPORT extern "C" __attribute__((visibility("default")))

// isa: "avx512", "avx2", "portable" or "" for the widest; null where this CPU does not run it, else what is used now.
TENFOLD_EXPORT const char* tenfold_choose_cpu_isa(const char* isa) {
  return tenfold::choose_cpu_kernels(isa) ? tenfold::cpu_kernels().isa : nullptr;
}

// Whether the CUDA backward may sum inside a block what goes to one pixel, from now on; for tests and benchmarks.
TENFOLD_EXPORT void tenfold_sum_pixels([[maybe_unused]] int allowed) {
#ifdef TENFOLD_CUDA_ARCHS
  tenfold::sum_pixels = allowed;
#endif
}

// The architectures that CUDA kernels are in here for; "" for none.
TENFOLD_EXPORT const char* tenfold_cuda_archs() {
#ifdef TENFOLD_CUDA_ARCHS
  return TENFOLD_CUDA_ARCHS;
#else
  return "";
#endif
}
