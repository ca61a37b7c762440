"""Who the others wait for. Steps end together, so the time of a step is that of the slowest rank, on all of them."""

import logging
import socket
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from framework.engine.ranks import Ranks

log = logging.getLogger("tenfold")

SLOW = 1.5  # times the median
TWICE = 2  # records in a row, before it is told: one may be chance


class Stragglers:
    """Times of this rank's forward passes, in which it waits for nobody (but under ZeRO 3, for weights), and who is
    slowest.

    Tags: stragglers/{slowest_rank, forward_of_median, data_wait_rank, data_wait}: whose forward passes took longest
    and how many times the median; who waited for data longest and which share of its time. Collective.
    """

    def __init__(self, ranks: Ranks, detector: nn.Module, env: Mapping[str, str]) -> None:
        self.ranks = ranks
        self.hosts = ranks.all_gather_objects(env.get("SLURMD_NODENAME") or socket.gethostname())
        self._spans: list[Any] = []
        self._slow = [0] * ranks.world  # records in a row
        detector.register_forward_pre_hook(lambda *_: self._mark() if detector.training else None)
        detector.register_forward_hook(lambda *_: self._mark() if detector.training else None)

    def _mark(self) -> None:
        if self.ranks.device.type == "cuda":  # on the device's own clock: nothing waits for it
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._spans.append(event)
        else:
            self._spans.append(time.perf_counter())

    def forward_s(self) -> float:
        """Since the last call."""
        marks = list(zip(self._spans[::2], self._spans[1::2], strict=False))
        self._spans = []
        if self.ranks.device.type == "cuda":
            if marks:
                marks[-1][1].synchronize()
            return sum(began.elapsed_time(ended) for began, ended in marks) / 1000
        return sum(ended - began for began, ended in marks)

    def values(self, forward_s_W: Tensor, waited_W: Tensor) -> dict[str, float]:
        """Of all ranks: seconds in forward passes, share of the time spent waiting for data. Tells who is slow."""
        times = forward_s_W / forward_s_W.median().clamp(min=1e-9)
        slowest, waits = int(times.argmax()), int(waited_W.argmax())
        for rank, ratio in enumerate(times.tolist()):
            self._slow[rank] = self._slow[rank] + 1 if ratio > SLOW else 0
        if self._slow[slowest] == TWICE:
            log.warning(
                "rank %d on %s is slow, and all wait for it: its forward passes take %.2f times the median (data: "
                "%.0f %% of its time)", slowest, self.hosts[slowest], times[slowest], 100 * waited_W[slowest],
            )  # fmt: skip
        return {
            "stragglers/slowest_rank": float(slowest), "stragglers/forward_of_median": float(times[slowest]),
            "stragglers/data_wait_rank": float(waits), "stragglers/data_wait": float(waited_W[waits]),
        }  # fmt: skip
