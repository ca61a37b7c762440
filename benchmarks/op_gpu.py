"""The operator on a GPU against the usual ways, and against published kernels that are built there.

    python -m benchmarks.op_gpu [--batches 1 2 4 8] [--published DIR] [--mmcv DIR] [--dcnv4 DIR] [--triton DIR]

Shapes of benchmarks.op: the encoder with the initial offsets (a direction for each head, 1 to 4 pixels) and noise of 1
and of 4 pixels, and with points anywhere, the worst case; the decoder. float32, bfloat16, float16; forward, and
backward to value, offsets and logits. Each side works on several sets of inputs in turn, together larger than the
caches. `fused` as it runs; `by corners`: without the sums by pixels; `deterministic`; `core`: ops.ms_deform_attn, with
softmax and locations in torch; `stacked`: grid_sample (one image), and, once, through torch.compile; and the published
kernels that a flag names a folder of (benchmarks/rivals.py). A side that raises says why instead of figures.
Shares of ceilings that are measured in the same run: `of memory`, the bytes that must be moved once, of a copy's speed;
`of gathers`, the rows of all corners, and `of adds`, their gradients, of the speeds of benchmarks/ceilings.cu near each
other (decoder: anywhere). More than 1: neighbours shared what they read, or summed before they added.
Writes docs/results/gpu-op.{json,md}.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.op import QUERIES, SIZES_HW, TITLE_ON_GPU, E, L, M, P, arguments, name_of, stacked
from benchmarks.results import write
from benchmarks.rivals import RIVALS, Run, load
from framework.errors import UsageError, command
from ops import compiled, library, reference

CACHES_BYTES = 100e6  # of the largest GPU in use: 50 MB on an H100, twice for what is written
RUNS, REPEATS = 10, 5
AHEAD_CYCLES = 20_000_000  # about 10 ms
Settings = Callable[[], AbstractContextManager]
Sides = dict[str, tuple[Run, Settings]]
Rivals = dict[str, tuple[Run, tuple[torch.dtype, ...]]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    for name in RIVALS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="folder in which this kernel is built")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UsageError("no GPU that torch can use; benchmarks.op measures on the CPU")
    device = torch.device("cuda")
    rivals = load({name: getattr(args, name) for name in RIVALS if getattr(args, name)}, device)
    ceilings = measured_ceilings(device)
    print(ceilings, flush=True)
    rows: list[dict[str, Any]] = []
    line = " ".join(["python -m benchmarks.op_gpu", *(f"--{name} DIR" for name in rivals)])
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for batch in args.batches:
        for shape in ("encoder, noise 1", "encoder, noise 4", "encoder, anywhere", "decoder"):
            for dtype in dtypes:
                rows += rows_of(shape, batch, dtype, device, ceilings, sides(batch, dtype, rivals))
                print(rows[-1], flush=True)
                write("gpu-op", TITLE_ON_GPU, "times", {"sides": rows} | ceilings, line)  # each time: it may be stopped
    for dtype in dtypes[:2]:  # last, since it is compiled for longer than all others take
        given = {"fused": sides(1, dtype, {})["fused"], "stacked, compiled": (compiled_stacked(), nullcontext)}
        rows += rows_of("encoder, noise 1", 1, dtype, device, ceilings, given)
        write("gpu-op", TITLE_ON_GPU, "times", {"sides": rows} | ceilings, line)
    return 0


def measured_ceilings(device: torch.device) -> dict[str, float]:
    """The speed of a copy, and what benchmarks/ceilings.cu prints."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "ceilings")
        source = Path(__file__).with_name("ceilings.cu")
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
        if nvcc is None:
            raise UsageError("no nvcc, which the measured ceilings need, on the PATH or in bin/ of CUDA_HOME")
        subprocess.run([nvcc, "-std=c++17", "-O3", "-arch=native", "-o", program, source], check=True)
        found = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {"copy, GB/s": speed_of_copy(device) / 1e9} | json.loads(found)


def sides(batch: int, dtype: torch.dtype, rivals: Rivals) -> Sides:
    """What to run, and in which settings."""

    def fused(tensors: list[Tensor]) -> Tensor:
        return compiled.fused_ms_deform_attn(tensors[0], SIZES_HW, *tensors[1:])

    def core(tensors: list[Tensor]) -> Tensor:
        value, *others = tensors
        return compiled.ms_deform_attn(value, SIZES_HW, *reference.sampling(*others, SIZES_HW, torch.float32))

    given: Sides = {
        "fused": (fused, nullcontext),
        "by corners": (fused, by_corners),
        "deterministic": (fused, deterministic),
        "core": (core, nullcontext),
    }
    if batch == 1:  # it needs gigabytes
        given["stacked"] = stacked, nullcontext
    return given | {name: (run, nullcontext) for name, (run, dtypes) in rivals.items() if dtype in dtypes}


def compiled_stacked() -> Run:
    """Compiled anew: after some shapes and dtypes torch.compile gives up and runs what it was given."""
    torch._dynamo.reset()
    return torch.compile(stacked, dynamic=False)


@contextmanager
def by_corners():
    library.sum_pixels_on_gpu(False)
    try:
        yield
    finally:
        library.sum_pixels_on_gpu(True)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rows_of(
    shape: str, batch: int, dtype: torch.dtype, device: torch.device, ceilings: dict[str, float], given: Sides
) -> list[dict[str, Any]]:
    sets = input_sets(shape, batch, dtype, device)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in given}
    failed: dict[str, str] = {}
    for _ in range(REPEATS):  # in turn
        for name, (run, settings) in given.items():
            if name in failed:
                continue
            try:
                with settings():
                    seconds[name].append(seconds_of(run, sets, device))
            except Exception as error:  # whatever a kernel of others raises
                if name == "fused":
                    raise
                failed[name] = str(error).partition("\n")[0]
    own = [statistics.median(way) for way in zip(*seconds["fused"], strict=True)]
    shares = shares_of(shape, sets[0], ceilings)
    rows = []
    for name in given:
        row = {"shape": shape, "batch": batch, "dtype": name_of(dtype), "side": name, "says": failed.get(name)}
        for i, way in enumerate(("forward", "backward")):
            took = None if name in failed else statistics.median(runs[i] for runs in seconds[name])
            row[f"{way} us"] = took and 1e6 * took
            row[f"fused is faster, {way}"] = took and took / own[i]
            for ceiling, least_s in shares[way].items():
                row[f"{way}, of {ceiling}"] = took and least_s / took
        rows.append(row)
    return rows


def shares_of(shape: str, tensors: list[Tensor], ceilings: dict[str, float]) -> dict[str, dict[str, float]]:
    """Seconds that forward and backward take at each ceiling."""
    value, _, offsets, logits = tensors
    batch, queries = offsets.shape[:2]
    numbers = 4 * batch * queries * M * L * P * E  # of all corners
    output = value.element_size() * batch * queries * M * E
    forward = value.nbytes + offsets.nbytes + logits.nbytes + output
    backward = value.nbytes + 4 * value.numel() + 2 * (offsets.nbytes + logits.nbytes) + output
    where = "near each other" if "noise" in shape else "anywhere in a head"
    gather_s = numbers * value.element_size() / ceilings[f"gather {E * value.element_size()} byte rows {where}, GB/s"]
    add_s = numbers / ceilings[f"add {4 * E} byte rows by four {where}, G numbers/s"]
    copy = ceilings["copy, GB/s"]
    return {
        "forward": {"memory": forward / copy / 1e9, "gathers": gather_s / 1e9},
        "backward": {"memory": backward / copy / 1e9, "gathers": gather_s / 1e9, "adds": add_s / 1e9},
    }


def input_sets(
    shape: str, batch: int, dtype: torch.dtype, device: torch.device, sets: int | None = None
) -> list[list[Tensor]]:
    """Value, references, offsets, logits: so many sets, or as many as it takes to fill more than the caches."""
    draw = torch.Generator().manual_seed(0)
    num_queries = QUERIES[shape.partition(",")[0]]
    value, references, offsets, logits = arguments(num_queries, dtype)
    if "noise" in shape:
        angles = torch.arange(M) * (2 * math.pi / M)
        star = torch.stack([angles.cos(), angles.sin()], dim=-1)
        star = star / star.abs().amax(-1, keepdim=True)
        initial = star[:, None, None] * torch.arange(1.0, P + 1)[:, None]
        offsets = initial + float(shape.split()[-1]) * torch.randn(offsets.shape, generator=draw)
    if "anywhere" in shape:
        references = torch.rand(1, num_queries, 1, 2, generator=draw).expand(-1, -1, L, -1).contiguous()
    one = [t.expand(batch, *t.shape[1:]).contiguous().to(device) for t in (value, references, offsets, logits)]
    copies = sets or max(2, math.ceil(CACHES_BYTES / one[0].nbytes))
    return [one, *([tensor.clone() for tensor in one] for _ in range(copies - 1))]


def seconds_of(run: Run, sets: list[list[Tensor]], device: torch.device) -> tuple[float, float]:
    """Means over some forwards, and over their backwards, each on the next set of inputs."""
    leaves = []
    for value, references, offsets, logits in sets:
        wanted = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
        leaves.append((wanted, [wanted[0], references, *wanted[1:]]))
    run(leaves[0][1])  # what is loaded, or compiled, at first use
    order = [i % len(sets) for i in range(RUNS)]
    with torch.no_grad():
        forward = timed(lambda: [run(leaves[i][1]) for i in order], device) / RUNS
    outs = [run(tensors) for _, tensors in leaves]
    grads = [torch.ones_like(out) for out in outs]
    torch.autograd.grad(outs[0], leaves[0][0], grads[0], retain_graph=True)

    def backwards() -> None:
        for i in order:
            torch.autograd.grad(outs[i], leaves[i][0], grads[i], retain_graph=True)

    return forward, timed(backwards, device) / RUNS


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a GPU's own clock, without the host's launches."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD_CYCLES)  # the host launches all of it meanwhile
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def speed_of_copy(device: torch.device) -> float:
    source = torch.rand(2**28 if device.type == "cuda" else 2**22, device=device)  # zeros go faster
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(timed(lambda: target.copy_(source), device) for _ in range(9))


if __name__ == "__main__":
    command(main)
