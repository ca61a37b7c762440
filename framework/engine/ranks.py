"""The processes of a run: who they are, and the few things they say to each other outside the engine."""

import atexit
import contextlib
import importlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from framework.engine import slurm
from framework.errors import UsageError

T = TypeVar("T")

ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
STORE_PATIENCE_S = 300.0  # for rank 0 to begin: on a cold file system importing torch takes minutes


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. host_group: of messages between main processors, None: the default group."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    host_group: Any = None

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

    def from_main(self, function: Callable[[], T]) -> T:
        """What rank 0's call returns, or the error that it raises, on every rank. Collective."""
        result: T | None = None
        problem: Exception | None = None
        if self.is_main:
            try:
                result = function()
            except Exception as error:
                problem = error
        result, problem = self.all_gather_objects((result, problem))[0]
        if problem is not None:
            raise problem
        return cast(T, result)

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


class Meeting(Protocol):
    """What the ranks do before and while they get a process group; see `preflight.Preflight`."""

    wait_s: float  # for the last one to come

    def meet(self, store: dist.Store, rank: int, world: int) -> None: ...

    def bounded(self, what: str) -> contextlib.AbstractContextManager[None]: ...

    def reduce(self, device: torch.device, host_group: Any) -> None: ...


def numbers() -> tuple[int, int, int]:
    """Rank, world and local rank, from a launcher's environment or SLURM's, which torch's variables then say too."""
    if slurm.launched_by_slurm(os.environ):
        os.environ.update(slurm.distributed_environment(os.environ))
    found = {name: int(os.environ.get(name, alone)) for name, alone in ALONE.items()}
    os.environ.update({name: str(number) for name, number in found.items()})
    return found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]


def init_ranks(patience: timedelta | None = None, meeting: Meeting | None = None) -> Ranks:
    """Join the process group that the launcher's environment, or SLURM's, describes; alone where there is neither.

    One GPU a process where there are GPUs (nccl), otherwise, or with DS_ACCELERATOR=cpu, the CPU's cores are shared
    out (gloo). patience: with the others in collectives (None: torch's, minutes).
    Raises UsageError: more processes than GPUs; rank 0 is not found, or its port is taken; what the meeting refuses.
    """
    import deepspeed

    rank, world, local_rank = numbers()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = None
    if world > 1 and not dist.is_initialized():
        store = _open_store(rank, world, STORE_PATIENCE_S if meeting is None else meeting.wait_s)
        if meeting is not None:
            meeting.meet(store, rank, world)
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
    host_group = None
    if not dist.is_initialized():
        waits = patience or default_pg_timeout
        with meeting.bounded("a process group") if store and meeting else contextlib.nullcontext():
            if store is not None or world == 1:  # nobody else has to find the store of a process that is alone
                dist.init_process_group(
                    backend, timeout=waits, store=store or dist.HashStore(), rank=rank, world_size=world
                )
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=waits)
            if world > 1 and backend == "nccl":
                host_group = dist.new_group(backend="gloo", timeout=waits)
        if backend == "gloo":  # whose threads abort a process that exits with the group still open
            atexit.register(dist.destroy_process_group)
        if store is not None and meeting is not None:
            meeting.reduce(device, host_group)
    return Ranks(rank, world, local_rank, device, host_group)


def _open_store(rank: int, world: int, wait_s: float) -> dist.Store:
    """Which rank 0 serves, but under torchrun, whose agent does."""
    if "MASTER_PORT" not in os.environ:
        raise UsageError(f"MASTER_PORT: not set, with {world} processes; start them with deepspeed, torchrun or srun, "
                         "or set it to a free port, the same for all")  # fmt: skip
    host, port, here = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), socket.gethostname()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not agent
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise UsageError(f"MASTER_ADDR: {here} does not know the name {host} ({error.strerror}); set MASTER_ADDR to "
                         "the address of the first node") from error  # fmt: skip
    try:
        store = dist.TCPStore(host, port, world, serves, timedelta(seconds=wait_s), wait_for_workers=False)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if serves:
            raise UsageError(f"MASTER_PORT: something else listens at port {port} of {here} ({said}); set MASTER_PORT "
                             "to a free one") from error  # fmt: skip
        raise UsageError(f"MASTER_ADDR, MASTER_PORT: rank {rank} on {here} finds no rank 0 at {host}:{port} ({said}); "
                         "it has ended, or is not reached") from error  # fmt: skip
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0"
    return dist.PrefixStore(f"tenfold/{attempt}", store)
