"""The processes of a run: who they are, and the few things they say to each other outside the engine."""

import atexit
import importlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from framework.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Everybody's value, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def refuse_different(self, fingerprints: dict[str, str | None]) -> None:
        """Raises UsageError on every rank when one has other data than rank 0 for a key: a stale copy on the disk of a
        node. Collective."""
        everywhere = self.all_gather_objects(fingerprints)
        for key, expected in everywhere[0].items():
            for rank, found in enumerate(one[key] for one in everywhere):
                if found != expected:
                    raise UsageError(f"{key}: not the same set on all ranks: rank 0 found fingerprint {expected}, rank "
                                     f"{rank} {found}; copy the set to every node again")  # fmt: skip

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def init_ranks(patience: timedelta | None = None) -> Ranks:
    """Join the process group that the launcher's environment describes; alone where there is no launcher.

    One GPU a process where there are GPUs (nccl), otherwise, or with DS_ACCELERATOR=cpu, the CPU's cores are shared
    out (gloo). patience: with the others in collectives (None: DeepSpeed's, ten minutes).
    Raises UsageError: more processes than GPUs.
    """
    import deepspeed

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local_rank)})
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"--num_gpus: process {local_rank} of this machine has no GPU, there are "
                             f"{torch.cuda.device_count()}; start as many processes as GPUs")  # fmt: skip
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
        # DeepSpeed would compile an all-reduce of its own for CPUs at the first start (half a minute); gloo does.
        # By its name: the attribute deepspeed.comm.torch is torch itself.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    if not dist.is_initialized():
        waits = {} if patience is None else {"timeout": patience}
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, **waits)
        if backend == "gloo":  # whose threads abort a process that exits with the group still open
            atexit.register(dist.destroy_process_group)
    return Ranks(rank, world, local_rank, device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
