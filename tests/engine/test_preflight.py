"""Two real processes that meet; what is wrong with one is told on both."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from framework.config import load
from framework.engine.preflight import Preflight, found_faults, gpu_faults
from framework.engine.ranks import Ranks
from framework.errors import LEFT_ALONE, MISUSED, UsageError
from tests.distributed import free_port, run_ranks
from tests.paths import REPOSITORY

BASE = ["model.backbone.norm=group", "eval.every=0"]


def meets(ranks: Ranks, port: int, folder: str, settings: list[str], env: dict[str, str], wait_s: float) -> str:
    """What is told, "" for nothing. What is in settings and env is for rank 1."""
    store = dist.TCPStore("127.0.0.1", port, ranks.world, ranks.is_main, timedelta(seconds=30), wait_for_workers=False)
    common = {"LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{ranks.rank + 1}"}
    overrides = [*BASE, f"train.run_dir={folder}/run", f"train.meet_minutes={wait_s / 60}"]
    overrides += settings if ranks.rank else []
    meeting = Preflight(load(None, overrides), {**common, **(env if ranks.rank else {})})
    if env.get("absent") and ranks.rank:
        time.sleep(wait_s + 1)
        return ""
    try:
        meeting.meet(store, ranks.rank, ranks.world)
        meeting.reduce(ranks.device, None)
    except UsageError as error:
        return str(error)
    return ""


def told(tmp_path: Path, *settings: str, env: dict[str, str] | None = None, wait_s: float = 20.0) -> list[str]:
    return run_ranks(2, meets, free_port(), str(tmp_path), list(settings), env or {}, wait_s)


def test_ranks_that_agree_meet(tmp_path):
    assert told(tmp_path) == ["", ""]
    assert list((tmp_path / "run").iterdir()) == []


def test_shards_that_one_node_does_not_see(tmp_path):
    missing = f"data.train={tmp_path}/elsewhere"
    assert told(tmp_path, missing) == 2 * [f"n2: data.train: {tmp_path}/elsewhere is not there"]


def test_a_run_folder_on_the_disk_of_a_node(tmp_path):
    faults = told(tmp_path, f"train.run_dir={tmp_path}/local", wait_s=4.0)
    assert faults == 2 * [f"train.run_dir: {tmp_path}/local on n2 is not the folder that rank 0 sees; expected one "
                          "that all machines share"]  # fmt: skip


def test_fewer_gpus_than_processes(tmp_path):
    faults = told(tmp_path, env={"SLURM_GPUS_ON_NODE": "1", "LOCAL_WORLD_SIZE": "2"})
    assert all(fault.startswith("n2: 2 processes, and SLURM gave 1 GPUs") for fault in faults)


def test_gpus_that_torch_does_not_see():
    env = {"LOCAL_RANK": "0", "SLURM_GPUS_ON_NODE": "64", "LOCAL_WORLD_SIZE": "64"}
    assert "sees" in gpu_faults(env)[0]
    assert "DS_ACCELERATOR=cpu" in gpu_faults(env)[0]
    assert gpu_faults({**env, "DS_ACCELERATOR": "cpu"}) == []


def test_a_rank_that_does_not_come_is_named(tmp_path):
    faults = told(tmp_path, env={"absent": "1"}, wait_s=3.0)
    assert faults[0].startswith("rank 1 did not come within 3 s (train.meet_minutes); those on n1 did")


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file in its place")
    faults = told(tmp_path)
    assert len(set(faults)) == 1
    assert faults[0].startswith(f"train.run_dir: {tmp_path}/run cannot be written to on n1: ")


def report(host: str, **changes: str) -> dict:
    same = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "code": "c0ffee", "library": "abc"}
    return {"host": host, "cuda": None, **same, "faults": [], **changes}


def test_what_differs_is_told_by_host():
    seen = 3 * [{"skew": 0.1, "fault": None}]
    assert found_faults([report("n1"), report("n2"), report("n3")], seen) == []
    assert found_faults([report("n1"), report("n2"), report("n3", torch="2.12.0")], seen) == [
        "torch: not the same everywhere: 2.13.0 on n1, n2; 2.12.0 on n3"
    ]
    (code,) = found_faults([report("n1"), report("n2", code="0ld"), report("n3", code=None)], seen)
    assert code == "code: not the same everywhere: c0ffee on n1; 0ld on n2"
    late = [*seen[:2], {"skew": -95.0, "fault": None}]
    assert found_faults([report("n1"), report("n2"), report("n3")], late) == [
        "the clock of n3 is -95 s off that of n1; expected within 30 s"
    ]


def stops_in_the_middle(ranks: Ranks, port: int, folder: str) -> None:
    store = dist.TCPStore("127.0.0.1", port, ranks.world, ranks.is_main, timedelta(seconds=30), wait_for_workers=False)
    overrides = [*BASE, f"train.run_dir={folder}/run", "train.meet_minutes=0.05"]
    meeting = Preflight(load(None, overrides), {"SLURMD_NODENAME": f"n{ranks.rank + 1}"})
    meeting.meet(store, ranks.rank, ranks.world)
    if ranks.rank:
        time.sleep(20)  # and no all-reduce
    else:
        with open(f"{folder}/told", "w") as file:
            os.dup2(file.fileno(), 2)
            meeting.reduce(ranks.device, None)


def test_an_all_reduce_that_does_not_return_ends_the_run_and_names_who_is_not_in_it(tmp_path):
    with pytest.raises(ProcessExitedException) as error:
        run_ranks(2, stops_in_the_middle, free_port(), str(tmp_path))
    assert (error.value.error_index, error.value.exit_code) == (0, LEFT_ALONE)
    told = (tmp_path / "told").read_text()
    assert told.startswith("error: an all-reduce is not there within 3 s (train.meet_minutes): rank 1 on n2 did not ")


def opened(**variables: str) -> str:
    """What init_ranks tells of this environment."""
    command = [sys.executable, "-c", "from framework.engine import ranks\nfrom framework.errors import command\n"
               "ranks.STORE_PATIENCE_S = 2.0\ncommand(ranks.init_ranks)"]  # fmt: skip
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0", "RANK": "0", **variables}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == MISUSED
    return done.stderr.splitlines()[-1]


def test_a_port_that_is_taken_a_name_that_is_unknown_and_a_rank_0_that_is_not_there_are_told():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"MASTER_PORT: something else listens at port {port} of " in opened(MASTER_PORT=port)
    assert "MASTER_PORT: not set, with 2 processes" in opened()
    assert "does not know the name no.such.host" in opened(MASTER_ADDR="no.such.host", MASTER_PORT="20000")
    port = str(free_port())
    assert f"rank 1 on {socket.gethostname()} finds no rank 0 at 127.0.0.1:{port}" in opened(RANK="1", MASTER_PORT=port)
