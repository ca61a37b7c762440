"""The fused operator on the CPU against eager grid_sample: seconds of both sides in one run, their ratios, memory.

    python -m benchmarks.op [--repeats N] [--threads T]

Shapes of COCO at 800 x 1333: 22,223 tokens in four levels, 8 heads of 32 channels, 4 points; encoder: a query for
each token; decoder: 300 queries. Every instruction set of this machine, float32 and bfloat16; both sides begin with
offsets and logits and end with gradients of value, offsets and logits. `reference` is ops.reference; `stacked` the
common way to write it, which keeps the samples of all levels. Sides take turns: some forwards in a row, then some
backwards; medians are compared. Once with the allocator as it is, once with one that keeps its memory: half of
grid_sample's time is page faults otherwise. Beside each time its limit: see `limit_ms`.
Writes docs/results/op.{json,md} and a plot for each allocator, apart for each widest instruction set. On a GPU:
benchmarks.op_gpu.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import RESULTS, ROOT, write
from ops import compiled, library, reference

# B image, S token of all levels, M head, E channel of a head, Q query, L level, P point, G = B*M

SIZES_HW = [(100, 167), (50, 84), (25, 42), (13, 21)]
S, M, E, L, P = sum(h * w for h, w in SIZES_HW), 8, 32, 4, 4
QUERIES = {"encoder": S, "decoder": 300}
IN_A_ROW = 5  # runs of a side before it is another's turn
# glibc: nothing comes from mmap, nothing is given back.
ALLOCATORS = {"default": {}, "keeps memory": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}}
Side = Callable[[list[Tensor]], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=["time", *sides()], help="of the work, in this process; prints JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part:
        print(json.dumps(times(args.repeats) if args.part == "time" else extra_mib(sides()[args.part])))
        return 0
    command = f"python -m benchmarks.op --repeats {args.repeats} --threads {args.threads}"
    for name, environment in ALLOCATORS.items():
        load = os.getloadavg()[0]  # where others work too, two threads wait for each other
        rows = in_process("time", args, environment)
        part = f"{rows[0]['isa']}, allocator: {name}"  # the widest kernels of this machine, whose figures stand apart
        plot = RESULTS / f"op-{part.replace(', allocator: ', '-').replace(' ', '-')}.png"
        draw(rows, f"op, {args.threads} threads, {part}", plot)
        write("op", TITLE, part, {"rows": rows, "threads": args.threads, "load before": load}, command)
    memory = {name: in_process(name, args, {}) for name in sides()}
    write("op", TITLE, "MiB that the encoder's forward takes beyond its arguments", memory, command)
    return 0


TITLE = "The operator on the CPU against eager grid_sample"
TITLE_ON_GPU = "On a GPU: op"  # as benchmarks.gpu_report names its part


def in_process(part: str, args: argparse.Namespace, environment: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "benchmarks.op", "--part", part]
    command += ["--repeats", str(args.repeats), "--threads", str(args.threads)]
    environment = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def sides() -> dict[str, Side]:
    def fused(tensors: list[Tensor]) -> Tensor:
        return compiled.fused_ms_deform_attn(tensors[0], SIZES_HW, *tensors[1:])

    def plain(tensors: list[Tensor]) -> Tensor:
        return reference.fused_ms_deform_attn(tensors[0], SIZES_HW, *tensors[1:])

    return {"fused": fused, "reference": plain, "stacked": stacked}


def stacked(tensors: list[Tensor]) -> Tensor:
    """grid_sample for each level with points last, the samples of all levels stacked, then one weighted sum."""
    value_BSME, references_BQLN, offsets_BQMLP2, logits_BQMK = tensors
    B, Q = offsets_BQMLP2.shape[:2]
    locations_BQMLP2 = reference.sampling_locations(references_BQLN, offsets_BQMLP2, SIZES_HW)
    weights_G1QK = logits_BQMK.float().softmax(-1).transpose(1, 2).reshape(B * M, 1, Q, L * P)
    levels = value_BSME.float().split([height * width for height, width in SIZES_HW], dim=1)
    samples = []
    for level, (height, width) in enumerate(SIZES_HW):
        map_GEHW = levels[level].flatten(2).transpose(1, 2).reshape(B * M, E, height, width)
        grid_GQP2 = (2 * locations_BQMLP2[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(map_GEHW, grid_GQP2, padding_mode="zeros", align_corners=False))
    samples_GEQK = torch.stack(samples, dim=-2).flatten(-2)
    return (samples_GEQK * weights_G1QK).sum(-1).view(B, M * E, Q).transpose(1, 2).contiguous().to(value_BSME.dtype)


def arguments(num_queries: int, dtype: torch.dtype) -> list[Tensor]:
    """Value, references at the centres of the tokens or anywhere, offsets of 2 pixels, logits."""
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(1, S, M, E, generator=draw).to(dtype)
    references = torch.rand(1, num_queries, 1, 2, generator=draw)
    if num_queries == S:
        references = torch.cat(list(centres()))[None, :, None]
    offsets = 2 * torch.randn(1, num_queries, M, L, P, 2, generator=draw)
    logits = torch.randn(1, num_queries, M, L * P, generator=draw)
    return [value, references.expand(-1, -1, L, -1).contiguous(), offsets, logits]


def centres() -> Iterator[Tensor]:
    for height, width in SIZES_HW:
        y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        yield torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).view(-1, 2)


def times(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for shape, num_queries in QUERIES.items():
        for dtype in (torch.float32, torch.bfloat16):
            rows += compare(shape, arguments(num_queries, dtype), repeats)
    return rows


def limit_ms(num_queries: int, value_bytes: int, bytes_per_s: float, flop_per_s: float) -> list[float]:
    """What forward and backward take at least: the longer of moving each number once and of multiplying and adding.

    Forward: value, offsets and logits are read and the output is written; backward: with the output's gradient they
    are read, and their gradients written. Where queries are few, their rows stand for value, which some cache may
    hold already. Four corners of a point; twice that in the backward, for the gradients of value and of the weights.
    """
    points = num_queries * M * L * P
    value = value_bytes * min(S * M, 4 * points) * E
    output, given = value_bytes * num_queries * M * E, 4 * 3 * points
    flop = 2 * 4 * points * E
    forward = max((value + output + given) / bytes_per_s, flop / flop_per_s)
    return [1e3 * forward, 1e3 * max((2 * value + output + 2 * given) / bytes_per_s, 2 * flop / flop_per_s)]


def speed_of_machine() -> tuple[float, float]:
    """Bytes per second of a copy in memory, read and written; float32 operations per second of a matrix product."""
    source, square = torch.randn(S * M * E * 4), torch.randn(2048, 2048)
    target = torch.empty_like(source)
    copy_s = statistics.median(timed(lambda: target.copy_(source), 15))
    product_s = statistics.median(timed(lambda: square @ square, 7))
    return 2 * source.nbytes / copy_s, 2 * 2048**3 / product_s


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Achieved against limit, in percent. More than 100: what should come from memory was still in a cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, sharex=True, layout="constrained")
    names = [f"{row['shape']} {row['dtype']} {row['isa']}" for row in rows]
    for plot, way in zip(axes, ("forward", "backward"), strict=True):
        shares = [100 * row[f"{way} limit ms"] / row[f"{way} ms"] for row in rows]
        plot.barh(names, shares, color="#6baed6")
        for at, (share, row) in enumerate(zip(shares, rows, strict=True)):
            plot.text(share, at, f" {share:.0f} %, {row[f'{way} ms']:.3g} ms", va="center", fontsize=8)
        plot.axvline(100, color="#08306b", linewidth=1)
        plot.set(xlabel="% of the speed that memory or arithmetic allows", title=way)
        plot.margins(x=0.45)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def compare(shape: str, tensors: list[Tensor], repeats: int) -> list[dict[str, Any]]:
    """Medians of one shape and dtype: a row for each instruction set, with the ratios to both eager ways."""
    isas = [isa for isa in library.ISAS if runs_here(isa)]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in [*isas, "reference", "stacked"]}
    for _ in range(repeats):
        for isa in isas:
            library.choose_cpu_isa(isa)
            seconds[isa] += seconds_of(sides()["fused"], tensors, IN_A_ROW)
        for name in ("reference", "stacked"):
            seconds[name] += seconds_of(sides()[name], tensors, IN_A_ROW)
    medians = {name: median_ms(runs) for name, runs in seconds.items()}
    head = {"shape": shape, "dtype": name_of(tensors[0].dtype)}
    limits = limit_ms(QUERIES[shape], tensors[0].element_size(), *speed_of_machine())
    limit = {"forward limit ms": limits[0], "backward limit ms": limits[1]}
    return [head | {"isa": isa} | ratios(medians[isa], medians) | limit for isa in isas]


def ratios(own: list[float], medians: dict[str, list[float]]) -> dict[str, float]:
    """Columns: forward and backward of one side, of the eager ones, and how many times faster it is."""
    columns = {}
    for i, way in enumerate(("forward", "backward")):
        columns[f"{way} ms"] = own[i]
        for name in ("reference", "stacked"):
            columns[f"{way}, {name} ms"] = medians[name][i]
            columns[f"{way}, times faster than {name}"] = medians[name][i] / own[i]
    return columns


def median_ms(runs: list[tuple[float, float]]) -> list[float]:
    return [1e3 * statistics.median(column) for column in zip(*runs, strict=True)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def runs_here(isa: str) -> bool:
    try:
        return bool(library.choose_cpu_isa(isa))
    except ValueError:
        return False


def seconds_of(side: Side, tensors: list[Tensor], runs: int) -> list[tuple[float, float]]:
    """Seconds of some forwards in a row, and of as many backwards of one of them."""
    value, references, offsets, logits = tensors
    leaves = [t.detach().requires_grad_() for t in (value, offsets, logits)]

    def forward() -> Tensor:
        return side([leaves[0], references, *leaves[1:]])

    out = forward()
    grad = torch.ones_like(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return list(zip(timed(forward, runs), timed(backward, runs), strict=True))


def timed(work: Callable[[], object], runs: int) -> list[float]:
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
        del result
    return seconds


def extra_mib(side: Side) -> dict[str, float]:
    """Peak resident memory during a forward without gradients, less that before; its output included."""
    tensors = arguments(S, torch.float32)
    with torch.no_grad():
        side([*arguments(3, torch.float32)])  # what is loaded at first use
        ctypes.CDLL(None).malloc_trim(0)  # or it would be done in memory that is free already
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts at what is resident now
        before = resident_mib("VmHWM")
        out = side(tensors)
        return {"extra": resident_mib("VmHWM") - before, "of it output": out.nbytes / 2**20}


def resident_mib(field: str) -> float:
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith(field)]
    return int(line.split()[1]) / 2**10


if __name__ == "__main__":
    sys.exit(main())
