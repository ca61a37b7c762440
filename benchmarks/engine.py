"""What the engine may cost and change: losses over ZeRO stages and worlds, resuming anywhere, saving, DeepSpeed itself.

    python -m benchmarks.engine [--parts losses elastic save overhead processor processes]

losses: 20 steps of a small detector on drawn images, in fp32 and bf16, beside a plain torch loop. What chooses (the
    matcher, the proposals of a two-stage model) may choose otherwise after a difference in the last bit.
elastic: resumed inside an epoch, from every ZeRO stage on 1, 2, 4 processes at every stage on 1, 2, 4: 144 pairs.
save: R50 base; what a save takes from the step, on the disk, and when it is resumed from.
overhead: R50 base, 480 x 640, one image: a step through DeepSpeed (ZeRO 0 and 1, and 1 as DeepSpeed does it, with its
    hooks and buckets, but for the norm of gradients, which is ours), and a plain torch loop, in turns; where it goes.
processor: gradients and the update with little arithmetic: R50 base with layers of few numbers, whose gradients are
    given, through ZeRO 1 as DeepSpeed does it, ours, and a plain torch loop, in turns.
processes: R50 base, 480 x 640, one image for each of two processes with a thread each: through DeepSpeed together (ZeRO
    0 and 1), both at once for themselves, and one while the other waits, in turns.
Writes docs/results/engine.{json,md}.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.results import ROOT, write
from data_tools import convert, synth
from framework import config as configuration
from framework.data.batch import Batch, blank_batch
from framework.data.loader import DataConfig, TrainLoader
from framework.engine import checkpoint, ds_config
from framework.engine.checkpoint import Checkpoints
from framework.engine.ds_config import EngineConfig, deepspeed_config, start_engine
from framework.engine.guard import Guard, GuardConfig
from framework.engine.optimizer import OptimConfig, build_optimizer
from framework.engine.ranks import Ranks
from framework.engine.step import draw_seed, train_step
from framework.losses.criterion import Criterion
from framework.losses.matcher import LossConfig
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig, build_detector
from framework.models.detector import Detector
from tests.distributed import run_ranks

STAGES, WORLDS = (0, 1, 2, 3), (1, 2, 4)
STEPS, GLOBAL_BATCH, MICRO_BATCH, SEED = 20, 8, 2, 7
IMAGES = 200  # 25 steps an epoch
RESUMED_AT = (2, 9)  # between these a step is drawn for each source

TURNS = 22  # of sides that are compared; the first one does not count

SMALL = ModelConfig(
    num_classes=3, width=32, num_heads=2, encoder_layers=1, decoder_layers=2, ffn_width=64, num_queries=30,
    backbone=BackboneConfig("resnet10", norm="group", width=16),
)  # fmt: skip
MODELS = {"base": SMALL, "two-stage": replace(SMALL, queries="proposals", refine_boxes=True)}
OPTIM = OptimConfig(lr=2e-4)
WIDE = configuration.load(ROOT / "configs/coco_r50_deformable.yaml", ["model.num_classes=91"])
NARROW = replace(WIDE.model, width=32, ffn_width=32, backbone=replace(WIDE.model.backbone, width=16, weights=None))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[Path], dict[str, Any]]]
    parts = {"losses": losses, "elastic": elastic, "save": save, "overhead": overhead, "processor": processor,
             "processes": processes}  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    args = parser.parse_args()
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            result = parts[part](Path(folder)) | {"minutes": (time.perf_counter() - began) / 60}
        write("engine", "The engine", part, result, f"python -m benchmarks.engine --parts {part}")
        print(part, *(f"{key}: {value}" for key, value in result.items() if not isinstance(value, list)), sep="\n  ")
    return 0


def drawn_shards(folder: Path) -> Path:
    """Small synthetic images as shards."""
    synth.main(
        ["--out", str(folder / "drawn"), "--images", str(IMAGES), "--val", "1", "--size", "96", "--classes", "3"]
    )
    shards = folder / "shards"
    convert.main(["--images", str(folder / "drawn/images"), "--annotations",
                  str(folder / "drawn/annotations/instances_train.json"), "--out", str(shards)])  # fmt: skip
    return shards


class Run:
    """A small detector in training, from its seed or from a checkpoint; the same images in any world."""

    def __init__(
        self, ranks: Ranks, shards: Path, stage: int, precision: str = "fp32", folder: Path | None = None,
        model: str = "base",
    ):  # fmt: skip
        data = DataConfig(train=str(shards), workers=0, sizes=[64, 80, 96], max_size=128, crop_resize=[])
        self.ranks, self.step = ranks, 0
        self.train_set = TrainLoader(data, seed=SEED, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH,
                                     rank=ranks.rank, world=ranks.world)  # fmt: skip
        torch.manual_seed(SEED if folder is None else 0)
        detector = build_detector(MODELS[model])
        if folder is not None:
            checkpoint.load_weights(folder, detector)
        self.engine = start_engine(detector, build_optimizer(detector, OPTIM, ranks.device), deepspeed_config(
            EngineConfig(zero_stage=stage, precision=precision), device=ranks.device, global_batch=GLOBAL_BATCH,
            micro_batch=MICRO_BATCH, accumulation=self.train_set.accumulation, clip_norm=OPTIM.clip_norm,
        ))  # fmt: skip
        if folder is not None:
            self.step = checkpoint.load_optimizer(folder, self.engine)["step"]
        self.criterion, self.guard = Criterion(LossConfig(), "focal"), Guard(GuardConfig(), ranks)
        self.image_ids: list[int] = []

    def take(self, steps: int, after: Callable[[], None] = lambda: None) -> list[float]:
        """The mean loss of each step, the same on every rank; all are of the first epoch."""
        found = []
        for batches in itertools.islice(self.train_set.epoch(0, self.step), steps):
            metrics = train_step(self.engine, self.criterion, batches, ranks=self.ranks, seed=SEED, step=self.step,
                                 guard=self.guard)  # fmt: skip
            found.append(self.ranks.sum(metrics["loss/total"]).item() / self.ranks.world)
            self.image_ids += [one for batch in batches for one in batch.image_ids]
            self.step += 1
            after()
        return found


# losses


def losses(folder: Path) -> dict[str, Any]:
    shards = drawn_shards(folder)
    plain = {model: plain_loop(shards, model) for model in MODELS}
    rows = []
    for model, precision, world, stages in (
        ("base", "fp32", 1, STAGES), ("base", "fp32", 2, STAGES), ("base", "fp32", 4, STAGES),
        ("two-stage", "fp32", 2, STAGES), ("base", "bf16", 2, STAGES[1:]),
    ):  # fmt: skip
        for stage, found in zip(stages, run_ranks(world, losses_of, shards, model, precision, stages)[0], strict=True):
            steps = [abs(a - b) / abs(b) for a, b in zip(found, plain[model], strict=True)]
            rows.append(
                {
                    "model": model,
                    "precision": precision,
                    "processes": world,
                    "ZeRO": stage,
                    "last loss": found[-1],
                    "from the plain loop": max(steps),
                    "steps within 1e-6": first_above(steps, 1e-6),
                }
            )
    return {"runs": rows, "steps": STEPS}


def first_above(values: list[float], limit: float) -> int:
    """How many there are before the first one above the limit."""
    return next((i for i, value in enumerate(values) if value > limit), len(values))


def losses_of(ranks: Ranks, shards: Path, model: str, precision: str, stages: Iterable[int]) -> list[list[float]]:
    return [Run(ranks, shards, stage, precision, model=model).take(STEPS) for stage in stages]


def plain_loop(shards: Path, model_name: str) -> list[float]:
    """The same run without DeepSpeed and without anything of the engine, in one process."""
    data = DataConfig(train=str(shards), workers=0, sizes=[64, 80, 96], max_size=128, crop_resize=[])
    train_set = TrainLoader(data, seed=SEED, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, rank=0, world=1)
    torch.manual_seed(SEED)
    model, criterion, found = build_detector(MODELS[model_name]), Criterion(LossConfig(), "focal"), []
    optimizer = build_optimizer(model, OPTIM, torch.device("cpu"))
    for step, batches in enumerate(itertools.islice(train_set.epoch(0), STEPS)):
        num_boxes = max(1.0, sum(len(batch.targets.labels_N) for batch in batches) / len(batches))
        mean = 0.0
        for i, batch in enumerate(batches):
            torch.manual_seed(draw_seed(SEED, step, i))
            loss = criterion.total(criterion(model(*batch.inputs("cpu")), batch.targets, num_boxes)) / len(batches)
            loss.backward()
            mean += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(mean)
    return found


def largest_difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


# elastic


def elastic(folder: Path) -> dict[str, Any]:
    shards, runs = drawn_shards(folder), folder / "runs"
    whole = {}  # of each source: where it was saved, its losses from there on, the images it had seen
    for world in WORLDS:
        for rank in (found := run_ranks(world, sources, shards, runs)):
            for stage, (step, after, ids) in rank.items():
                whole.setdefault((stage, world), (step, after, []))[2].extend(ids)
        assert len(found) == world
    rows, exact, worst, ids_wrong = [], 0, 0.0, 0
    lengths = sorted(len(after) for _, after, _ in whole.values())
    for world in WORLDS:
        ranks = run_ranks(world, targets, shards, runs)
        for source, stage in ranks[0]:
            step, expected, before = whole[source]
            resumed = ranks[0][source, stage][0]
            ids = before + [one for rank in ranks for one in rank[source, stage][1]]
            difference = largest_difference(resumed, expected)
            same = source == (stage, world)
            exact += same and resumed == expected
            worst = max(worst, difference)
            ids_wrong += len(ids) != len(set(ids)) or len(ids) != (step + len(resumed)) * GLOBAL_BATCH
            rows.append({"from ZeRO": source[0], "on": source[1], "to ZeRO": stage, "on processes": world, "at step":
                         step, "largest relative difference": difference})  # fmt: skip
    return {"pairs of one kind": summary(rows), "pairs": len(rows), "steps after it":
            f"{lengths[0]} to {lengths[-1]}",
            "same stage and world, bit-equal": f"{exact} of {len(whole)}", "largest relative difference": worst,
            "pairs in which an image was missed or seen twice": ids_wrong}  # fmt: skip


def sources(ranks: Ranks, shards: Path, runs: Path) -> dict[int, tuple[int, list[float], list[int]]]:
    """Of each stage: the step it was saved at, the losses after it, the images of this rank before it."""
    found = {}
    for stage in STAGES:
        run = Run(ranks, shards, stage)
        step = RESUMED_AT[0] + (3 * stage + ranks.world) % (RESUMED_AT[1] - RESUMED_AT[0] + 1)
        run.take(step)
        ids = list(run.image_ids)
        with Checkpoints(runs / f"{stage}-{ranks.world}", ranks, set) as checkpoints:
            checkpoints.save(run.engine, {"step": step})
            found[stage] = step, run.take(STEPS), ids
            checkpoints.finish()
    return found


def targets(ranks: Ranks, shards: Path, runs: Path) -> dict[tuple[tuple[int, int], int], tuple[list[float], list[int]]]:
    """Of each source and each stage: the losses of the run that went on from it here, and its images of this rank."""
    found = {}
    for source, stage in itertools.product(itertools.product(STAGES, WORLDS), STAGES):
        folder = checkpoint.newest_on_all(runs / "{}-{}".format(*source), ranks)
        run = Run(ranks, shards, stage, folder=folder)
        found[source, stage] = run.take(STEPS), run.image_ids
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest difference by what changed."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        changed = [name for name, a, b in (("stage", "from ZeRO", "to ZeRO"), ("world", "on", "on processes"))
                   if row[a] != row[b]]  # fmt: skip
        kinds.setdefault(" and ".join(changed) or "nothing", []).append(row["largest relative difference"])
    return [{"what changes": kind, "pairs": len(found), "largest relative difference": max(found)}
            for kind, found in kinds.items()]  # fmt: skip


# save, overhead


def engine_of(ranks: Ranks, stage: int = 1, config: ModelConfig = WIDE.model, *, ours: bool = True) -> Any:
    """ours: at stage 1 with all gradients at once; otherwise as DeepSpeed does it."""
    torch.manual_seed(SEED)
    model = build_detector(config)
    with mock.patch.object(ds_config, "at_once", ds_config.at_once if ours else lambda *_: False):
        return start_engine(model, build_optimizer(model, OPTIM, ranks.device), deepspeed_config(
            EngineConfig(zero_stage=stage, precision="fp32"), device=ranks.device, global_batch=ranks.world,
            micro_batch=1, accumulation=1, clip_norm=OPTIM.clip_norm,
        ))  # fmt: skip


def wide_batch() -> Batch:
    return blank_batch([(480, 640)], 7)  # as many boxes as COCO has in an image


def save(folder: Path) -> dict[str, Any]:
    return run_ranks(1, save_alone, folder)[0]


def save_alone(ranks: Ranks, folder: Path) -> dict[str, Any]:
    engine, criterion, guard = engine_of(ranks), Criterion(WIDE.loss, "focal"), Guard(GuardConfig(), ranks)

    def step_s() -> float:
        began = time.perf_counter()
        train_step(engine, criterion, [wide_batch()], ranks=ranks, seed=0, step=0, guard=guard)
        return time.perf_counter() - began

    step_s()
    quiet, waited, beside, written = [], [], [], []
    for number in range(1, 6):
        quiet.append(step_s())
        with Checkpoints(folder, ranks, lambda steps: set(steps[:1])) as checkpoints:
            began = time.perf_counter()
            checkpoints.save(engine, {"step": number})
            waited.append(time.perf_counter() - began)
            beside.append(step_s())
            checkpoints.finish()
            written.append(time.perf_counter() - began)
    path = checkpoint.newest(folder)
    assert path is not None
    began = time.perf_counter()
    checkpoint.newest(folder)
    verified = time.perf_counter()
    model = build_detector(WIDE.model)
    built = time.perf_counter()
    checkpoint.load_weights(path, model)
    checkpoint.load_optimizer(path, engine)
    ended = time.perf_counter()
    step = statistics.median(quiet)
    return {
        "a step (s)": step, "training waits for a save (s)": statistics.median(waited),
        "of a step": statistics.median(waited) / step, "of 1000 steps": statistics.median(waited) / (1000 * step),
        "a step while it is written, of one without": statistics.median(beside) / step,
        "on the disk after (s, at most)": statistics.median(written),
        "size (MiB)": sum(file.stat().st_size for file in path.iterdir()) / 2**20,
        "resuming: verified (s)": verified - began, "resuming: read (s)": ended - built,
    }  # fmt: skip


def in_turns(ranks: Ranks, sides: dict[str, Callable[[], Any]]) -> Iterator[tuple[int, str, float]]:
    """Turn, side and seconds until all ranks are done; none comes always after the same one."""
    for turn in range(TURNS):
        for name in (*sides,)[turn % len(sides) :] + (*sides,)[: turn % len(sides)]:
            ranks.barrier()
            began = time.perf_counter()
            sides[name]()
            ranks.barrier()
            yield turn, name, time.perf_counter() - began


def plain_side(ranks: Ranks, config: ModelConfig = WIDE.model) -> tuple[Detector, Callable[[], None]]:
    """R50 base without DeepSpeed, and what updates it after backward."""
    torch.manual_seed(SEED)
    model = build_detector(config)
    optimizer = build_optimizer(model, OPTIM, ranks.device)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return model, update


def overhead(folder: Path) -> dict[str, Any]:
    return run_ranks(1, overhead_alone)[0]


def overhead_alone(ranks: Ranks) -> dict[str, Any]:
    batch, criterion, guard = wide_batch(), Criterion(WIDE.loss, "focal"), Guard(GuardConfig(), ranks)
    model, update = plain_side(ranks)
    engines = {"ZeRO 0": engine_of(ranks, 0), "ZeRO 1": engine_of(ranks),
               "ZeRO 1 as DeepSpeed does it": engine_of(ranks, ours=False)}  # fmt: skip

    spent: dict[str, list[float]] = {}  # of the step that is taken: backward, update

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any) -> Any:
            began = time.perf_counter()
            found = call(*args)
            spent.setdefault(part, []).append(time.perf_counter() - began)
            return found

        return instead

    def plain() -> None:
        predictions = model(*batch.inputs(ranks.device))
        timed("backward", criterion.total(criterion(predictions, batch.targets, 7.0)).backward)()
        timed("update", update)()

    for engine in engines.values():
        engine.backward, engine.step = timed("backward", engine.backward), timed("update", engine.step)

    def through(name: str) -> None:
        train_step(engines[name], criterion, [batch], ranks=ranks, seed=0, step=0, guard=guard)

    sides = {"plain": plain} | {name: partial(through, name) for name in engines}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn, name, step_s in in_turns(ranks, sides):
        if turn:
            found[name].append({"step": step_s} | {part: sum(times) for part, times in spent.items()})
        spent.clear()
    rows = [{"side": name} | {f"{part} (s)": statistics.median(one[part] for one in times) for part in times[0]}
            for name, times in found.items()]  # fmt: skip
    ratios = {name: [a["step"] / b["step"] for a, b in zip(found[name], found["plain"], strict=True)] for name in sides}
    return {"sides": rows} | {
        f"{name}, of a plain step": f"{statistics.median(one):.3f} (pairs {min(one):.3f} to {max(one):.3f})"
        for name, one in ratios.items()
        if name != "plain"
    }


def processor(folder: Path) -> dict[str, Any]:
    return run_ranks(1, processor_alone)[0]


def processor_alone(ranks: Ranks) -> dict[str, Any]:
    torch.set_num_threads(1)  # the arithmetic that is left takes none from another
    engines = {"as DeepSpeed does it": engine_of(ranks, config=NARROW, ours=False),
               "ours": engine_of(ranks, config=NARROW)}  # fmt: skip
    model, update = plain_side(ranks, NARROW)
    for one in (model, *(engine.module for engine in engines.values())):
        one.forward = Given(one)

    def plain() -> None:
        model().backward()
        update()

    def through(name: str) -> None:
        engines[name].backward(engines[name]())
        engines[name].step()

    sides = {"plain": plain} | {name: partial(through, name) for name in engines}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn, name, step_s in in_turns(ranks, sides):
        if turn:
            found[name].append(1e3 * step_s)
    weights = [one for one in model.parameters() if one.requires_grad]
    return {
        "sides": [{"side": name, "a step (ms)": statistics.median(times)} for name, times in found.items()],
        "weights": len(weights), "numbers, millions": sum(map(torch.Tensor.numel, weights)) / 1e6,
        "ours, of DeepSpeed's": statistics.median(
            a / b for a, b in zip(found["ours"], found["as DeepSpeed does it"], strict=True)
        ),
    }  # fmt: skip


class Given:
    """A loss whose gradients are there already, in one piece, as CUDA graphs leave them."""

    def __init__(self, model: Detector) -> None:
        self.weights = [one for one in model.parameters() if one.requires_grad]
        self.gradients = 1e-3 * torch.randn(sum(map(torch.Tensor.numel, self.weights)))

    def __call__(self) -> torch.Tensor:
        return _Given.apply(self, *self.weights)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Given, *weights: torch.Tensor) -> torch.Tensor:
        ctx.given = given
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = ctx.given
        return None, *torch._utils._unflatten_dense_tensors(given.gradients.clone(), given.weights)


def processes(folder: Path) -> dict[str, Any]:
    return run_ranks(2, processes_of_two)[0]


def processes_of_two(ranks: Ranks) -> dict[str, Any]:
    batch, criterion, guard = wide_batch(), Criterion(WIDE.loss, "focal"), Guard(GuardConfig(), ranks)
    model, update = plain_side(ranks)
    engines = {stage: engine_of(ranks, stage) for stage in (0, 1)}

    def alone() -> None:
        criterion.total(criterion(model(*batch.inputs(ranks.device)), batch.targets, 7.0)).backward()
        update()

    def through(stage: int) -> None:
        train_step(engines[stage], criterion, [batch], ranks=ranks, seed=0, step=0, guard=guard)

    sides = {
        "one, while the other waits": lambda: alone() if ranks.rank == 0 else None,
        "both, each for itself": alone,
        "together, ZeRO 0": lambda: through(0),
        "together, ZeRO 1": lambda: through(1),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn, name, step_s in in_turns(ranks, sides):
        if turn:
            found[name].append(step_s)
    one, *_ = found.values()
    rows = [{"side": name, "step (s)": statistics.median(times)} for name, times in found.items()]
    return {"sides": rows} | {
        f"images a second, times those of one: {name}": statistics.median(
            2 * a / b for a, b in zip(one, times, strict=True)
        )
        for name, times in found.items()
        if times is not one
    }


if __name__ == "__main__":
    raise SystemExit(main())
