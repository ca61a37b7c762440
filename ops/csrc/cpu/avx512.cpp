#include "dropout.h"
#include "kernels.h"

namespace tenfold {
extern const CpuKernels kAvx512 = {"avx512", forward, backward, softmax_rows, dropout};
}
