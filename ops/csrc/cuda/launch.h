// The CUDA kernels, without a header of CUDA's or torch's.
#pragma once

#include "../problem.h"

namespace tenfold {

// All start the work on a stream (cudaStream_t) of a device and return at once: null, or what is wrong.
// Addresses are of that device's memory, but for levels_L.
const char* forward_cuda(const Problem& p, int device, void* stream);

// grad_value_BSME: zeros, double where value is, else float: sums of narrower numbers need it. Where p.largest is not
// null, two zeros, it is 64-bit zeros; from_fixed_cuda() makes numbers of them, in the type of value.
const char* backward_cuda(const Problem& p, int device, void* stream);

const char* from_fixed_cuda(const Problem& p, void* grad_value_BSME, int device, void* stream);

// (B, M, Q, L, N) -> (B, Q, L, N)
const char* sum_heads_cuda(const Problem& p, void* sums_BQLN, int device, void* stream);

const char* assign_cuda(const Assignment& a, int device, void* stream);

}  // namespace tenfold
