"""A training step beside others of the same model: seconds, their parts and peak memory of each side in one run.

    python -m benchmarks.train_step [--config FILE] [--repeats N] [--device cuda --batch B --precision bf16]
                                    [--sides SIDE ...] [--published FOLDER] [--transformers] [--data SHARDS]

Images of 800 x 1066 with 20 boxes each; forward, matching and loss, backward, optimizer; frozen batch norm, random
weights. `ops`: with the compiled operators; `graphs`, `compiled-graphs`: so, on a GPU, with engine.cuda_graphs, and
engine.compile_layers. `ops.reference`: the same model in plain torch (TENFOLD_OP=reference: grid_sample, torch's
dropout and linear layers); `ops.reference.fp32`: so in float32, beside another --precision. On a CPU these sides keep
the memory that they free, as the trainer does; others with --keep-freed-memory. More sides, for --sides: `recomputed`,
`products-kept`: with engine.activation_checkpointing, and engine.keep_products; `engine`, `engine-graphs`,
`engine-compiled-graphs`: under the trainer's DeepSpeed engine.
--published, --transformers: other people's code, see benchmarks.rival_detectors, in float32 as published and, with
another --precision, also in that. Sides take turns, each in a process of its own, and medians are compared. On a GPU
every part is waited for, which the trainer does not do: `s` is of steps in a row, without, and `GPU busy` the share of
it in which kernels ran.
--data SHARDS: images from the trainer's loader instead, its workers and augmentation included; `data s` is what a step
waits for them and for their way to the device.
--profile FOLDER: what the GPU or CPU did in one step of `ops`: operators.txt, and a trace for TensorBoard
(tensorboard --logdir FOLDER, with torch-tb-profiler installed) or ui.perfetto.dev.
On a CPU such a step is also told by kind of layer: the profiler's own seconds of each operator.
Writes docs/results/train-step.{json,md}, on a GPU gpu-train-step.{json,md}.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import rival_detectors
from benchmarks.results import ROOT, write
from framework import config as configuration
from framework.config import Config
from framework.data.batch import Targets
from framework.data.loader import TrainLoader
from framework.engine.ds_config import EngineConfig, autocast, deepspeed_config, start_engine
from framework.engine.graphs import Graphs
from framework.engine.optimizer import build_optimizer
from framework.engine.ranks import init_ranks
from framework.errors import UsageError, command
from framework.losses import criterion as losses
from framework.losses.criterion import Criterion
from framework.models.build import build_detector
from framework.processes import keep_freed_memory
from framework.tracking.meter import peak_memory_gib
from ops.linear import pieces

Inputs = tuple[Tensor, Tensor | None, Targets]

SIZE_HW = (800, 1066)
BOXES = 20
STEPS = {"cpu": 3, "cuda": 12}  # of a process; the first quarter does not count
TOLD = ("kinds", "new pages, MiB")  # of one step, under the profiler
SLACK = 2**29  # float32 numbers
LOWER = " in lower precision"


@dataclass(frozen=True)
class Ours:
    """A side of ours. op: TENFOLD_OP. precision: None is the run's. recompute: as Detector.recompute_activations takes
    it. deepspeed: under the trainer's engine, ZeRO 1."""

    op: str = "compiled"
    precision: Literal["fp32"] | None = None
    recompute: dict[str, bool] | None = None
    graphs: bool = False
    compile_layers: bool = False
    deepspeed: bool = False


OURS = {
    "compiled-graphs": Ours(graphs=True, compile_layers=True),
    "graphs": Ours(graphs=True),
    "ops": Ours(),
    "ops.reference": Ours(op="reference"),
    "ops.reference.fp32": Ours(op="reference", precision="fp32"),
    "recomputed": Ours(recompute={}),
    "products-kept": Ours(recompute={"keep_products": True}),
    "engine-compiled-graphs": Ours(graphs=True, compile_layers=True, deepspeed=True),
    "engine-graphs": Ours(graphs=True, deepspeed=True),
    "engine": Ours(deepspeed=True),
}
USUAL = {"cpu": ["ops", "ops.reference"], "cuda": ["compiled-graphs", "graphs", "ops", "ops.reference"]}
# Operators by kind of layer. Those in POINTWISE are the backbone's where they work on maps; a linear layer copies its
# bias to where products are added, and sums up its gradient: matrices; the operator begins a gradient with zeros.
KINDS = {
    "backbone": ("conv", "max_pool"),
    "linear layers": (
        "aten::addmm",
        "aten::mm",
        "aten::bmm",
        "AddmmBackward",
        "MmBackward",
        "_linear_pointwise",
        "_Product",
    ),
    "norms": ("layer_norm", "group_norm"),
    "the operator": ("ms_deform_attn",),
}
POINTWISE = ("aten::clamp_min", "aten::threshold_backward", "aten::add_", "aten::mul", "aten::copy_")
OF_A_BIAS = ("aten::copy_", "aten::sum")
NARROWEST = 64  # channels of a map
HEADS = [8, 32]  # of the operator's values, and their width


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    two_stage = ROOT / "configs" / "coco_r50_deformable_two_stage.yaml"
    parser.add_argument("--config", type=Path, default=two_stage)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=STEPS, default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--published", type=Path, metavar="FOLDER", help="a checkout of the published code, a side more"
    )
    parser.add_argument("--transformers", action="store_true", help="the transformers library's model, a side more")
    parser.add_argument("--keep-freed-memory", action="store_true", help="others' code too, on a CPU")
    parser.add_argument("--sides", nargs="+", choices=OURS, metavar="SIDE",
                        help=f"of {', '.join(OURS)}")  # fmt: skip
    parser.add_argument("--data", metavar="SHARDS", help="a folder of shards to train on")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="of one step: operators and a trace")
    parser.add_argument("--here", metavar="SIDE", help="one side, in this process; prints JSON")
    args = parser.parse_args()
    if args.data and (args.published or args.transformers):
        raise UsageError("--data: not beside --published or --transformers, which are measured on drawn images")
    if args.here:
        print(
            json.dumps(Step(args.here, args).run(args.profile, tell_kinds=args.here == "ops" and args.device == "cpu"))
        )
        return 0
    sides = list(args.sides or USUAL[args.device])
    if args.device == "cpu" and args.precision != "fp32" and not args.sides:
        sides += ["ops.reference.fp32"]
    if args.profile and "ops" not in sides:
        raise UsageError(f"--profile: is of the side ops, found --sides {' '.join(sides)}")
    if args.device == "cuda" and args.keep_freed_memory:
        raise UsageError("--keep-freed-memory: is for --device cpu")
    if args.device == "cpu" and any(OURS[side].graphs for side in sides):
        raise UsageError(f"--sides {' '.join(sides)}: graphs are for --device cuda")
    for rival, asked in {"published": args.published, "transformers": args.transformers}.items():
        sides += [rival, *[rival + LOWER] * (args.precision != "fp32")] if asked else []
    runs: dict[str, list[dict[str, Any]]] = {}
    for i in range(args.repeats):
        for side in sides:
            try:
                found = in_process(side, args, profile=args.profile if i == 0 else None)
            except subprocess.CalledProcessError as error:
                if side in OURS:
                    raise
                print(f"{side}: {error}: left out", flush=True)
                continue
            runs.setdefault(side, []).append(found)
            print(f"{args.config.stem}, {args.precision}, batch {args.batch}, {side}: {median(runs[side])}", flush=True)
    record(args, parser, runs)
    return 0


def record(args: argparse.Namespace, parser: argparse.ArgumentParser, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Under a name of its own for each choice of sides: one comparison does not take another's place."""
    medians = {side: median(of_side) for side, of_side in runs.items()}
    known = dict.fromkeys(key for one in medians.values() for key in one)  # a side that lacks a column leaves it empty
    rows = [{"side": side, **known, **one} for side, one in medians.items()]
    first, *others = rows
    result = {"sides": rows, "images/s": args.batch / first["s"]}
    for other in others:
        for key in ("s", "peak GiB"):
            result[f"{key} of {other['side']}, of {first['side']}"] = other[key] / first[key]
    said = f"python -m benchmarks.train_step --config configs/{args.config.name} --repeats {args.repeats}"
    part = f"{args.config.stem}, {SIZE_HW[0]} x {SIZE_HW[1]}"
    usual = [parser.get_default(name) for name in ("device", "batch", "precision")]
    if [args.device, args.batch, args.precision] != usual:
        part, said = f"{part}, {args.precision}, batch {args.batch}", " ".join([said, *settings(args)])
    if args.data:
        part, said = f"{args.config.stem} with its data, {args.precision}, batch {args.batch}", f"{said} --data SHARDS"
    if args.sides:
        part, said = f"{part}, {', '.join(args.sides)}", f"{said} --sides {' '.join(args.sides)}"
    if args.published:
        part, said = f"{part}, beside the published code", f"{said} --published FOLDER"
    if args.transformers:
        part, said = f"{part}, beside transformers", f"{said} --transformers"
    if args.keep_freed_memory:
        part, said = f"{part}, freed memory kept", f"{said} --keep-freed-memory"
    if args.device == "cuda":
        write("gpu-train-step", "A training step on a GPU", part, result, said)
        return
    if "ops" in runs:
        shares = [run["kinds"] for run in runs["ops"]]
        mean = {kind: statistics.mean(one[kind] for one in shares) for kind in shares[0]}
        result["kinds"] = [{"kind of layer, ops": kind, "of a step": share} for kind, share in mean.items()]
        result["new pages of that step, MiB"] = statistics.mean(run["new pages, MiB"] for run in runs["ops"])
    result |= {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    write("train-step", "A training step on the CPU", part, result, said)


def settings(args: argparse.Namespace) -> list[str]:
    return ["--device", args.device, "--batch", str(args.batch), "--precision", args.precision]


def in_process(side: str, args: argparse.Namespace, profile: Path | None) -> dict[str, Any]:
    line = [sys.executable, "-m", "benchmarks.train_step", "--here", side, "--config", str(args.config)]
    line += [*settings(args), *(["--published", str(args.published)] if args.published else [])]
    line += ["--data", args.data] if args.data else []
    line += ["--keep-freed-memory"] * args.keep_freed_memory
    if profile and side == "ops":
        line += ["--profile", str(profile)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TENFOLD_OP": OURS[side].op if side in OURS else "", "PYTHONPATH": path}
    printed = subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])  # libraries print too


def median(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(number for run in runs for number in run[key]) for key in runs[0] if key not in TOLD}


class Step:
    """The training step of a side, on drawn images and boxes or on those of a loader."""

    def __init__(self, side: str, args: argparse.Namespace) -> None:
        config = configuration.load(args.config, [])
        as_published = OURS[side].precision if side in OURS else None if side.endswith(LOWER) else "fp32"
        self.device = torch.device(args.device)
        self.precision = EngineConfig(precision=as_published or args.precision)
        self.matching_s: list[float] = []
        if self.device.type == "cpu" and (side in OURS or args.keep_freed_memory):
            keep_freed_memory()
        torch.manual_seed(0)
        if args.data:
            loader = TrainLoader(replace(config.data, train=args.data), seed=0, global_batch=args.batch,
                                 micro_batch=args.batch, rank=0, world=1)  # fmt: skip
            self.batches = loaded(loader, self.device)
        else:
            self.batches = itertools.repeat(drawn(args.batch, self.device, without_mask=side in OURS))
        self.model, self.forward, self.loss_of = self.side(side.removesuffix(LOWER), config, args.published)
        self.model.train().to(self.device)
        self.autocast = autocast(self.precision, self.device)
        if side not in OURS:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), config.optim.lr)
        else:
            optimizer = build_optimizer(self.model, config.optim, self.device)
        self.backward, self.update = Tensor.backward, [optimizer.step, optimizer.zero_grad]
        if side in OURS and OURS[side].deepspeed:
            init_ranks()
            engine = start_engine(self.model, optimizer, deepspeed_config(
                self.precision, device=self.device, global_batch=args.batch, micro_batch=args.batch, accumulation=1,
                clip_norm=config.optim.clip_norm,
            ))  # fmt: skip
            self.forward, self.backward, self.update = engine, engine.backward, [engine.step]
            self.autocast = torch.autocast(self.device.type, enabled=False)  # the engine has its own
        if side in OURS and OURS[side].graphs:
            Graphs(self.model, compile_layers=OURS[side].compile_layers)

    def side(self, side: str, config: Config, checkout: Path | None) -> rival_detectors.Rival:
        if side == "published":
            assert checkout is not None
            return rival_detectors.published(checkout.resolve(), config, self.device)
        if side == "transformers":
            return rival_detectors.transformers(config, next(self.batches)[2])
        model, criterion = build_detector(config.model), Criterion(config.loss, config.model.classification)
        losses.match = self.timed(losses.match)
        if (recompute := OURS[side].recompute) is not None:
            model.recompute_activations(**recompute)

        def loss_of(predictions: Any, targets: Targets) -> Tensor:
            return criterion.total(criterion(predictions, targets, num_boxes=float(len(targets.labels_N))))

        return model, model, loss_of

    def timed(self, match: Callable[..., Any]) -> Callable[..., Any]:
        def matched(*arguments: Any, **named: Any) -> Any:
            began = self.clock()
            found = match(*arguments, **named)
            self.matching_s[-1] += self.clock() - began
            return found

        return matched

    def take(self, clock: Callable[[], float]) -> list[float]:
        """The times between its parts."""
        self.clock = clock
        self.matching_s.append(0.0)
        times = [clock()]
        images, mask, targets = next(self.batches)
        times.append(clock())
        with self.autocast:
            predictions = self.forward(images, mask)
        times.append(clock())
        loss = self.loss_of(predictions, targets)
        times.append(clock())
        self.backward(loss)
        times.append(clock())
        for update in self.update:
            update()
        return [*times, clock()]

    def waited(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, profile: Path | None, tell_kinds: bool) -> dict[str, Any]:
        """Seconds of steps, and of their parts; peak memory of the device, on a CPU of the process."""
        count = STEPS[self.device.type]
        parts = [self.take(self.waited) for _ in range(count)][max(count // 4, 1) :]
        names = ("data s", "forward s", "matching and loss s", "backward s", "optimizer s")
        seconds = {name: [times[i + 1] - times[i] for times in parts] for i, name in enumerate(names)}
        if any(self.matching_s):
            seconds["of it matching s"] = self.matching_s[-len(parts) :]
        if self.device.type == "cuda":
            began = self.waited()
            for _ in range(count):
                self.take(time.perf_counter)
            found = {"s": [(self.waited() - began) / count], "GPU busy": []}
        else:
            found = {"s": [times[-1] - times[0] for times in parts]}
        found |= seconds | {"peak GiB": [peak_memory_gib(self.device)]}  # before a profiler takes some
        if self.device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                self.take(time.perf_counter)
                self.waited()
            kernels_s = sum(event.self_device_time_total for event in trace.key_averages()) / 1e6
            found["GPU busy"].append(kernels_s / found["s"][0])
        if not tell_kinds and not profile:
            return found
        trace, step_s, new_pages = self.profiled()
        if profile:
            order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            table = trace.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
            torch.profiler.tensorboard_trace_handler(str(profile))(trace)
            (profile / "operators.txt").write_text(table + "\n")
        return found | {"kinds": kinds(trace, step_s), "new pages, MiB": new_pages * resource.getpagesize() / 2**20}

    def profiled(self) -> tuple[torch.profiler.profile, float, int]:
        """A step, its seconds, and how many pages of memory it touched for the first time: few, like a step without the
        profiler, if there is memory for the profiler's own that has been touched before."""
        if self.device.type == "cpu":
            torch.ones(SLACK)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with torch.profiler.profile(record_shapes=True) as trace:
            times = self.take(self.waited)
        return trace, times[-1] - times[0], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def drawn(count: int, device: torch.device, *, without_mask: bool) -> Inputs:
    """Images, their mask (the trainer has none for images of one size) and their boxes."""
    images = torch.randn(count, 3, *SIZE_HW, device=device)
    mask = None if without_mask else torch.zeros(count, *SIZE_HW, dtype=torch.bool, device=device)
    boxes = torch.cat([torch.rand(count * BOXES, 2) * 0.6 + 0.2, torch.rand(count * BOXES, 2) * 0.3 + 0.05], dim=1)
    labels = torch.randint(0, 91, (count * BOXES,))
    return images, mask, Targets(labels, boxes, [BOXES] * count, torch.ones(count, dtype=torch.bool)).to(device)


def loaded(loader: TrainLoader, device: torch.device) -> Iterator[Inputs]:
    for epoch in itertools.count():
        for (batch,) in loader.epoch(epoch, 0):
            yield *batch.inputs(device), batch.targets.to(device)


def kinds(trace: torch.profiler.profile, step_s: float) -> dict[str, float]:
    """The share of a step that the operators of each kind of layer took on the CPU, and all the rest."""
    taken: Counter[str | None] = Counter()
    for event in trace.key_averages(group_by_input_shape=True):
        shape = event.input_shapes[0] if event.input_shapes else []
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), None)
        if event.key.startswith(POINTWISE) and len(shape) == len("BCHW") and shape[1] >= NARROWEST:
            kind = "backbone"
        of_pieces = event.key == "aten::sum" and len(shape) == len("PMK") and shape[0] == pieces()
        if of_pieces or event.key in OF_A_BIAS and len(shape) == len("NC"):
            kind = "linear layers"
        if event.key == "aten::fill_" and shape[2:] == HEADS:
            kind = "the operator"
        taken[kind] += event.self_cpu_time_total / 1e6
    shares = {kind: taken[kind] / step_s for kind in KINDS}
    return shares | {"the rest": 1 - sum(shares.values())}


if __name__ == "__main__":
    command(main)
