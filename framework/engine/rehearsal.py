"""The largest batch that a run can meet, before its first step: what does not fit is known in the first minute."""

from typing import Any

import torch
from torch import Tensor

from framework.data.batch import Batch, blank_batch, padded_pixels
from framework.engine.ds_config import EngineConfig, loss_scaler, memory_savers
from framework.engine.ranks import Ranks
from framework.engine.shares import shares_of
from framework.errors import UsageError
from framework.losses.criterion import Criterion


def rehearse(
    engine: Any, criterion: Criterion, sizes_hw: list[tuple[int, int]], boxes: int, *, ranks: Ranks,
    config: EngineConfig, grain: int = 1,
) -> None:  # fmt: skip
    """Forward and backward of the largest micro-batch of all ranks; its loss is NaN when it goes back, so nothing is
    applied.

    sizes_hw, boxes: of the images of this rank's largest micro-batch, sides being padded to multiples of grain.
    Collective.
    Raises UsageError: memory does not suffice here; says how many of the images fit (below ZeRO 3, where that can be
    tried without the other ranks), and what helps.
    """
    shares_of(engine)  # makes the moments, which the first step would make
    sizes_hw, boxes = max(ranks.all_gather_objects((sizes_hw, boxes)), key=lambda one: padded_pixels(one[0], grain))
    largest = blank_batch(sizes_hw, boxes)
    scaler = loss_scaler(engine)
    before = dict(vars(scaler)) if scaler is not None else {}
    try:
        for _ in range(engine.gradient_accumulation_steps()):
            total = forward(engine, criterion, largest, ranks.device)
            engine.backward(total * torch.nan)
            if engine.zero_optimization_stage() == 0:
                engine.optimizer.overflow = True
            engine.step()
    except torch.OutOfMemoryError as error:
        images, (height, width) = len(sizes_hw), (max(sides) for sides in zip(*sizes_hw, strict=True))
        said = str(error).splitlines()[0]
    else:
        if scaler is not None:  # an overflow lowers it
            vars(scaler).update(before)
        return
    # Outside the except clause: the exception holds what the failed step held.
    engine.optimizer.zero_grad()
    fitting = ""
    if engine.zero_optimization_stage() < 3:
        fit = most_that_fit(engine, criterion, sizes_hw, boxes, ranks.device)
        fitting = f"{fit} of them fit in a forward and backward pass; "
    raise UsageError(
        f"train.micro_batch: a step on {images} images of {height} x {width} px, the largest of the epoch, "
        f"does not fit in memory ({said}); {fitting}set {memory_savers(config)}"
    )


def forward(engine: Any, criterion: Criterion, batch: Batch, device: torch.device) -> Tensor:
    targets = batch.targets.to(device)
    return criterion.total(criterion(engine(*batch.inputs(device)), targets, max(1, len(targets.labels_N))))


def most_that_fit(
    engine: Any, criterion: Criterion, sizes_hw: list[tuple[int, int]], boxes: int, device: torch.device
) -> int:
    """Of the images of a batch that does not fit; gradients go nowhere, so that the engine has no part in it."""
    weights = [p for p in engine.module.parameters() if p.requires_grad]
    for images in range(len(sizes_hw) - 1, 0, -1):
        try:
            torch.autograd.grad(forward(engine, criterion, blank_batch(sizes_hw[:images], boxes), device), weights)
            return images
        except torch.OutOfMemoryError:
            continue
    return 0
