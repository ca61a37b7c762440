"""A training run on N x G GPUs before it starts: batch, schedule, memory, traffic, who gets which images.

Nothing is trained and no rank is started: it runs on a laptop. Weights, gradients, optimizer and traffic are
arithmetic over what DeepSpeed keeps and sends (framework/engine/costs.py); activations are counted by running the
detector on tensors without content; the assignment of images is carried out, for one epoch and every rank.
"""

import argparse
import contextlib
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framework import config as configuration
from framework.config import Config
from framework.data.batch import padded_side
from framework.data.loader import TrainLoader
from framework.data.order import MASKED, epoch_order, rank_share, step_micro_batches, steps_per_epoch
from framework.data.remote import is_remote
from framework.engine import costs
from framework.engine.ds_config import deepspeed_config
from framework.engine.graphs import GRAIN
from framework.engine.optimizer import learning_rates
from framework.errors import FAILED, UsageError, command
from framework.files import refuse_folder_at
from framework.models.build import build_detector
from framework.tracking.console import progress, publish, setup_logging
from framework.tracking.plan_text import (
    assignment_text,
    batch_text,
    memory_text,
    pays_text,
    schedule_text,
    traffic_text,
)
from framework.train import refuse_too_many_boxes, with_num_classes

EXAMPLE = """examples:
  python -m framework.plan --config configs/coco_r50_deformable.yaml --nodes 8 --gpus-per-node 8 \\
      --images 118287 train.global_batch=64 train.micro_batch=1
  python -m framework.plan --config configs/coco_r50_deformable.yaml --nodes 2 --gpus-per-node 8 \\
      --backbone-parameters 300e6 --gpu-gib 16 model.backbone.name=resnet101

Tables and, as the last line, their JSON go to stdout. GPUs are taken to be good at bf16 (engine.precision=fp32 for
others). What CUDA, cuDNN and the allocator take, and the loss's own intermediate results, are not in the memory."""

GIB = 2**30
FLOAT32_BYTES = 4
GPUS_GB = (16, 24, 40, 80, 141)  # of V100 and T4, 4090, A100, A100 and H100, H200
COUNTED = 0.9  # of a GPU's memory: the rest is for what is not counted, above all CUDA itself and the allocator's gaps


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    config = configuration.load(args.config, args.overrides)
    world = args.nodes * args.gpus_per_node
    accumulation = accumulation_of(config, world)
    train_set = open_shards(config, world)
    config = with_classes(config, train_set)
    images = args.images if args.images is not None else train_set.manifest.images if train_set else None

    batch = {"world": world, "global_batch": config.train.global_batch, "micro_batch": config.train.micro_batch,
             "accumulation": accumulation}  # fmt: skip
    epochs = epochs_of(config, images) if images is not None else None
    schedule = schedule_of(config, epochs) if epochs else None
    stages = stages_of(args, config, world, accumulation)
    pays = which_pays(stages, args.gpu_gib)
    assignment = assign(config, world, images, train_set) if images is not None else None

    parts = [
        f"{args.config or 'the default configuration'} on {args.nodes} x {args.gpus_per_node} GPUs",
        batch_text(batch, epochs, config),
        schedule_text(schedule, config),
        memory_text(stages, config),
        traffic_text(stages),
        pays_text(stages, pays, args.gpu_gib, config),
        assignment_text(assignment),
    ]
    result = {"batch": batch, "epochs": epochs, "schedule": schedule, **stages, "pays": pays, "assignment": assignment}
    publish("\n\n".join(filter(None, parts)), result, args.out)
    return FAILED if assignment and assignment["faults"] else 0


def accumulation_of(config: Config, world: int) -> int:
    """Micro-batches of a step and rank. Raises UsageError, with values that work, when they are not whole."""
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % (world * micro) == 0:
        return batch // (world * micro)
    unit = world * micro
    works = [f"train.global_batch={n}" for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
    if batch % world == 0:
        divisors = [n for n in range(1, batch // world + 1) if batch // world % n == 0]
        works.append(f"train.micro_batch={min(divisors, key=lambda n: abs(n - micro))}")
    gpus = [n for n in range(1, world) if batch % (n * micro) == 0]
    works += [f"{gpus[-1]} GPU{'s' * (gpus[-1] > 1)}"] if gpus else []
    raise UsageError(f"train.global_batch, train.micro_batch: found {batch} and {micro}, which {world} GPUs cannot "
                     f"share in whole micro-batches; nearest that work: {' or '.join(works)}")  # fmt: skip


def open_shards(config: Config, world: int) -> TrainLoader | None:
    """The training set as rank 0 opens it, or None where it is not on this machine."""
    where = config.data.train
    if where is None or not (is_remote(where) or Path(where).exists()):
        return None
    return TrainLoader(
        config.data, seed=config.train.seed, global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch, rank=0, world=world,
    )  # fmt: skip


def with_classes(config: Config, train_set: TrainLoader | None) -> Config:
    """With model.num_classes, as training has it. Raises UsageError where neither shards nor configuration say it."""
    if train_set:
        config = with_num_classes(config, train_set)
        refuse_too_many_boxes(config, train_set)
    elif config.model.num_classes is None:
        raise UsageError(f"model.num_classes: found null, and no shards to count them in (data.train: "
                         f"{config.data.train}); set model.num_classes=N, or data.train=SHARDS")  # fmt: skip
    return config


def epochs_of(config: Config, images: int) -> dict[str, int]:
    per_epoch = steps_per_epoch(images, config.train.global_batch, config.data.tail)
    if per_epoch == 0:
        raise UsageError(f"train.global_batch: found {config.train.global_batch}, more than the {images} images; lower "
                         "it, or fill the step up with data.tail=mask")  # fmt: skip
    steps = min(config.train.epochs * per_epoch, config.train.max_steps or math.inf)
    return {"images": images, "steps_per_epoch": per_epoch, "steps": int(steps),
            "tail": images - per_epoch * config.train.global_batch}  # fmt: skip


def schedule_of(config: Config, epochs: dict[str, int]) -> list[dict[str, Any]]:
    """The learning rates of each group where they change."""
    per_epoch, end = epochs["steps_per_epoch"], epochs["steps"]
    at = {0: "start"}
    if config.optim.warmup_steps > 1:
        at[config.optim.warmup_steps - 1] = "warm-up ends"
    at |= {epoch * per_epoch: f"after epoch {epoch}" for epoch in sorted(config.train.lr_drop_epochs)}
    rows = []
    for step, what in sorted(at.items()):
        if step < end:
            rates = learning_rates(
                config.optim, step, global_batch=config.train.global_batch, steps_per_epoch=per_epoch,
                drop_epochs=config.train.lr_drop_epochs,
            )  # fmt: skip
            rows.append({"step": step, "what": what, **rates})
    return rows


def stages_of(args: argparse.Namespace, config: Config, world: int, accumulation: int) -> dict[str, Any]:
    """Memory and traffic of each ZeRO stage, and what they were computed for."""
    with contextlib.redirect_stdout(sys.stderr):  # where it says that it found no GPU
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # slow to import, for help and for refusals

    with torch.device("meta"):
        model = build_detector(config.model)
    in_backbone = costs.weights_of(model.backbone)
    rest = costs.weights_of(torch.nn.ModuleList(part for part in model.children() if part is not model.backbone))
    added = 0
    if args.backbone_parameters is not None:
        added = args.backbone_parameters - sum(one.elements for one in in_backbone)
        frozen = [one for one in in_backbone if not one.trainable]
        trainable = args.backbone_parameters - sum(one.elements for one in frozen)
        if trainable < 1:
            raise UsageError(f"--backbone-parameters {args.backbone_parameters}: expected more than the "
                             f"{args.backbone_parameters - trainable} that {config.model.backbone.name} has "
                             "frozen")  # fmt: skip
        in_backbone = [*frozen, costs.Weight(trainable, trainable=True, lower=True)]

    engine = config.engine
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(engine.precision, torch.bfloat16)
    if engine.precision == "auto":  # which asks the GPU
        engine = replace(engine, precision="bf16" if engine.zero_stage > 0 else "fp32")
    zero = deepspeed_config(
        engine, device=torch.device("cuda"), global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch, accumulation=accumulation, clip_norm=config.optim.clip_norm,
    )["zero_optimization"]  # fmt: skip

    size_hw = tuple(args.size) if args.size else (max(config.data.sizes), config.data.max_size)
    if engine.cuda_graphs:
        size_hw = tuple(padded_side(side, GRAIN) for side in size_hw)
    batch = config.train.micro_batch
    alive = activations_of(size_hw, batch, config, dtype)
    rows: list[dict[str, Any]] = []
    for stage in costs.STAGES:
        used = torch.float32 if stage == 0 else dtype  # the engine has no other at stage 0
        setup = costs.Setup(
            [*in_backbone, *rest], sum(b.numel() for b in model.buffers()), world, accumulation, used.itemsize,
            engine.activation_checkpointing, engine.offload_optimizer, DeepSpeedZeroConfig(**zero | {"stage": stage}),
        )  # fmt: skip
        # Kept for backward: what autocast or a frozen norm makes of the weights.
        copies = added * used.itemsize if used != torch.float32 or config.model.backbone.norm == "frozen" else 0
        bytes_of = costs.memory(stage, setup)
        bytes_of["activations"] = alive[used, engine.activation_checkpointing].total() + copies
        graphs = engine.cuda_graphs and stage < 3  # the activations of a size that is recorded, and gradients twice
        bytes_of["graphs"] = graphs * (bytes_of["activations"] + 2 * setup.elements(trainable=True) * FLOAT32_BYTES)
        total = sum(size for name, size in bytes_of.items() if name != "host")
        collectives = [one._asdict() for one in costs.traffic(stage, setup)]
        rows.append({"stage": stage, "dtype": _short(used), "configured": stage == engine.zero_stage,
                     "memory": bytes_of | {"total": total}, "traffic": collectives})  # fmt: skip
    used = torch.float32 if engine.zero_stage == 0 else dtype
    kind = used, engine.activation_checkpointing
    of_image = activations_of(size_hw, batch + 1, config, dtype)[kind].total() - alive[kind].total()
    of_image *= 1 + engine.cuda_graphs
    without = rows[engine.zero_stage]["memory"]["total"] - batch * of_image
    return {
        "parameters": setup.elements(), "trainable": setup.elements(trainable=True), "backbone_added": added,
        "largest_micro_batch": {str(gb): max(0, int((COUNTED * gb * 1e9 - without) // of_image)) for gb in GPUS_GB},
        "size_hw": list(size_hw), "reduce_bucket_size": setup.zero.reduce_bucket_size,
        "activations": {f"{_short(used)}{' recomputed' * recomputed}": parts.total()
                        for (used, recomputed), parts in alive.items()},
        "activations_by_part": dict(alive[kind].most_common()),
        "stages": rows,
    }  # fmt: skip


def activations_of(
    size_hw: tuple[int, ...], batch: int, config: Config, dtype: torch.dtype
) -> dict[tuple[torch.dtype, bool], Counter[str]]:
    """Bytes of each part of the detector, by dtype and by whether layers are computed again: what the stages need, and
    the choice not taken."""
    found = {}
    with torch.device("meta"):
        model = build_detector(config.model)
    for recomputed in (False, True):
        if recomputed:
            model.recompute_activations(keep_products=config.engine.keep_products)
        for used in dict.fromkeys((dtype, torch.float32)):
            if used == dtype or recomputed == config.engine.activation_checkpointing:
                found[used, recomputed] = costs.activations(model, (size_hw[0], size_hw[1]), batch, used)
    return found


def which_pays(stages: dict[str, Any], gpu_gib: float | None) -> dict[str, Any]:
    """What ZeRO shards as a share of stage 0's memory, the stage of least memory, and the least that fits."""
    totals = {row["stage"]: row["memory"]["total"] for row in stages["stages"]}
    first = stages["stages"][0]["memory"]
    fits = [stage for stage, total in totals.items() if gpu_gib is not None and total <= gpu_gib * GIB]
    # The activations of one precision, so that the saving is ZeRO's and not bf16's.
    others = ("activations", "graphs")
    states = {row["stage"]: row["memory"]["total"] - sum(row["memory"][name] for name in others)
              for row in stages["stages"]}  # fmt: skip
    least = min(states, key=lambda stage: states[stage])
    return {
        "optimizer_share": first["optimizer"] / first["total"],
        "activations_share": first["activations"] / first["total"],
        "least_state": least,
        "saved_bytes": states[0] - states[least],
        "saved_share": (states[0] - states[least]) / first["total"],
        "smallest_that_fits": min(fits, default=None),
    }


def assign(config: Config, world: int, images: int, train_set: TrainLoader | None) -> dict[str, Any]:
    """Give every rank its micro-batches of the first epoch, by the functions that training uses, and look at them.

    Images of a set that is not here are taken as they come: without shards, and without sizes to group them by.
    """
    here = train_set is not None and train_set.manifest.images == images
    shard_N = train_set.source.index["shard"] if train_set and here else None
    size_hw_of = train_set.source.size_hw if train_set and here and config.data.group_by_shape else None
    sizes = [size_hw_of(i) for i in range(images)] + [(1, 1)] if size_hw_of else None  # the last: MASKED
    mode = config.data.order if here else "full"
    order = epoch_order(images, config.train.seed, 0, mode, shard_N)
    batch, micro = config.train.global_batch, config.train.micro_batch
    steps = steps_per_epoch(images, batch, config.data.tail)
    given, faults = [], []
    with progress(steps, description="sample assignment") as bar:
        for step in range(steps):
            micro_batches = step_micro_batches(order, step, batch, micro)
            shares = [rank_share(micro_batches, rank, world, sizes.__getitem__ if sizes else None)
                      for rank in range(world)]  # fmt: skip
            found = {(len(share), *{len(one) for one in share}) for share in shares}
            if found != {(batch // (micro * world), micro)}:
                faults.append(f"step {step}: ranks do not all have the same number of whole micro-batches")
            given.append(np.concatenate([one for share in shares for one in share]))
            bar.update()
    taken_N = np.concatenate(given)
    times_I = np.bincount(taken_N[taken_N != MASKED], minlength=images)
    left_out, masked = int((times_I == 0).sum()), int((taken_N == MASKED).sum())
    tail = images - steps * batch  # negative: slots to fill up
    if times_I.max() > 1:
        faults.append(f"{int((times_I > 1).sum())} images are taken more than once")
    if (left_out, masked) != (max(tail, 0), max(-tail, 0)):
        faults.append(f"{left_out} images are left out and {masked} slots masked, expected {max(tail, 0)} "
                      f"and {max(-tail, 0)}")  # fmt: skip
    return {
        "images": images, "ranks": world, "steps": steps, "once": int((times_I == 1).sum()), "left_out": left_out,
        "masked": masked, "order": mode, "grouped_by_shape": bool(sizes), "from_shards": here, "faults": faults,
    }  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m framework.plan", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML of departures from the defaults")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="GPUs, and ranks, of each")
    parser.add_argument("--images", type=int, metavar="N",
                        help="plan for so many images instead of those in data.train (COCO: 118287)")  # fmt: skip
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="size of the images, px; default: the largest short side x data.max_size")  # fmt: skip
    parser.add_argument("--backbone-parameters", type=float, metavar="X",
                        help="count a backbone of so many parameters instead (300e6); activations stay")  # fmt: skip
    parser.add_argument("--gpu-gib", type=float, metavar="GIB", help="name the smallest stage that fits")
    parser.add_argument("--out", metavar="FILE", help="write the JSON there too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file: engine.zero_stage=2")
    args = parser.parse_intermixed_args(argv)
    for flag in ("nodes", "gpus_per_node", "images", "backbone_parameters"):
        value = getattr(args, flag)
        if value is not None and not 1 <= value < math.inf:
            raise UsageError(f"--{flag.replace('_', '-')} {value:g}: expected at least 1")
    if args.size and min(args.size) < 32:
        raise UsageError(f"--size {args.size[0]} {args.size[1]}: expected sides of at least 32 px")
    if args.out is not None:
        refuse_folder_at("--out", args.out)
    if args.gpu_gib is not None and not args.gpu_gib > 0:
        raise UsageError(f"--gpu-gib {args.gpu_gib:g}: expected above 0")
    if args.backbone_parameters is not None:
        args.backbone_parameters = int(args.backbone_parameters)
    return args


if __name__ == "__main__":
    command(main)
