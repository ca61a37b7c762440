"""What the compiler makes of the tiled CUDA kernels, and what that predicts where no GPU can be had.

    python -m benchmarks.cuda_code [--arch 90]

Needs nvcc, and nvdisasm (`pip install nvidia-cuda-nvdisasm`, or of a CUDA toolkit). For each kernel with heads of 32
channels and 16 points: registers, shared memory, threads a multiprocessor keeps, and instructions of the loop over the
points, for one point and lane. The prediction: those instructions for all points, lanes and queries of the encoder at
800 x 1333, at one instruction a clock from each of four schedulers, on 132 multiprocessors at 1.755 GHz. What comes
before and after the loop, and all of memory, is left out: a bound from below, not a figure.
Writes docs/results/cuda-code.{json,md}.
"""

import argparse
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.op import E, L, M, P, S
from benchmarks.results import ROOT, write
from framework.errors import UsageError, command

MULTIPROCESSORS, SCHEDULERS, CLOCK_HZ, WARP = 132, 4, 1.755e9, 32
REGISTERS, SHARED_BYTES, THREADS = 65536, 227 * 1024, 2048  # of a multiprocessor of compute capability 9.0
BLOCK = 256
DTYPES = {"f": ("float32", 4), "13__nv_bfloat16": ("bfloat16", 2)}
ADDS = {"0": "backward, corner by corner", "1": "backward, deterministic", "2": "backward, summed by pixels"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="compute capability without its point")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report, assembly = compiled(args.arch, Path(folder, "kernels.cubin"))
    rows = []
    for name, registers in registers_of(report).items():
        if found := re.search(r"tiled_(forward|backward)I(\w+?)Li32ELi16E(?:LNS0_4AddsE(\d))?", name):
            way, dtype, adds = found.groups()
            if dtype in DTYPES:
                body = assembly[name]
                rows.append(row_of("forward" if way == "forward" else ADDS[adds], *DTYPES[dtype], registers, body))
    rows.sort(key=lambda row: (row["kernel"], row["dtype"]))
    result = {"kernels": rows, "how to read it": "not measured: counted in the code for a GPU, which has not run it"}
    part, line = f"compute capability {args.arch}", f"python -m benchmarks.cuda_code --arch {args.arch}"
    write("cuda-code", "Code of the CUDA kernels", part, result, line)
    return 0


def compiled(arch: str, path: Path) -> tuple[str, dict[str, str]]:
    """What ptxas says, and the assembly of each kernel."""
    nvdisasm = shutil.which("nvdisasm") or next(
        map(str, Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvdisasm")), None
    )
    if not shutil.which("nvcc") or not nvdisasm:
        missing = "nvdisasm: pip install nvidia-cuda-nvdisasm" if shutil.which("nvcc") else "nvcc, of a CUDA toolkit"
        raise UsageError(f"cannot compile and take apart: there is no {missing}")
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    build = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", code, "-cubin", "-o", str(path)]
    source = ROOT / "ops" / "csrc" / "cuda" / "kernels.cu"
    report = subprocess.run([*build, source], check=True, capture_output=True, text=True).stderr
    text = subprocess.run([nvdisasm, "-c", path], check=True, capture_output=True, text=True).stdout
    return report, dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-----|\Z)", text, re.DOTALL | re.MULTILINE))


def registers_of(report: str) -> dict[str, int]:
    found = re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", report, re.DOTALL)
    return {name: int(registers) for name, registers in found}


def row_of(kernel: str, dtype: str, size: int, registers: int, body: str) -> dict[str, Any]:
    lanes = E * size // 16
    queries, points = BLOCK // lanes, L * P
    shared = (points + 1) * 24 * queries + (bytes_of_bins(size) if "pixels" in kernel else 0)
    blocks = min(REGISTERS // (registers * BLOCK), SHARED_BYTES // (shared + 1024), THREADS // BLOCK)
    # Where pixels are summed, the same loop holds what is done once for several points: its length says nothing.
    per_point = None if "pixels" in kernel else instructions_of_a_point(body)
    bound_s = (per_point or 0) * points * lanes * S * M / WARP / (MULTIPROCESSORS * SCHEDULERS * CLOCK_HZ)
    return {
        "kernel": kernel,
        "dtype": dtype,
        "registers": registers,
        "shared KiB of a block": round(shared / 1024, 1),
        "threads a multiprocessor": blocks * BLOCK,
        "instructions of a point and lane": per_point,
        "bound of the loop, us": round(1e6 * bound_s, 1) if per_point else None,
    }


def bytes_of_bins(size: int) -> int:
    return BLOCK * (16 // size) * 4 + 2048 * 8 + 1024 * 16 + 8


def instructions_of_a_point(body: str) -> float:
    """Of the innermost loop that reads whole corners: instructions for every four 16-byte reads from memory."""
    best: tuple[int, int] | None = None
    lines = body.splitlines()
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith(".L_")}
    for at, line in enumerate(lines):
        if (target := re.search(r"BRA `\((\.L_\w+)\)", line)) and labels.get(target[1], at) < at:
            loop = lines[labels[target[1]] : at + 1]
            reads = sum("LDG.E.128" in one for one in loop)
            count = sum("/*" in one for one in loop)
            if reads >= 4 and (best is None or count < best[0]):
                best = count, reads
    if best is None:
        raise ValueError("no loop over points in the assembly")
    return round(best[0] * 4 / best[1], 1)


if __name__ == "__main__":
    command(main)
