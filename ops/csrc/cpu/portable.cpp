#include "dropout.h"
#include "kernels.h"

namespace tenfold {
extern const CpuKernels kPortable = {"portable", forward, backward, softmax_rows, dropout};
}
