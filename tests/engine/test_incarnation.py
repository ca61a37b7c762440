import json
import os

import pytest

from framework.engine import incarnation
from framework.engine.incarnation import FILE, Incarnation
from framework.engine.lifecycle import Lifecycle
from framework.engine.ranks import Ranks, init_ranks
from framework.errors import InputError, UsageError
from tests.distributed import run_ranks

JOB = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n3"}


def test_the_last_one_to_start_owns_the_folder(tmp_path):
    first = Incarnation(tmp_path, init_ranks(), JOB)
    assert first.overtaken() is None
    second = Incarnation(tmp_path, init_ranks(), {**JOB, "SLURM_RESTART_COUNT": "1", "SLURMD_NODENAME": "n5"})
    assert second.overtaken() is None
    assert "taken over (job 7, restart 1, process " in first.overtaken()
    assert " on n5, " in first.overtaken()
    with pytest.raises(InputError, match="this one writes nothing more"):
        first.refuse_overtaken()


def test_a_glance_looks_once_in_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(incarnation, "GLANCE_S", 3600.0)
    first = Incarnation(tmp_path, init_ranks(), JOB)
    assert first.glance() is None
    Incarnation(tmp_path, init_ranks(), {"SLURM_JOB_ID": "8"})
    assert first.glance() is None
    monkeypatch.setattr(incarnation, "GLANCE_S", 0.0)
    assert "job 8, restart 0" in first.glance()


def test_a_start_that_comes_late_is_refused(tmp_path):
    newer = Incarnation(tmp_path, init_ranks(), {**JOB, "SLURM_RESTART_COUNT": "2"})
    with pytest.raises(UsageError, match="restart 1 of job 7 comes after restart 2"):
        Incarnation(tmp_path, init_ranks(), {**JOB, "SLURM_RESTART_COUNT": "1"})
    assert newer.overtaken() is None


def test_another_job_and_a_start_by_hand_take_over(tmp_path):
    first = Incarnation(tmp_path, init_ranks(), {**JOB, "SLURM_RESTART_COUNT": "2"})
    second = Incarnation(tmp_path, init_ranks(), {"SLURM_JOB_ID": "8"})
    assert "job 8, restart 0" in first.overtaken()
    Incarnation(tmp_path, init_ranks(), {})
    assert f"(process {os.getpid()} on " in second.overtaken()


def test_a_line_that_was_not_written_whole_is_passed_over(tmp_path):
    first = Incarnation(tmp_path, init_ranks(), JOB)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"time": "2026')
    assert first.overtaken() is None
    with (tmp_path / FILE).open("a") as file:
        whole = {"token": "x", "job": None, "host": "h", "pid": 1, "time": "t", "restart": 0}
        file.write("\n" + json.dumps(whole) + "\n")
    assert "process 1 on h" in first.overtaken()


def overtaken_on_both(ranks: Ranks, run_dir: str) -> str:
    incarnation = Incarnation(run_dir, ranks, JOB)
    with Lifecycle(ranks, run_dir, 0).watching() as lifecycle:
        lifecycle.ask(incarnation.overtaken())
        assert lifecycle.told_to_stop() is None
        if ranks.is_main:
            Incarnation(run_dir, Ranks(0, 1, 0, ranks.device), {"SLURM_JOB_ID": "9"})
        lifecycle.ask(incarnation.overtaken())
        with pytest.raises(InputError) as error:
            lifecycle.told_to_stop()
    return str(error.value)


def test_all_ranks_stop_alike(tmp_path):
    told = run_ranks(2, overtaken_on_both, str(tmp_path))
    assert told[0] == told[1]
    assert "job 9, restart 0" in told[0]
