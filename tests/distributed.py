"""Run a function in several real processes that can talk to each other (gloo)."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from typing import Any

IMPORTED_BEFORE = [
    "torch", "deepspeed", "framework.engine.ds_config", "framework.engine.ranks",
    "torch._dynamo",  # by every optimizer, for seconds
]  # fmt: skip


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(ranks, *args) on `world` processes; what each returned, in the order of ranks.

    The function has to be importable by its name. An error in one process is raised here. One rank is this process;
    others are forked from a process that has imported what takes long, and nothing else.
    """
    if world == 1:
        from framework.engine.ranks import init_ranks

        return [function(init_ranks(), *args)]
    from torch import multiprocessing

    port = free_port()
    with tempfile.TemporaryDirectory() as results:
        set_forkserver_preload(IMPORTED_BEFORE)
        multiprocessing.start_processes(
            _one_rank, (world, port, results, function, args), nprocs=world, start_method="forkserver"
        )
        return [pickle.loads((Path(results) / str(rank)).read_bytes()) for rank in range(world)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _one_rank(rank: int, world: int, port: int, results: str, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    from framework.engine.ranks import init_ranks
    from framework.errors import leave

    (Path(results) / str(rank)).write_bytes(pickle.dumps(function(init_ranks(), *args)))
    leave(0)
