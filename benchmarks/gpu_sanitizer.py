"""The CUDA kernels under NVIDIA's compute-sanitizer: memcheck, for what they read and write, and racecheck.

    python -m benchmarks.gpu_sanitizer

On small tests of tests/ops/test_cuda.py: queries that are pixels, by pixels and by corners, and the deterministic
backward. The sanitizer makes a kernel many times slower. Exit code 1 where it reports anything.
"""

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
    clean = True
    for tool in ("memcheck", "racecheck"):
        run = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", "--target-processes", "all"]
        run += [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "tests/ops/test_cuda.py", "-k", TESTS]
        result = subprocess.run(run, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(f"{tool}: {'clean' if result.returncode == 0 else f'exit code {result.returncode}'}")
        if result.returncode:
            print(result.stdout[-4000:])
            clean = False
    return 0 if clean else FAILED


if __name__ == "__main__":
    command(main)
