#include "dropout.h"
#include "kernels.h"

namespace tenfold {
extern const CpuKernels kAvx2 = {"avx2", forward, backward, softmax_rows, dropout};
}
