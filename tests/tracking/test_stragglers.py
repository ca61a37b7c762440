"""Two real processes, one of which is slow."""

import logging
import os
import time

import torch
from torch import nn

from framework.engine.ranks import Ranks
from framework.tracking.meter import Meter
from framework.tracking.stragglers import Stragglers
from tests.distributed import run_ranks


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def records(ranks: Ranks, slow_rank: int) -> tuple[list[dict[str, float]], list[str]]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("tenfold").addHandler(handler)
    module = Slow(0.12 if ranks.rank == slow_rank else 0.02)
    meter = Meter(ranks, (), Stragglers(ranks, module, {**os.environ, "SLURMD_NODENAME": f"n{ranks.rank + 1}"}))
    values = []
    for _ in range(3):
        for _ in range(3):
            module.train()(torch.zeros(1))
        module.eval()(torch.zeros(1))  # an evaluation is no step
        meter.waited_s = 0.2 * ranks.rank
        values.append(meter.read())
    return values, told


def test_the_slowest_rank_is_named():
    for slow_rank in (0, 1):
        for values, told in run_ranks(2, records, slow_rank):
            assert [v["stragglers/slowest_rank"] for v in values] == 3 * [slow_rank]
            assert all(v["stragglers/forward_of_median"] > 2 for v in values)
            assert all(v["stragglers/data_wait_rank"] == 1 for v in values)
            assert len(told) == 1  # after the second record, and not again
            assert f"rank {slow_rank} on n{slow_rank + 1} is slow" in told[0]
