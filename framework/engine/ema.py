"""An exponential moving average of the weights, which is evaluated and saved in their place."""

from typing import Any

import torch
from torch import Tensor

from framework.engine.shares import Share, shares_of


class Ema:
    """Each rank keeps it of its own share of the weights, float32: it costs as much as one of Adam's moments.

    decay: of a step, once the average is older than some 10 / (1 - decay) steps; before it is (1 + n) / (10 + n) at
    its n-th update, so that the random weights of the beginning are soon forgotten.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.shares: list[Share] = shares_of(engine)
        self.decay, self.updates = decay, 0
        self.pieces: list[Tensor] = [share.weight.clone() for share in self.shares]

    @torch.no_grad()
    def update(self) -> None:
        """After a step that was applied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.pieces, [share.weight for share in self.shares], 1 - decay)
