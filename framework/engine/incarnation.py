"""One start of a run among all its starts: whoever started last owns the run folder, and the others stop.

A node that lost its scheduler trains on while the job is already started again elsewhere; a person may start the same
command in two terminals. Each start adds a line to <run>/incarnations.jsonl. Whose line is not the last one any more
writes nothing.
"""

import contextlib
import datetime
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from framework.engine.ranks import Ranks
from framework.errors import InputError, UsageError
from framework.files import sync

FILE = "incarnations.jsonl"
GLANCE_S = 1.0


class Incarnation:
    """This start; only the main rank, which writes, has to know. Making one is collective.

    Raises UsageError on every rank: a later start of the same job is there already.
    """

    def __init__(self, run_dir: str | Path, ranks: Ranks, env: Mapping[str, str] = os.environ) -> None:
        self.path, self.ranks, self._seen = Path(run_dir, FILE), ranks, (0, 0)
        self._looked, self.token = -math.inf, uuid.uuid4().hex
        ranks.from_main(partial(self._begin, env))

    def _begin(self, env: Mapping[str, str]) -> None:
        own = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": env.get("SLURMD_NODENAME") or socket.gethostname(), "pid": os.getpid(), "ranks": self.ranks.world,
            "job": env.get("SLURM_JOB_ID"), "restart": int(env.get("SLURM_RESTART_COUNT") or 0), "token": self.token,
        }  # fmt: skip
        last = last_line(self.path)
        if last and last["job"] and last["job"] == own["job"] and last["restart"] > own["restart"]:
            raise UsageError(f"train.run_dir: restart {own['restart']} of job {own['job']} comes after restart "
                             f"{last['restart']}, on {last['host']}, has begun; this one ends")  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(own) + "\n")
        sync(self.path)

    def glance(self) -> str | None:
        """As `overtaken`, but looks once a second: a shared file system may take as long to look as a GPU a step."""
        return self.overtaken() if time.monotonic() > self._looked + GLANCE_S else None

    def overtaken(self) -> str | None:
        """By whom, where another start owns the folder."""
        if not self.ranks.is_main:
            return None
        self._looked = time.monotonic()
        with contextlib.suppress(FileNotFoundError):  # removed by hand: nobody else has begun
            with self.path.open() as file:  # opened: NFS looks again then, and answers `stat` from memory
                found = os.fstat(file.fileno())
            if (found.st_size, found.st_mtime_ns) == self._seen:
                return None
            last = last_line(self.path)
            if last and last["token"] != self.token:
                job = f"job {last['job']}, restart {last['restart']}, " if last["job"] else ""
                return (f"{self.path.parent}: another start of this run has taken over ({job}process {last['pid']} on "
                        f"{last['host']}, {last['time']}); this one writes nothing more")  # fmt: skip
            self._seen = found.st_size, found.st_mtime_ns
        return None

    def refuse_overtaken(self) -> None:
        """Raises InputError where another start owns the folder."""
        if (by := self.overtaken()) is not None:
            raise InputError(by)


def last_line(path: Path) -> dict[str, Any] | None:
    """Of those that were written whole."""
    with contextlib.suppress(FileNotFoundError):
        for line in reversed(path.read_text().splitlines()):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return None
