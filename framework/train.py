"""Train a detector: configuration, ranks, data, model, engine, resume, loop. This file is the story of a run.

deepspeed [--num_gpus N] framework/train.py --config configs/quickstart.yaml [key=value ...]
python -m framework.train --config ...                                          (one process)
"""

import argparse
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from framework import config as configuration
from framework.config import Config
from framework.data.loader import EvalLoader, TrainLoader, coco_annotations
from framework.data.order import DataState
from framework.data.transforms import decode
from framework.engine import checkpoint
from framework.engine.ds_config import deepspeed_config, start_engine
from framework.engine.optimizer import build_optimizer, learning_rates, set_learning_rates
from framework.engine.ranks import Ranks, init_ranks
from framework.engine.step import train_step
from framework.errors import InputError, UsageError, command
from framework.evaluation.coco import evaluate, report
from framework.losses.criterion import Criterion
from framework.models.build import build_detector
from framework.models.detector import Detector
from framework.models.weights import load_published
from framework.tracking.console import progress, setup_logging
from framework.tracking.meter import Meter
from framework.tracking.pictures import draw_coco, side_by_side
from framework.tracking.run_folder import open_run
from framework.tracking.sink import Sink, open_sink

log = logging.getLogger("tenfold")

SHOWN_SCORE = 0.3  # boxes of lower scores are not drawn

EXAMPLE = """example:
  deepspeed --num_gpus 8 framework/train.py --config configs/coco_r50_deformable.yaml \\
      data.train=/data/coco-shards/train data.val=/data/coco-shards/val model.backbone.weights=resnet50.pth"""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = configuration.load(args.config, args.overrides)
    run_dir = str(config.train.run_dir)
    ranks = init_ranks()
    setup_logging(None, ranks.is_main)

    train_set, val_set = open_data(config, ranks)
    config = with_num_classes(config, train_set)
    accumulation = config.train.global_batch // (config.train.micro_batch * ranks.world)
    open_run(config, ranks, {"fingerprint": train_set.manifest.fingerprint})
    setup_logging(run_dir, ranks.is_main)

    torch.manual_seed(config.train.seed)
    detector = build_detector(config.model)
    optimizer = build_optimizer(detector.to(ranks.device), config.optim, ranks.device)
    criterion = Criterion(config.loss, config.model.classification)
    last = checkpoint.newest_on_all(run_dir, ranks)
    if last is None:
        load_start_weights(detector, config)
    if config.engine.activation_checkpointing:
        detector.recompute_activations()
    engine = start_engine(detector, optimizer, deepspeed_config(
        config.engine, device=ranks.device, global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch, accumulation=accumulation, clip_norm=config.optim.clip_norm,
    ))  # fmt: skip

    at = DataState(train_set.manifest.fingerprint, config.train.seed, 0, 0, config.train.global_batch)
    step, best_ap = 0, 0.0
    if last is not None:
        at, step, best_ap = resume(last, engine, config, at)
    per_epoch = train_set.steps_per_epoch
    end = min(config.train.epochs * per_epoch, config.train.max_steps or math.inf)
    log.info(
        "%d images, %d steps an epoch; global batch %d = %d ranks x %d images x %d accumulated; step %d of %d",
        train_set.manifest.images, per_epoch, config.train.global_batch, ranks.world, config.train.micro_batch,
        accumulation, step, end,
    )  # fmt: skip

    def save() -> None:
        state = {"step": step, "data": asdict(at), "classes": [asdict(c) for c in train_set.manifest.classes],
                 "lr": rates, "best_ap": best_ap, "world": ranks.world}  # fmt: skip
        folder = checkpoint.save(run_dir, engine, state, ranks=ranks, keep=config.train.keep_checkpoints)
        log.info("saved %s", folder)

    sink = open_sink(run_dir, ranks.is_main, step if last else None)
    meter = Meter(ranks)
    with progress(int(end), initial=step, description="training") as bar:
        while step < end:
            epoch, first_step = at.epoch, at.samples_consumed // config.train.global_batch
            for micro_batches in meter.waiting(train_set.epoch(epoch, first_step)):
                rates = learning_rates(
                    config.optim, step, global_batch=config.train.global_batch, steps_per_epoch=per_epoch,
                    drop_epochs=config.train.lr_drop_epochs,
                )  # fmt: skip
                set_learning_rates(engine.optimizer, rates)
                metrics = train_step(engine, criterion, micro_batches, ranks=ranks, seed=config.train.seed, step=step)
                step += 1
                at = replace(at, samples_consumed=at.samples_consumed + config.train.global_batch)
                meter.add(metrics, micro_batches)
                bar.update()
                if every(config.tracking.log_every, step) or step == end:
                    values = meter.read()
                    refuse_broken(values, step, config)
                    sink.scalars(
                        values | {f"lr/{group}": lr for group, lr in rates.items()}
                        | {"images_seen": step * config.train.global_batch}, step, step / per_epoch
                    )  # fmt: skip
                    bar.set_postfix(loss=values["loss/total"])
                if step == end or step % per_epoch == 0:
                    break
                if every(config.train.checkpoint_every, step):
                    save()
            if step % per_epoch == 0:
                at = replace(at, epoch=epoch + 1, samples_consumed=0)
            if val_set is not None and (step == end or every(config.eval.every, epoch + 1)):
                best_ap = max(best_ap, validate(engine, val_set, config, ranks, sink, step, step / per_epoch))
            save()
    sink.close()
    log.info("done: step %d, best AP %.3f; see it with: tensorboard --logdir %s", step, best_ap, run_dir)
    return 0


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
    train_set = TrainLoader(
        config.data, seed=config.train.seed, global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip
    if config.eval.every == 0:
        return train_set, None
    if config.data.val is None:
        raise UsageError("data.val, eval.every: found null and an evaluation to do; set data.val or eval.every=0")
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


def load_start_weights(detector: Detector, config: Config) -> None:
    """What a fresh run starts from: a checkpoint to fine-tune, an ImageNet backbone, or neither."""
    if config.model.init:
        log.info("model.init: %s", load_published(detector, config.model.init, strict=False))
    elif config.model.backbone.weights:
        log.info("backbone: %s", load_published(detector, config.model.backbone.weights))


def resume(last: Path, engine: Any, config: Config, fresh: DataState) -> tuple[DataState, int, float]:
    """Load the newest checkpoint; where the data goes on, the step, the best AP so far."""
    if not config.train.resume:
        raise UsageError(f"train.resume, train.run_dir: found false, and {last}; set train.resume=true or another "
                         "train.run_dir")  # fmt: skip
    stored = DataState(**checkpoint.read_state(last)["data"])
    if stored.fingerprint != fresh.fingerprint:
        raise UsageError(f"data.train: {config.data.train} has fingerprint {fresh.fingerprint}, the run in "
                         f"{config.train.run_dir} was trained on {stored.fingerprint}; expected the same shards, or "
                         "another train.run_dir")  # fmt: skip
    state = checkpoint.load(last, engine)
    log.info("resuming from %s", last)
    return stored, state["step"], state["best_ap"]


def validate(
    engine: Any, val_set: EvalLoader, config: Config, ranks: Ranks, sink: Sink, step: int, epoch: float
) -> float:
    """Evaluate, record the numbers and some pictures; returns AP. Collective."""
    engine.eval()
    numbers, detections = evaluate(
        engine, val_set, ranks=ranks, config=config.eval, labels=config.data.labels,
        classification=config.model.classification,
    )  # fmt: skip
    engine.train()
    sink.scalars({f"val/{name}": numbers[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}, step, epoch)
    sink.document(f"evaluation/step-{step:08d}.json", report(numbers, config.eval.image_side, step=step, epoch=epoch))
    log.info("epoch %g: %s", epoch, ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    for i in range(min(config.tracking.pictures, val_set.manifest.images)):
        sink.picture(f"predictions/{i}", np.asarray(picture_of(val_set, i, detections)), step)
    return numbers["AP"]


def picture_of(val_set: EvalLoader, i: int, detections: list[dict[str, Any]]) -> Image.Image:
    """Image i of the set: what was found in it beside what is there."""
    encoded, sample = val_set.source.read(i)
    image, classes = decode(encoded), val_set.manifest.classes
    found = [d for d in detections if d["image_id"] == sample.image_id and d["score"] >= SHOWN_SCORE]
    titles = (f"predictions with a score of at least {SHOWN_SCORE}", "ground truth")
    return side_by_side(
        draw_coco(image, found, classes), draw_coco(image, list(coco_annotations(sample)), classes), titles
    )


def every(interval: int, count: int) -> bool:
    return interval > 0 and count % interval == 0


def refuse_broken(values: dict[str, float], step: int, config: Config) -> None:
    """End the run on a loss that is no number, or on more bad samples than allowed; on all ranks alike."""
    if not math.isfinite(values["loss/total"]):
        raise InputError(f"step {step}: the loss is {values['loss/total']}; lower optim.lr, or set "
                         "engine.precision=fp32")  # fmt: skip
    if values["data/bad_samples"] > config.data.max_bad:
        raise InputError(f"step {step}: {values['data/bad_samples']:.0f} samples could not be used (log.txt names "
                         f"them), data.max_bad is {config.data.max_bad}; repair the shards or raise it")  # fmt: skip


if __name__ == "__main__":
    command(main)
