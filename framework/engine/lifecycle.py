"""How a run ends before its end: told to stop by a scheduler or by Ctrl-C, or because no step comes back.

A signal sets a flag. While a step is computed the ranks tell each other, on the CPU, whether anybody's is set; after
the step all know it, save, and leave with SAVED. A thread of each rank looks whether steps end; if none does, it writes
down where every thread stands and leaves with HUNG. Both codes mean: start the same command again.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from framework.engine.ranks import Ranks

log = logging.getLogger("tenfold")

SAVED, HUNG = 85, 86  # exit codes
# SLURM warns by USR2 as asked, and ends a job by CONT and TERM.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGCONT)
LOOKS = 20  # at the time, while it runs out


class Lifecycle:
    """Of one run, while it trains.

    run_dir: where the stacks of a hung rank go. hang_s: seconds without a sign of life that mean hung; 0: for ever.
    """

    def __init__(self, ranks: Ranks, run_dir: str | Path, hang_s: float) -> None:
        self.ranks, self.run_dir, self.hang_s = ranks, Path(run_dir), hang_s
        self.signal = 0  # that this process got
        self._alive_s = time.monotonic()
        on_gpus = ranks.world > 1 and ranks.device.type == "cuda"
        self._group = dist.new_group(backend="gloo") if on_gpus else None  # no GPU has to be waited for
        self._flag, self._work = torch.zeros(1), None

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
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number in (signal.SIGINT, signal.SIGTERM):  # once more: whoever it is does not want to wait
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = self.signal or number

    def alive(self) -> None:
        """A sign of life: training goes on."""
        self._alive_s = time.monotonic()

    def update(self, count: int = 1) -> None:
        """A sign of life from what reports progress."""
        self.alive()

    def ask(self) -> None:
        """Before a step: begin to tell the others. Collective."""
        self._flag.fill_(self.signal)
        if self.ranks.world > 1:
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def told_to_stop(self) -> str | None:
        """After the step: the name of the signal that any rank had got when it was asked, the same on all."""
        self.alive()
        if self._work is not None:
            self._work.wait()
        number = int(self._flag.item())
        return signal.Signals(number).name if number else None

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(self.hang_s / LOOKS):
            silent_s = time.monotonic() - self._alive_s
            if silent_s > self.hang_s:
                path = self.run_dir / f"hung-rank{self.ranks.rank}.txt"
                with contextlib.suppress(OSError), path.open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                log.critical("no step has ended for %.0f s (train.hang_minutes=%g): %s says where this rank stands",
                             silent_s, self.hang_s / 60, path)  # fmt: skip
                os._exit(HUNG)
