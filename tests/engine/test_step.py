"""A step with the real engine: at stage 3, where no weights are at hand for functions of a CPU's own, the same."""

import pytest

from framework.engine.ranks import Ranks
from tests.distributed import run_ranks
from tests.engine.test_guard import Run

STEPS = 3


def losses(ranks: Ranks) -> dict[int, list[float]]:
    found = {}
    for stage in (0, 3):
        run = Run(ranks, stage)
        found[stage] = [run.take()["loss/total"] for _ in range(STEPS)]
    return found


def test_losses_at_stage_3_are_those_at_stage_0():
    for per_stage in run_ranks(2, losses):
        assert per_stage[3] == pytest.approx(per_stage[0], rel=1e-5)
