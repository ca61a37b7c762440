"""What processes of one command owe each other."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def die_with_parent(parent: int) -> None:
    """From now on this process is killed when the thread of `parent`, a process id, that forked it ends, however that
    ends. Linux; elsewhere it does nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)


def keep_freed_memory() -> None:
    """From now on what this process frees stays with it, to be used again: a step on a CPU would else give gigabytes
    back to the system and take them anew, every page touched for the first time. glibc; elsewhere it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Once, before processes are forked: they would hold what is freed here, while this process takes as much anew."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


@contextlib.contextmanager
def worker_pool(
    workers: int, work: str, start: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Forked processes for what is submitted; start(*arguments) is called in each of them first.

    They end with the block, whatever ends it, and with this process. Ctrl-C is left to this one.

    Raises ChildProcessError: one of them was killed. `work`: what they do, for the message.
    """
    gc.collect()
    gc.freeze()  # a collection in a worker would copy the pages of all that is here
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _begin_work, (os.getpid(), start, arguments)
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError(f"a process that {work} was killed (is there too little memory? fewer --workers take "
                                "less)") from error  # fmt: skip
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        gc.unfreeze()


def _begin_work(parent: int, start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches all of them; the first process ends the others
    die_with_parent(parent)
    if start is not None:
        start(*arguments)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Without the collector of cycles: it goes over many records again and again, and frees at any time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
