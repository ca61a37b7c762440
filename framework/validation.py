"""The evaluations of a run while it trains: AP, pictures, an alarm when it collapses; and which one was the best."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from framework.config import Config
from framework.data.loader import EvalLoader, coco_annotations
from framework.data.transforms import decode
from framework.engine.ds_config import autocast
from framework.engine.ema import Ema
from framework.engine.lifecycle import Lifecycle
from framework.engine.ranks import Ranks
from framework.engine.shares import fixed_tensors, gather, named_tensors, shares_of
from framework.errors import InputError
from framework.evaluation.alarm import collapse
from framework.evaluation.attention import look_inside
from framework.evaluation.coco import evaluate, report
from framework.evaluation.detections import to_rows
from framework.models.build import build_detector
from framework.models.detector import Detector
from framework.tracking.attention import draw_attention
from framework.tracking.pictures import draw_coco, side_by_side
from framework.tracking.run_folder import best_evaluation, evaluation_name
from framework.tracking.sink import Sink

log = logging.getLogger("tenfold")

SHOWN_SCORE = 0.3  # boxes of lower scores are not drawn


def validate(
    engine: Any, ema: Ema | None, val_set: EvalLoader | None, config: Config, ranks: Ranks, sink: Sink, step: int,
    epoch: float, lifecycle: Lifecycle,
) -> None:  # fmt: skip
    """Evaluate, record the numbers and some pictures. Collective."""
    assert val_set is not None
    detector = whole_detector(engine, ema, config, ranks)
    with autocast(config.engine, ranks.device):  # as framework.evaluate does, so that the numbers are the same
        numbers, detections = evaluate(
            detector, val_set, ranks=ranks, config=config.eval, labels=config.data.labels,
            classification=config.model.classification, progress=lifecycle,
        )  # fmt: skip
    shown = range(min(config.tracking.attention, val_set.manifest.images))
    looks = [attention_in(detector, val_set, i, config) for i in shown]
    engine.train()
    tags = {f"val/{name}": numbers[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    sink.scalars(tags | {"images_seen": float(step * config.train.global_batch)}, step, epoch)
    for i in range(min(config.tracking.pictures, val_set.manifest.images)):
        sink.picture(f"predictions/{i}", partial(picture_of, val_set, i, detections), step)
    for i, draw in enumerate(looks):
        sink.picture(f"attention/{i}", draw, step)
    before = best_evaluation(str(config.train.run_dir))
    sink.document(evaluation_name(step), report(numbers, config.eval.image_side, step=step, epoch=epoch))
    if ranks.is_main:
        found = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        best = f"; best AP before: {before[1]:.3f} at step {before[0]}" if before else ""
        log.info("epoch %g: %s%s", epoch, found, best)
        for line in collapse(
            numbers["AP"], before[1] if before else 0.0, step * config.train.global_batch, config.model.attention,
            val_set.ground_truth, partial(to_rows, detections),
        ):  # fmt: skip
            log.warning("%s", line)


def whole_detector(engine: Any, ema: Ema | None, config: Config, ranks: Ranks) -> Detector:
    """What is evaluated, in evaluation mode: the model that is trained, or, where this rank holds only a part of the
    weights or others are wanted, a copy that lives as long as the evaluation. Collective."""
    if ema is None and engine.zero_optimization_stage() < 3:
        engine.eval()
        return engine.module
    shares = shares_of(engine)
    pieces = {"weight": [share.weight for share in shares] if ema is None else ema.pieces}
    weights = {name.removeprefix("weight/"): tensor
               for name, tensor in gather(engine, shares, pieces, ranks, everywhere=True).items()}  # fmt: skip
    weights |= fixed_tensors(engine)
    detector = build_detector(config.model).to(ranks.device).eval()
    with torch.no_grad():
        for name, tensor in named_tensors(detector).items():
            tensor.copy_(weights[name])
    return detector


def picture_of(val_set: EvalLoader, i: int, detections_N: np.ndarray) -> np.ndarray | None:
    """Image i of the set, what was found in it beside what is there: uint8 (H, W, 3); None if it is a bad sample."""
    try:
        encoded, sample = val_set.source.read(i)
        image = decode(encoded)
    except InputError:
        return None
    classes = val_set.manifest.classes
    shown_N = (detections_N["image_id"] == sample.image_id) & (detections_N["score"] >= SHOWN_SCORE)
    found = to_rows(detections_N[shown_N])
    titles = (f"predictions with a score of at least {SHOWN_SCORE}", "ground truth")
    both = side_by_side(
        draw_coco(image, found, classes), draw_coco(image, list(coco_annotations(sample)), classes), titles
    )  # fmt: skip
    return np.asarray(both)


def attention_in(detector: Detector, val_set: EvalLoader, i: int, config: Config) -> Callable[[], np.ndarray | None]:
    """What draws where the most certain query of image i looks: uint8 (H, W, 3), or None as for `picture_of`.

    The detector runs here, and draws where pictures are kept.
    """
    try:
        image = decode(val_set.source.read(i)[0])
    except InputError:
        return lambda: None
    classes = val_set.manifest.classes
    found = look_inside(detector, image, config, classes)
    return lambda: np.asarray(draw_attention(image, found[0], classes)) if found else None
