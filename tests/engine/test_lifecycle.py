"""Signals and hangs of real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from framework.engine import lifecycle as lifecycle_module
from framework.engine.lifecycle import HUNG, Lifecycle
from framework.engine.ranks import Ranks
from tests.distributed import run_ranks
from tests.paths import REPOSITORY

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def told_after(ranks: Ranks, folder: Path) -> tuple[int, str]:
    """The step after which this rank stops; rank 1 gets a signal in its fourth."""
    lifecycle = Lifecycle(ranks, folder, 0)
    with lifecycle.watching():
        for step in range(100):
            lifecycle.ask()
            if step == 3 and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR2)
            if found := lifecycle.told_to_stop():
                return step, found
    raise AssertionError("nobody was told")


def test_all_ranks_stop_after_the_same_step(tmp_path):
    assert run_ranks(2, told_after, tmp_path) == [(4, "SIGUSR2")] * 2


@pytest.mark.parametrize("number", lifecycle_module.SIGNALS)
def test_signals_are_noted_inside_and_handlers_put_back(number, tmp_path):
    before = {one: signal.getsignal(one) for one in lifecycle_module.SIGNALS}
    lifecycle = Lifecycle(ALONE, tmp_path, 0)
    with lifecycle.watching():
        lifecycle.ask()
        assert lifecycle.told_to_stop() is None
        os.kill(os.getpid(), number)
        lifecycle.ask()
        assert lifecycle.told_to_stop() == number.name
    assert {one: signal.getsignal(one) for one in lifecycle_module.SIGNALS} == before


def test_ctrl_c_twice_ends_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt), Lifecycle(ALONE, tmp_path, 0).watching():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("first", [signal.SIGCONT, signal.SIGUSR2, signal.SIGINT])
def test_a_scheduler_that_goes_on_to_another_signal_is_no_hurry(first, tmp_path):
    """SLURM ends a job by CONT and TERM, or by TERM after the USR2 it was asked for."""
    lifecycle = Lifecycle(ALONE, tmp_path, 0)
    with lifecycle.watching():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGTERM)
        lifecycle.ask()
        assert lifecycle.told_to_stop() == first.name


HANGS = """
import sys, time, torch
from framework.engine.lifecycle import Lifecycle
from framework.engine.ranks import Ranks

def waits_for_ever():
    time.sleep(60)

with Lifecycle(Ranks(3, 1, 3, torch.device("cpu")), sys.argv[1], 1.0).watching() as lifecycle:
    for n in range(30):
        time.sleep(0.1)
        lifecycle.ask() if n % 2 else lifecycle.update(3)
        n % 2 and lifecycle.told_to_stop()
    print("alive", flush=True)
    waits_for_ever()
"""


def test_a_rank_that_hangs_says_where_and_leaves(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == HUNG and result.stdout == "alive\n"
    assert "waits_for_ever" in (tmp_path / "hung-rank3.txt").read_text()
    assert "no sign of life for" in result.stderr and "train.hang_minutes" in result.stderr
