"""One training step: forward, loss and backward of this rank's micro-batches, and one update of the weights."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.engine.guard import Guard
from framework.engine.ranks import Ranks
from framework.errors import InputError
from framework.losses.criterion import Criterion
from framework.losses.matcher import TooManyBoxes


def train_step(
    engine: Any, criterion: Criterion, micro_batches: list[Batch], *, ranks: Ranks, seed: int, step: int, guard: Guard
) -> dict[str, Tensor]:
    """Returns this rank's means over its micro-batches: loss/total, loss/<term>; and the gradient norm of all.

    What is random draws from (seed, step, micro-batch), and losses are divided by the boxes of the global batch:
    the same step in any world. A step whose loss or gradient is not finite on any rank is skipped on all, and returns
    nothing; the guard decides whether the run goes on. Raises InputError with the image ids when an image has more
    boxes than there are queries.
    """
    num_boxes = boxes_per_micro_batch(micro_batches, ranks)
    names: list[str] = []
    means, totals = torch.zeros((), device=ranks.device), []
    for i, batch in enumerate(micro_batches):
        torch.manual_seed(draw_seed(seed, step, ranks.rank * len(micro_batches) + i))
        predictions = engine(*batch.inputs(ranks.device))
        try:
            losses = criterion(predictions, batch.targets.to(ranks.device), num_boxes)
        except TooManyBoxes as error:
            raise InputError(f"step {step + 1}: {error}; image ids of the batch: {batch.image_ids}") from error
        total = criterion.total(losses)
        totals.append(total.detach())
        names = ["loss/total", *(f"loss/{name}" for name in losses)]
        means = means + torch.stack([total, *losses.values()]).detach() / len(micro_batches)
        engine.backward(guard.unless_it_jumps(total))
        norm = replicated_gradient_norm(engine)
        engine.step()  # updates the weights after the last micro-batch of the step, and only then
    if not engine.was_step_applied():
        guard.skipped(step + 1, totals, [batch.image_ids for batch in micro_batches], engine)
        return {}
    guard.applied(means[0])
    norm = torch.as_tensor(engine.get_global_grad_norm() if norm is None else norm, device=ranks.device)
    return dict(zip(names, means.unbind(), strict=True)) | {"grad_norm": norm}


def replicated_gradient_norm(engine: Any) -> Tensor | None:
    """Under ZeRO 0 the norm before clipping, where DeepSpeed neither keeps it nor minds what it is; None above."""
    if engine.zero_optimization_stage() > 0:
        return None
    if not engine.is_gradient_accumulation_boundary():
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.optimizer.overflow = not norm.isfinite().item()
    return norm


def boxes_per_micro_batch(micro_batches: list[Batch], ranks: Ranks) -> Tensor:
    """Mean number of target boxes of a micro-batch over the global batch, at least 1; float32 scalar."""
    count = torch.full((), float(sum(len(b.targets.labels_N) for b in micro_batches)), device=ranks.device)
    return (ranks.sum(count) / (len(micro_batches) * ranks.world)).clamp(min=1.0)


def draw_seed(seed: int, step: int, micro_batch: int) -> int:
    """A seed for what is random in one micro-batch of one step, whichever rank computes it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=7).digest(), "big")
