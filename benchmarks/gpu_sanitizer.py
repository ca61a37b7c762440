"""The CUDA kernels under NVIDIA's compute-sanitizer: memcheck, racecheck, synccheck.

    python -m benchmarks.gpu_sanitizer

On small tests of tests/ops/test_cuda.py: queries that are pixels, by pixels and by corners, and the deterministic
backward. The sanitizer makes a kernel many times slower. Exit code 1 where it reports anything.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks.results import ROOT
from framework.errors import FAILED, UsageError, command

TOOLS = "memcheck", "racecheck", "synccheck"
TESTS = "boxes and (a_query_for_each_pixel and 8 or deterministic_backward and 32)"  # 8 points on two levels


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        raise UsageError("compute-sanitizer, of a CUDA toolkit, is not on the PATH")
    # From torch's cache memory comes in large pieces, in which the sanitizer sees no bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(tool: str) -> "subprocess.CompletedProcess[str]":
        line = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", "--target-processes", "all"]
        line += [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "tests/ops/test_cuda.py", "-k", TESTS]
        return subprocess.run(
            line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    with ThreadPoolExecutor() as pool:  # side by side: most of the time goes to starting
        results = dict(zip(TOOLS, pool.map(run, TOOLS), strict=True))
    # Tests that were skipped prove nothing.
    failed = {tool: result for tool, result in results.items() if result.returncode or " passed" not in result.stdout}
    for result in failed.values():
        print(result.stdout[-4000:])
    print(
        ", ".join(f"{tool}: {f'exit code {failed[tool].returncode}' if tool in failed else 'clean'}" for tool in TOOLS)
    )
    return FAILED if failed else 0


if __name__ == "__main__":
    command(main)
