"""What a run does about steps that would harm it: not finite, or with a loss that jumps."""

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.engine.ds_config import loss_scaler
from framework.engine.ranks import Ranks
from framework.errors import InputError, UsageError

log = logging.getLogger("tenfold")

REMEMBERED = 64  # losses that a jump is measured against
SHOWN_IDS = 16


@dataclass(frozen=True)
class GuardConfig:
    """max_skipped: so many steps in a row may be skipped because the loss or a gradient is not finite; one more ends
        the run. In fp16 those do not count that only overflowed because the loss was scaled too much.
    skip_jumps: also skip a step with a micro-batch whose loss is this many times the median of the last 64 steps'
        losses; 0: never. Every step then waits for its loss.
    """

    max_skipped: int = 3
    skip_jumps: float = 0.0

    def __post_init__(self) -> None:
        if self.max_skipped < 0:
            raise UsageError(f"guard.max_skipped: found {self.max_skipped}, expected 0 or more")
        if self.skip_jumps != 0 and not 1 < self.skip_jumps < math.inf:
            raise UsageError(f"guard.skip_jumps: found {self.skip_jumps}, expected a factor above 1, or 0 for never")


class Guard:
    """Of one run. A loss that has to be skipped is made NaN, which ZeRO's reduction carries to all ranks."""

    def __init__(self, config: GuardConfig, ranks: Ranks, state: dict[str, Any] | None = None) -> None:
        self.config, self.ranks = config, ranks
        state = state or {"in_a_row": 0, "skipped": 0, "losses": []}
        self.in_a_row, self.total = state["in_a_row"], state["skipped"]
        self.losses: deque[float] = deque(state["losses"], REMEMBERED)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: the run that goes on skips what an uninterrupted one would."""
        return {"in_a_row": self.in_a_row, "skipped": self.total, "losses": list(self.losses)}

    def unless_it_jumps(self, total: Tensor) -> Tensor:
        """The loss of a micro-batch, as NaN if it is far from what losses were."""
        limit = self.limit()
        return total if math.isinf(limit) or total.item() <= limit else total * torch.nan

    def limit(self) -> float:
        """Of the loss of a micro-batch; infinite where there is none, or not yet."""
        known = self.config.skip_jumps and len(self.losses) == REMEMBERED
        return self.config.skip_jumps * statistics.median(self.losses) if known else math.inf

    def applied(self, total: Tensor) -> None:
        """After a step that was taken, with this rank's mean loss. Collective where jumps are looked for."""
        self.in_a_row = 0
        if self.config.skip_jumps:
            mean = self.ranks.sum(total.clone()).item() / self.ranks.world
            self.losses.extend([mean] if math.isfinite(mean) else [])

    def skipped(self, step: int, totals: list[Tensor], image_ids: list[list[int]], engine: Any) -> None:
        """After a step that was not taken: log why. Collective.

        totals, image_ids: of this rank's micro-batches.
        Raises InputError on every rank when it is one too many in a row; names the images.
        """
        mine = [(total.item(), ids) for total, ids in zip(totals, image_ids, strict=True)]
        everywhere = [one for rank in self.ranks.all_gather_objects(mine) for one in rank]
        broken = [ids for total, ids in everywhere if not math.isfinite(total)]
        self.total += 1
        say = log.warning if self.ranks.is_main else log.debug
        limit = self.limit()
        jumped = [ids for total, ids in everywhere if total > limit]
        scaler = loss_scaler(engine)
        if scaler is not None and not broken and not jumped and scaler.cur_scale > scaler.min_scale:
            say("step %d is skipped: gradients overflowed; the loss is scaled by %g from here", step, scaler.cur_scale)
            return
        self.in_a_row += 1
        if broken:
            suspects, why = broken, "the loss is not finite"
        elif jumped:
            largest = max(total for total, _ in everywhere)
            suspects, why = jumped, f"a loss of {largest:.4g} is over {limit:.4g} (guard.skip_jumps)"
        else:
            suspects, why = [ids for _, ids in everywhere], "a gradient is not finite"
        ids = [one for ids in suspects for one in ids]
        named = ", ".join(map(str, ids[:SHOWN_IDS])) + f" and {len(ids) - SHOWN_IDS} more" * (len(ids) > SHOWN_IDS)
        say("step %d is skipped: %s; image ids: %s", step, why, named)
        if self.in_a_row > self.config.max_skipped:
            raise InputError(f"step {step}: {why}, and so in {self.in_a_row} steps in a row (guard.max_skipped is "
                             f"{self.config.max_skipped}); image ids: {named}; lower optim.lr, set "
                             "engine.precision=fp32, or look at these images")  # fmt: skip
