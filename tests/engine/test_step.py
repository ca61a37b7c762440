"""A step with the real engine: the same in ZeRO stage 3, in however many pieces feed-forward layers are computed."""

import pytest

from framework.engine.ranks import Ranks
from framework.models import encoder
from tests.distributed import run_ranks
from tests.engine.test_guard import Run

PIECES = (1 << 21, 2048, 1024, 4096, 1024)  # of each step: modules are called more often, or less, than before


def losses(ranks: Ranks) -> dict[int, list[float]]:
    found = {}
    for stage in (0, 3):
        run, found[stage] = Run(ranks, stage), []
        for encoder.PIECE in PIECES:
            found[stage].append(run.take()["loss/total"])
    return found


def test_stage_3_gathers_weights_for_every_piece():
    for per_stage in run_ranks(2, losses):
        assert per_stage[3] == pytest.approx(per_stage[0], rel=1e-5)
