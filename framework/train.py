"""Train a detector: configuration, ranks, data, model, engine, resume, loop. This file is the story of a run.

deepspeed [--num_gpus N] framework/train.py --config configs/quickstart.yaml [key=value ...]
python -m framework.train --config ...                                          (one process)
"""

import argparse
import logging
import math
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from framework import config as configuration
from framework.config import Config, TrainConfig
from framework.data.loader import EvalLoader, TrainLoader, dead_workers_told, refuse_no_set
from framework.data.order import DataState
from framework.engine import checkpoint
from framework.engine.checkpoint import Checkpoints
from framework.engine.ds_config import deepspeed_config, start_engine
from framework.engine.ema import Ema
from framework.engine.graphs import GRAIN, Graphs
from framework.engine.guard import Guard
from framework.engine.incarnation import Incarnation
from framework.engine.lifecycle import SAVED, Lifecycle, patience
from framework.engine.optimizer import (
    build_optimizer,
    learning_rates,
    other_batch,
    set_learning_rates,
    unreached_drops,
)
from framework.engine.preflight import Preflight
from framework.engine.ranks import Ranks, init_ranks, numbers
from framework.engine.rehearsal import rehearse
from framework.engine.step import train_step
from framework.errors import InputError, UsageError, command
from framework.files import refuse_file_at
from framework.losses.criterion import Criterion
from framework.models.build import build_detector
from framework.models.detector import Detector
from framework.models.weights import load_published
from framework.processes import keep_freed_memory
from framework.tracking.console import progress, setup_logging
from framework.tracking.meter import Meter
from framework.tracking.run_folder import best_evaluation, evaluation_name, record_run, refuse_other_run
from framework.tracking.sink import open_sink
from framework.tracking.stragglers import Stragglers
from framework.validation import validate

log = logging.getLogger("tenfold")

EXAMPLE = """example:
  deepspeed --num_gpus 8 framework/train.py --config configs/coco_r50_deformable.yaml \\
      data.train=/data/coco-shards/train data.val=/data/coco-shards/val model.backbone.weights=resnet50.pth"""


@dead_workers_told()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = configuration.load(args.config, args.overrides)
    hang_s = 60 * config.train.hang_minutes
    setup_logging(None, is_main=numbers()[0] == 0)
    ranks = init_ranks(patience(hang_s), Preflight(config))
    with Lifecycle(ranks, str(config.train.run_dir), hang_s).watching() as lifecycle:
        return run(config, ranks, lifecycle)


def run(config: Config, ranks: Ranks, lifecycle: Lifecycle) -> int:
    """The story of a run; returns its exit code."""
    run_dir = str(config.train.run_dir)
    ranks.from_main(partial(refuse_file_at, "train.run_dir", run_dir))
    train_set, val_set = open_data(config, ranks)
    val_fingerprint = None if val_set is None else val_set.manifest.fingerprint
    ranks.refuse_different({"data.train": train_set.manifest.fingerprint, "data.val": val_fingerprint})
    config = with_num_classes(config, train_set)
    refuse_too_many_boxes(config, train_set)
    at = DataState(train_set.manifest.fingerprint, config.train.seed, 0, 0, config.train.global_batch)
    refuse_other_run(config, at, checkpoint.newest_on_all(run_dir, ranks))
    incarnation = Incarnation(run_dir, ranks)  # from here on no earlier one writes
    last = checkpoint.newest_on_all(run_dir, ranks)

    if ranks.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.train.seed)
    detector = build_detector(config.model)
    if last is None:
        state, start = {}, load_start_weights(detector, config)
    else:
        state = checkpoint.read_state(last)
        start, at = state.get("start_weights"), DataState(**state["data"])
        checkpoint.load_weights(last, detector)
    if config.engine.activation_checkpointing:
        detector.recompute_activations(keep_products=config.engine.keep_products)
    updated_on = torch.device("cpu") if config.engine.offload_optimizer else ranks.device
    optimizer = build_optimizer(detector.to(ranks.device), config.optim, updated_on)
    engine = start_engine(detector, optimizer, deepspeed_config(
        config.engine, device=ranks.device, global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch, accumulation=train_set.accumulation, clip_norm=config.optim.clip_norm,
    ))  # fmt: skip
    if config.engine.cuda_graphs:
        Graphs(detector, compile_layers=config.engine.compile_layers)
    criterion = Criterion(config.loss, config.model.classification)
    ema = Ema(engine, config.train.ema_decay) if config.train.ema_decay else None
    if last is not None:
        checkpoint.load_optimizer(last, engine, ema)
    stragglers = Stragglers(ranks, detector, os.environ) if ranks.world > 1 else None
    meter = Meter(ranks, state.get("bad_samples", ()), stragglers)
    guard = Guard(config.guard, ranks, state.get("guard"))
    if config.train.rehearse and ranks.device.type == "cuda":
        grain = GRAIN if config.engine.cuda_graphs else 1
        largest = train_set.largest(at.epoch, grain)
        rehearse(engine, criterion, *largest, ranks=ranks, config=config.engine, grain=grain)

    per_epoch = train_set.steps_per_epoch
    end = min(config.train.epochs * per_epoch, config.train.max_steps or math.inf)
    step = at.epoch * per_epoch + at.samples_consumed // config.train.global_batch
    ranks.from_main(incarnation.refuse_overtaken)  # it took a while to get here
    record_run(config, ranks, {"fingerprint": train_set.manifest.fingerprint, "val_fingerprint": val_fingerprint,
                               "start_weights": start})  # fmt: skip
    setup_logging(run_dir, ranks.is_main)
    sink = open_sink(run_dir, ranks.is_main, step, incarnation.refuse_overtaken)
    say_what_begins(config, train_set, last, start, step, end)

    def validation_due() -> bool:
        return val_set is not None and (step == end or every(config.eval.every * per_epoch, step))

    not_evaluated = ranks.from_main(lambda: not Path(run_dir, evaluation_name(step)).exists())
    stopped_by, owed = None, False
    intervals = per_epoch, config.train.checkpoint_every, config.tracking.log_every
    kept = partial(kept_steps, config.train, per_epoch)
    with (Checkpoints(run_dir, ranks, kept, incarnation.refuse_overtaken) as checkpoints,
          progress(int(end), initial=step, description="training") as bar):  # fmt: skip
        if last is not None and validation_due() and not_evaluated:  # the last attempt ended before it
            validate(engine, ema, val_set, config, ranks, sink, step, step / per_epoch, lifecycle)
        while step < end and not stopped_by:
            for micro_batches in meter.waiting(train_set.epoch(at.epoch, step % per_epoch)):
                rates = learning_rates(
                    config.optim, step, global_batch=config.train.global_batch, steps_per_epoch=per_epoch,
                    drop_epochs=config.train.lr_drop_epochs,
                )  # fmt: skip
                set_learning_rates(engine.optimizer, rates)
                writes = step + 1 == end or any(every(steps, step + 1) for steps in intervals)
                overtaken = incarnation.overtaken() if writes else incarnation.glance()
                lifecycle.ask(overtaken or checkpoints.failure)
                metrics = train_step(
                    engine, criterion, micro_batches, ranks=ranks, seed=config.train.seed, step=step, guard=guard
                )  # fmt: skip
                meter.add(metrics, micro_batches)
                if ema is not None and metrics:
                    ema.update()
                step += 1
                at = replace(at, samples_consumed=at.samples_consumed + config.train.global_batch)
                bar.update()
                stopped_by = lifecycle.told_to_stop()
                epoch_ends = step % per_epoch == 0
                save_due = epoch_ends or step == end or bool(stopped_by) or every(config.train.checkpoint_every, step)
                if save_due or every(config.tracking.log_every, step):
                    values = meter.read()
                    refuse_bad_samples(values, step, config)  # before it is saved
                    values |= {f"lr/{group}": lr for group, lr in rates.items()}
                    values |= {"images_seen": float(step * config.train.global_batch),
                               "skipped_steps": float(guard.total)}  # fmt: skip
                    sink.scalars(values, step, step / per_epoch)
                    bar.set_postfix(loss=values.get("loss/total", math.nan))
                if epoch_ends:
                    at = replace(at, epoch=at.epoch + 1, samples_consumed=0)
                owed = owed or save_due
                with meter.paused():
                    if owed and (not guard.in_a_row or stopped_by or step == end or validation_due()):  # else later
                        owed = False
                        classes = [asdict(c) for c in train_set.manifest.classes]
                        checkpoints.save(engine, {
                            "step": step, "data": asdict(at), "lr": rates, "world": ranks.world, "classes": classes,
                            "bad_samples": sorted(meter.bad_samples), "start_weights": start, "guard": guard.state(),
                        }, ema)  # fmt: skip
                    if validation_due() and not stopped_by:
                        lifecycle.ask(incarnation.overtaken())  # it takes long, and is made up for
                        stopped_by = lifecycle.told_to_stop()
                    if validation_due() and not stopped_by:
                        validate(engine, ema, val_set, config, ranks, sink, step, step / per_epoch, lifecycle)
                    lifecycle.alive()
                if epoch_ends or step == end or stopped_by:
                    break
        checkpoints.finish()
    sink.close()
    if stopped_by:
        log.info("stopped by %s after step %d, which is saved; the same command goes on", stopped_by, step)
        return SAVED
    log.info("done: step %d in %s", step, run_dir)
    return 0


def say_what_begins(
    config: Config, train_set: TrainLoader, last: Path | None, start: dict[str, Any] | None, step: int, end: float
) -> None:
    if last:
        log.info("resuming from %s", last)
    else:
        weights = "\n  ".join([f"{start['file']}:", *start["report"]]) if start else "random weights"
        log.info("a fresh run in %s, from %s", config.train.run_dir, weights)
    log.info(
        "%d images, %d steps an epoch; global batch %d = %d ranks x %d images x %d accumulated; step %d of %d",
        train_set.manifest.images, train_set.steps_per_epoch, config.train.global_batch, train_set.world,
        config.train.micro_batch, train_set.accumulation, step, end,
    )  # fmt: skip
    if (said := other_batch(config.optim, config.train.global_batch)) is not None:
        log.info("%s", said)
    if (said := unreached_drops(config.train.lr_drop_epochs, config.train.epochs)) is not None:
        log.warning("%s", said)


def kept_steps(train: TrainConfig, steps_per_epoch: int, steps: list[int]) -> set[int]:
    """Whose checkpoints stay, of those there are, the newest first."""
    best = best_evaluation(str(train.run_dir)) if train.keep_best else None
    epochs = {step for step in steps if every(train.keep_every_epochs * steps_per_epoch, step)}
    return {*steps[: train.keep_checkpoints], *epochs, *(best or ())[:1]}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="framework/train.py", description="Train a detector on shards.", epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML of departures from the defaults")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK says the same")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file: train.epochs=12")
    return parser.parse_args(argv)


def open_data(config: Config, ranks: Ranks) -> tuple[TrainLoader, EvalLoader | None]:
    if config.data.train is None:
        raise UsageError("data.train: found null, expected a folder of shards (python -m data_tools.convert makes one)")
    refuse_no_set("data.train", config.data.train)
    train_set = TrainLoader(
        config.data, seed=config.train.seed, global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip
    if config.eval.every == 0:
        return train_set, None
    if config.data.val is None:
        raise UsageError("data.val, eval.every: found null and an evaluation to do; set data.val or eval.every=0")
    refuse_no_set("data.val", config.data.val)
    val_set = EvalLoader(
        config.data.val, config.data, batch_size=config.eval.batch, rank=ranks.rank, world=ranks.world
    )  # fmt: skip
    if val_set.manifest.classes != train_set.manifest.classes:
        raise UsageError(f"data.train, data.val: {config.data.train} and {config.data.val} do not have the same "
                         "classes; convert both with the same annotation categories")  # fmt: skip
    return train_set, val_set


def with_num_classes(config: Config, train_set: TrainLoader) -> Config:
    """The configuration with model.num_classes filled in from the shards, or checked against them."""
    classes = train_set.manifest.classes
    if config.model.num_classes is None:
        return replace(config, model=replace(config.model, num_classes=len(classes)))
    by_id = config.data.labels == "category_id"
    needed = max(c.category_id for c in classes) + 1 if by_id else len(classes)
    if needed > config.model.num_classes:
        raise UsageError(f"model.num_classes: found {config.model.num_classes}, but {config.data.train} with "
                         f"data.labels={config.data.labels} needs at least {needed}")  # fmt: skip
    return config


def load_start_weights(detector: Detector, config: Config) -> dict[str, Any] | None:
    """What a fresh run starts from, for the record: a checkpoint to fine-tune, an ImageNet backbone, or neither.

    model.init brings a backbone: with it model.backbone.weights is not read.
    """
    model = config.model
    if model.init:
        if not Path(model.init).exists():
            raise UsageError(f"model.init: {model.init} is not there; docs/finetune.md says where published ones are; "
                             "to start from something else: model.init=null")  # fmt: skip
        report = load_published(detector, model.init, strict=False, expected="detector")
        unfit = [*report.missing, *report.misshapen, *report.unexpected]
        if model.backbone.norm == "frozen" and any(name.startswith("backbone.") for name in unfit):
            raise InputError(f"model.init: the backbone in {model.init} is another one, and a frozen one cannot learn "
                             f"what does not fit: {'; '.join(report.settings)}")  # fmt: skip
    elif model.backbone.weights:
        if not Path(model.backbone.weights).is_file():
            raise UsageError(f"model.backbone.weights: {model.backbone.weights} is not there; the README says how to "
                             "get it (Training on COCO); from scratch: model.backbone.norm=group "
                             "model.backbone.weights=null")  # fmt: skip
        report = load_published(detector, model.backbone.weights, expected="backbone")
    else:
        return None
    return {"file": report.source, "sha256": report.sha256, "tensors": len(report.loaded), "report": report.lines()}


def refuse_too_many_boxes(config: Config, train_set: TrainLoader) -> None:
    """Raises UsageError when an image has more boxes than the model has queries to explain them with."""
    boxes = train_set.source.index["boxes"]
    worst = train_set.source.index[int(boxes.argmax())]
    if worst["boxes"] > config.model.num_queries:
        raise UsageError(f"model.num_queries: found {config.model.num_queries}, but image {worst['image_id']} of "
                         f"{config.data.train} has {worst['boxes']} boxes; expected at least as many")  # fmt: skip


def every(interval: int, count: int) -> bool:
    return interval > 0 and count % interval == 0


def refuse_bad_samples(values: dict[str, float], step: int, config: Config) -> None:
    """End the run on too many of them; on all ranks alike."""
    if values["data/bad_samples"] > config.data.max_bad:
        raise InputError(f"step {step}: {values['data/bad_samples']:.0f} samples could not be used (log.txt names "
                         f"them), data.max_bad is {config.data.max_bad}; repair the shards or raise it")  # fmt: skip


if __name__ == "__main__":
    command(main)
