"""What the compiler makes of the tiled CUDA kernels, and what that predicts where no GPU can be had.

    python -m benchmarks.cuda_code [--arch 90]

Needs nvcc, and nvdisasm (`pip install nvidia-cuda-nvdisasm`, or of a CUDA toolkit). For each kernel with heads of 32
channels and 16 points: registers, shared memory, threads that a multiprocessor keeps, and instructions of the loop over
the points, for one point and lane.

The prediction, for the encoder of COCO at 800 x 1333 with the initial offsets and noise of 1 and 4 pixels: how long the
instructions of a whole block take, each as often as the loops around it turn, at one a clock from each of four
schedulers on 132 multiprocessors at 1.755 GHz; the gathers at 30 TB/s of first-level caches; the adds to memory at 628
billion numbers a second (an estimate: every corner one add took 580 us); the bytes that must be moved at 4.3 TB/s. The
longest of them is a bound from below, not a figure: schedulers idle, groups of a block wait for the slowest.
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

import torch

from benchmarks.op import SIZES_HW, E, L, M, P, S
from benchmarks.op_gpu import input_sets
from benchmarks.results import ROOT, write
from framework.errors import UsageError, command

MULTIPROCESSORS, SCHEDULERS, CLOCK_HZ, WARP = 132, 4, 1.755e9, 32
REGISTERS, SHARED_BYTES, THREADS = 65536, 227 * 1024, 2048  # of a multiprocessor of compute capability 9.0
BLOCK = 256  # threads of a block, but of a forward on 16 bits
GATHERED_BYTES_PER_S, ADDS_PER_S, BYTES_PER_S = 30e12, 628e9, 4.3e12
ENTRIES, SLOTS = 1024, 2048  # of csrc/cuda/tiled.cuh, Bins
AIMS_US = {("forward", "bfloat16"): (80, 45), ("forward", "float32"): (120, 75)}  # at least, aim; an H200
AIMS_US |= {("backward", dtype): (800, 300) for dtype in ("bfloat16", "float32")}
DTYPES = {"f": ("float32", 4), "13__nv_bfloat16": ("bfloat16", 2)}
ADDS = {"0": "backward, corner by corner", "1": "backward, deterministic", "2": "backward, summed by pixels"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="compute capability without its point")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report, assembly = compiled(args.arch, Path(folder, "kernels.cubin"))
    rows, predictions = [], []
    shares = {noise: {size: unique_share(noise, BLOCK // (E * size // 16)) for size in (2, 4)} for noise in (1, 4)}
    for name, registers in registers_of(report).items():
        if found := re.search(r"tiled_(forward|backward)I(\w+?)Li32ELi16E(?:LNS0_4AddsE(\d))?", name):
            way, dtype, adds = found.groups()
            if dtype in DTYPES:
                body = assembly[name]
                kernel = "forward" if way == "forward" else ADDS[adds]
                rows.append(row_of(kernel, *DTYPES[dtype], registers, body))
                if "deterministic" not in kernel:
                    predictions += [
                        prediction(kernel, *DTYPES[dtype], noise, body, share[DTYPES[dtype][1]])
                        for noise, share in shares.items()
                    ]
    for table in (rows, predictions):
        table.sort(key=lambda row: (row["kernel"], row["dtype"]))
    note = "nothing here is measured: counted in the code for a GPU, which has not run it"
    result = {"kernels": rows, "prediction": predictions, "how to read it": note}
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
    threads, points = threads_of(kernel, size), L * P
    queries, places = threads // (E * size // 16), points if threads < BLOCK else points + 1
    shared = places * 24 * queries + (bytes_of_bins(size) if "pixels" in kernel else 0)
    blocks = min(REGISTERS // (registers * threads), SHARED_BYTES // (shared + 1024), THREADS // threads)
    # Where pixels are summed, the same loop holds what is done once for several points: its length says nothing.
    per_point = None if "pixels" in kernel else instructions_of_a_point(body)
    return {
        "kernel": kernel,
        "dtype": dtype,
        "registers": registers,
        "shared KiB of a block": round(shared / 1024, 1),
        "threads a multiprocessor": blocks * threads,
        "instructions of a point and lane": per_point,
    }


def threads_of(kernel: str, size: int) -> int:
    return 128 if kernel == "forward" and size == 2 else BLOCK


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


def prediction(kernel: str, dtype: str, size: int, noise: int, body: str, share: float) -> dict[str, Any]:
    """Microseconds for one image, by what is the limit."""
    threads, way = threads_of(kernel, size), kernel.partition(",")[0]
    queries = threads // (E * size // 16)
    corners = 4 * S * M * L * P
    instructions = instructions_of_a_thread(body, size, share) * threads / WARP * blocks_of(queries)
    adds = 0.0 if way == "forward" else corners * E * (share if "pixels" in kernel else 1.0)
    given, map_bytes = 4 * 3 * S * M * L * P, S * M * E
    moved = 2 * size * map_bytes + given if way == "forward" else (2 * size + 4) * map_bytes + 2 * given
    us = {
        "instructions, us": 1e6 * instructions / (MULTIPROCESSORS * SCHEDULERS * CLOCK_HZ),
        "gathers, us": 1e6 * corners * E * size / GATHERED_BYTES_PER_S,
        "adds, us": 1e6 * adds / ADDS_PER_S,
        "memory, us": 1e6 * moved / BYTES_PER_S,
    }
    least, aim = AIMS_US[way, dtype]
    head = {"kernel": kernel, "dtype": dtype, "noise, pixels": noise}
    rounded = {name: round(value, 1) for name, value in us.items()}
    return head | rounded | {"predicted: more than, us": max(rounded.values()), "at least, us": least, "aim, us": aim}


def blocks_of(queries: int) -> int:
    return M * sum(-(-width // 8) * -(-height // (queries // 8)) for height, width in SIZES_HW)


def unique_share(noise: int, queries: int) -> float:
    """Of the corners that have a weight, how many are left where those on one pixel are one, in a block and round."""
    _, references, offsets, _ = input_sets(f"encoder, noise {noise}", 1, torch.bfloat16, torch.device("cpu"), sets=1)[0]
    points_at_once = ENTRIES // (4 * queries)
    tiles = torch.cat([tiles_of(height, width, queries) + 10_000 * at for at, (height, width) in enumerate(SIZES_HW)])
    keys, start = [], 0
    for level, (height, width) in enumerate(SIZES_HW):
        place = references[0, :, None, None, level] * torch.tensor([width, height]) - 0.5 + offsets[0, :, :, level]
        low = place.floor().long()  # Q, M, P, 2
        rounds = (level * P + torch.arange(P)) // points_at_once
        owner = ((tiles[:, None] * M + torch.arange(M))[..., None] * 64 + rounds) * S
        for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
            x, y = (low + torch.tensor(corner)).unbind(-1)
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            keys.append((owner + start + y * width + x)[inside])
        start += height * width
    every = torch.cat(keys)
    return every.unique().numel() / every.numel()


def tiles_of(height: int, width: int, queries: int) -> torch.Tensor:
    rows, columns = torch.arange(height)[:, None] // (queries // 8), torch.arange(width)[None] // 8
    return (rows * 100 + columns).flatten()


def instructions_of_a_thread(body: str, size: int, share: float) -> float:
    """Each instruction as often as the loops around it turn; both ways of a branch count, threads that idle too."""
    lines = body.splitlines()
    loops = sorted(loops_of(lines), key=lambda loop: loop[1] - loop[0])
    inner = {
        loop: [other for other in loops if loop[0] <= other[0] and other[1] <= loop[1] and other != loop]
        for loop in loops
    }
    turns = {
        loop: turns_of("\n".join(own_lines(lines, loop, inner[loop])), inner[loop], lines, size, share)
        for loop in loops
    }
    total = 0.0
    for at, line in enumerate(lines):
        if "/*" in line:
            weight = 1.0
            for begin, end in loops:
                weight *= turns[begin, end] if begin <= at <= end else 1.0
            total += weight
    return total


def loops_of(lines: list[str]) -> set[tuple[int, int]]:
    """First and last line of what a branch goes back over; several branches to one label are one loop."""
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith(".L_")}
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        if (target := re.search(r"BRA `\((\.L_\w+)\)", line)) and labels.get(target[1], at) < at:
            ends[labels[target[1]]] = at
    return set(ends.items())


def own_lines(lines: list[str], loop: tuple[int, int], inner: list[tuple[int, int]]) -> list[str]:
    return [
        line for at, line in enumerate(lines[loop[0] : loop[1] + 1], loop[0])
        if not any(begin <= at <= end for begin, end in inner)
    ]  # fmt: skip


def turns_of(own: str, inner: list[tuple[int, int]], lines: list[str], size: int, share: float) -> float:
    """How often a loop turns, for each turn of the loop around it: loops are known by the instructions in them."""
    queries, points = BLOCK // (E * size // 16), L * P
    at_once = ENTRIES // (4 * queries)  # points of a query between two rounds of bins
    every_round = 1 / at_once  # the loop over points is around what a round does
    nested = "\n".join("\n".join(lines[begin : end + 1]) for begin, end in inner)
    fused, corners = own.count("FFMA"), own.count("LDG.E.128")
    if corners >= 4 and "LDG.E.128" not in nested:  # the loop over points, by so many as the compiler put together
        return points / (corners / 4)
    if "ATOMS.CAS" in own:  # probing
        return 1 / (1 - share * ENTRIES / SLOTS)
    if "ATOMS.CAS" in nested and "LDG.E.128" not in nested and "RED" not in nested:  # find_slots
        return every_round * ENTRIES / BLOCK
    if "RED" in own and "LDS" in own:  # add: a group for each pixel
        return every_round * share * ENTRIES / queries
    if fused >= 4 and "LDS" in own and "LDG" not in own and "STG" not in own:  # the parts of a pixel
        return 1 / share / (fused / (16 // size))
    if "SHFL.UP" in own:  # share_out
        return every_round * share * ENTRIES / BLOCK
    if "ATOMS.ADD" in own:  # fill
        return every_round * ENTRIES / BLOCK / own.count("ATOMS.ADD")
    if own.count("STS") >= 2 and "LDS" not in own and not inner:  # clear, two stores a slot
        return every_round * 2 * SLOTS / BLOCK / own.count("STS")
    return 1.0


if __name__ == "__main__":
    command(main)
