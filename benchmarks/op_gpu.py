"""The operator on a GPU against the usual ways, and against published kernels that are built there.

    python -m benchmarks.op_gpu [--batches 1 2 4 8] [--published DIR]

Shapes of benchmarks.op: the encoder with the initial offsets (a direction for each head, 1 to 4 pixels) and noise of 1
and of 4 pixels, and with points anywhere, the worst case; the decoder. float32, bfloat16, float16; forward, and
backward to value, offsets and logits. Each side works on several sets of inputs in turn, together larger than the
caches. `fused` as it runs; `by corners`: without the sums by pixels; `deterministic`; `core`: ops.ms_deform_attn, with
softmax and locations in torch; `stacked`: grid_sample, and the same through torch.compile.
--published: a folder with the module MultiScaleDeformableAttention as its setup.py builds it (float32; softmax and
locations in torch). `of memory`: the bytes that must be moved once, over the time, over the speed of a copy.
Writes docs/results/gpu-op.{json,md}.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.op import QUERIES, SIZES_HW, TITLE_ON_GPU, E, L, M, P, S, arguments, name_of, stacked
from benchmarks.results import write
from ops import compiled, library, reference

CACHES_BYTES = 100e6  # of the largest GPU in use: 50 MB on an H100, twice for what is written
RUNS, REPEATS = 10, 5
Run = Callable[[list[Tensor]], Tensor]
Settings = Callable[[], AbstractContextManager]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--published", type=Path, help="folder of the built module MultiScaleDeformableAttention")
    args = parser.parse_args()
    device = torch.device("cuda")
    copy_bytes_per_s = speed_of_copy(device)
    rows = []
    for shape in ("encoder, noise 1", "encoder, noise 4", "encoder, anywhere", "decoder"):
        for batch in args.batches:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                rows += rows_of(shape, batch, dtype, device, copy_bytes_per_s, args.published)
                print(rows[-1], flush=True)
    result = {"sides": rows, "copy, GB/s": copy_bytes_per_s / 1e9, "adds, G/s": adds_per_s(device) / 1e9}
    write("gpu-op", TITLE_ON_GPU, "times", result, "python -m benchmarks.op_gpu")
    return 0


def sides(dtype: torch.dtype, published: Path | None) -> dict[str, tuple[Run, Settings]]:
    """What to run, and in which settings."""

    def fused(tensors: list[Tensor]) -> Tensor:
        return compiled.fused_ms_deform_attn(tensors[0], SIZES_HW, *tensors[1:])

    def core(tensors: list[Tensor]) -> Tensor:
        value, *others = tensors
        return compiled.ms_deform_attn(value, SIZES_HW, *reference.sampling(*others, SIZES_HW, torch.float32))

    given: dict[str, tuple[Run, Settings]] = {
        "fused": (fused, nullcontext),
        "by corners": (fused, by_corners),
        "deterministic": (fused, deterministic),
        "core": (core, nullcontext),
        "stacked": (stacked, nullcontext),
        "stacked, compiled": (torch.compile(stacked), nullcontext),
    }
    if published and dtype == torch.float32:
        given["published"] = (published_kernel(published), nullcontext)
    return given


@contextmanager
def by_corners():
    library.sum_pixels_on_gpu(False)
    yield
    library.sum_pixels_on_gpu(True)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def published_kernel(folder: Path) -> Run:
    """The published extension behind the arguments of the fused operator."""
    sys.path.insert(0, str(folder))
    import MultiScaleDeformableAttention as extension

    class Published(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return extension.ms_deform_attn_forward(*tensors, 64)

        @staticmethod
        def backward(ctx, grad):
            value, shapes, starts, locations, weights = ctx.saved_tensors
            grads = extension.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad.contiguous(), 64)
            return grads[0], None, None, *grads[1:]

    shapes = torch.tensor(SIZES_HW, device="cuda")
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])

    def run(tensors: list[Tensor]) -> Tensor:
        value, *others = tensors
        return Published.apply(value, shapes, starts, *reference.sampling(*others, SIZES_HW, torch.float32))

    return run


def rows_of(
    shape: str, batch: int, dtype: torch.dtype, device: torch.device, copy_bytes_per_s: float, published: Path | None
) -> list[dict[str, Any]]:
    sets = input_sets(shape, batch, dtype, device)
    given = sides(dtype, published)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in given}
    for _ in range(REPEATS):  # in turn
        for name, (run, settings) in given.items():
            with settings():
                seconds[name].append(seconds_of(run, sets, device))
    medians = {name: [statistics.median(way) for way in zip(*runs, strict=True)] for name, runs in seconds.items()}
    forward_bytes = sum(tensor.nbytes for tensor in sets[0]) + output_bytes(sets[0])
    own = medians["fused"]
    return [
        {
            "shape": shape,
            "batch": batch,
            "dtype": name_of(dtype),
            "side": name,
            "forward us": 1e6 * forward,
            "backward us": 1e6 * backward,
            "fused is faster, forward": forward / own[0],
            "fused is faster, backward": backward / own[1],
            "forward, of memory": forward_bytes / forward / copy_bytes_per_s,
        }
        for name, (forward, backward) in medians.items()
    ]


def input_sets(shape: str, batch: int, dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """Value, references, offsets, logits, as often as it takes to fill more than the caches."""
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
    copies = max(2, math.ceil(CACHES_BYTES / one[0].nbytes))
    return [one, *([tensor.clone() for tensor in one] for _ in range(copies - 1))]


def output_bytes(tensors: list[Tensor]) -> int:
    value, _, offsets, _ = tensors
    return value.element_size() * offsets.shape[0] * offsets.shape[1] * M * E


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
    """Seconds of a GPU's own clock, which the host's launches do not stretch where they are ahead."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def speed_of_copy(device: torch.device) -> float:
    source = torch.zeros(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(timed(lambda: target.copy_(source), device) for _ in range(9))


def adds_per_s(device: torch.device) -> float:
    """float32 adds to memory at random places, which decide the backward: torch's index_add_ of rows of 32."""
    rows = torch.randint(S * M, (2**20,), device=device)
    source, sums = torch.ones(len(rows), E, device=device), torch.zeros(S * M, E, device=device)
    sums.index_add_(0, rows, source)
    took = statistics.median(timed(lambda: sums.index_add_(0, rows, source), device) for _ in range(5))
    return source.numel() / took


if __name__ == "__main__":
    sys.exit(main())
