"""How a run ends before its end: told to stop by a scheduler or by Ctrl-C, or because no step comes back.

A signal sets a flag. While a step is computed the ranks tell each other, on the CPU, whether anybody's was set before
it; after the step all know it, save, and leave with SAVED. A thread of each rank looks whether steps end; if none does,
it writes down where every thread stands and leaves with HUNG. Both codes mean: start the same command again.
"""

import contextlib
import faulthandler
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from framework.engine.ranks import Ranks
from framework.errors import InputError

log = logging.getLogger("tenfold")

SAVED, HUNG = 85, 86  # exit codes
# SLURM warns by USR2 as asked, and ends a job by CONT and TERM.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGCONT)
FAULT = 1000  # in the place of a signal's number
LOOKS = 20  # without a sign of life between them: hung; by their number, since a process that is suspended has no time

MOST_GRACE_S = 60.0
# After which the same signal again means: at once. TERM comes from a scheduler and, a second time, from what it ends.
IMPATIENT_S: dict[int, float] = {signal.SIGINT: 0.0, signal.SIGTERM: 2.0}


class Lifecycle:
    """Of one run, while it trains.

    run_dir: where the stacks of a hung rank go. hang_s: seconds without a sign of life that mean hung; 0: never.
    """

    def __init__(self, ranks: Ranks, run_dir: str | Path, hang_s: float) -> None:
        self.ranks, self.run_dir, self.hang_s = ranks, Path(run_dir), hang_s
        self.signal = 0  # that this process got first
        self._got: dict[int, float] = {}
        self._signs, self._pid = 0, os.getpid()
        self._flag, self._work = torch.zeros(1), None
        self._fault: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator["Lifecycle"]:
        """Signals are noted, and a hang is ended, inside. Only a main thread can note signals."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._note) for number in SIGNALS}
        ended = threading.Event()
        if self.hang_s > 0:
            threading.Thread(target=self._watch, args=(ended,), daemon=True).start()
        self.alive()
        try:
            yield self
        finally:
            ended.set()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data worker that has just been forked, and whom its parent ends
            os._exit(0) if number == signal.SIGTERM else None
        now = time.monotonic()
        first = self._got.setdefault(number, now)
        if first < now - IMPATIENT_S.get(number, math.inf):  # once more: somebody will not wait
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = self.signal or number

    def alive(self) -> None:
        """A sign of life: training goes on."""
        self._signs += 1

    def update(self, count: int = 1) -> None:
        """A sign of life from what reports progress."""
        self.alive()

    def ask(self, fault: str | None = None) -> None:
        """Before a step: begin to tell the others; also why the run cannot go on. Collective."""
        self._fault = fault
        self._flag.fill_(FAULT if fault else self.signal)
        if self.ranks.world > 1:
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self.ranks.host_group, async_op=True)

    def told_to_stop(self) -> str | None:
        """After the step: the name of the signal that any rank had got when it was asked; the same on all.

        Raises InputError on every rank when one had a fault.
        """
        self.alive()
        if self._work is not None:
            self._work.wait()
        number = int(self._flag.item())
        if number == FAULT:
            raise InputError(next(filter(None, self.ranks.all_gather_objects(self._fault))))
        return signal.Signals(number).name if number else None

    def _watch(self, ended: threading.Event) -> None:
        pause_s = min(self.hang_s / LOOKS, threading.TIMEOUT_MAX)
        silent, signs = 0, -1
        while silent <= LOOKS:
            if ended.wait(pause_s):
                return
            silent, signs = silent + 1 if self._signs == signs else 0, self._signs
        # None leaves before the others have noticed, too, and written. And what is written to may be what hangs.
        grace_s = min(2 * pause_s, MOST_GRACE_S)
        timer = threading.Timer(grace_s, os._exit, (HUNG,))
        timer.daemon = True
        timer.start()
        path = self.run_dir / f"hung-rank{self.ranks.rank}.txt"
        with contextlib.suppress(OSError), path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        log.critical("no sign of life for %.3g minutes (train.hang_minutes): %s says where this rank stands",
                     self.hang_s / 60, path)  # fmt: skip
        timer.join()


def patience(hang_s: float) -> timedelta:
    """How long a rank waits for another in a collective: longer than it takes to see that one hangs."""
    return timedelta(seconds=2 * hang_s + 60) if hang_s else timedelta(days=7)
