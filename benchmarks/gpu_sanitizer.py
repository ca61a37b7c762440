"""The CUDA kernels under NVIDIA's compute-sanitizer: memcheck, racecheck, synccheck.

    python -m benchmarks.gpu_sanitizer

On small tests of tests/ops/test_cuda.py: queries that are pixels, by pixels and by corners, and the deterministic
backward. The sanitizer makes a kernel many times slower. Exit code 1 where it reports anything.
"""

import os
import shutil
import subprocess
import sys

from benchmarks.results import ROOT
from framework.errors import FAILED, UsageError, command

TESTS = "boxes and (a_query_for_each_pixel or deterministic_backward)"


def main() -> int:
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        raise UsageError("compute-sanitizer, of a CUDA toolkit, is not on the PATH")
    # From torch's cache memory comes in large pieces, in which the sanitizer sees no bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    clean = True
    for tool in ("memcheck", "racecheck", "synccheck"):
        run = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", "--target-processes", "all"]
        run += [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "tests/ops/test_cuda.py", "-k", TESTS]
        result = subprocess.run(
            run, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        print(f"{tool}: {'clean' if result.returncode == 0 else f'exit code {result.returncode}'}")
        if result.returncode:
            print(result.stdout[-4000:])
            clean = False
    return 0 if clean else FAILED


if __name__ == "__main__":
    command(main)
