"""Before the first step: do all ranks of a run have the same code, see the same files, and reach each other?

Ranks report to a store that rank 0 serves, before any of them needs a collective: who never came, and what is
different where, is told by host, on all of them, and the run ends instead of hanging.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from framework.config import Config
from framework.data.remote import is_remote
from framework.errors import LEFT_ALONE, UsageError
from framework.tracking.run_folder import code_version
from ops import library

log = logging.getLogger("tenfold")

LAST_S = 5.0  # that rank 0, which serves the store, stays after the others
PROBE_S = 20.0  # for a file to be seen by all: network file systems look again after seconds
SKEW_S = 30.0  # between two clocks; munge itself gives up at minutes
SAME = ("python", "torch", "deepspeed", "cuda", "code", "library")


class Preflight:
    """Of one run. Its steps are collective; each raises UsageError on every rank, or none."""

    def __init__(self, config: Config, env: Mapping[str, str] = os.environ) -> None:
        self.config, self.env, self.wait_s = config, env, 60 * config.train.meet_minutes
        self.began = time.perf_counter()

    def meet(self, store: Store, rank: int, world: int) -> None:
        """Everybody is there, with the same versions and code, and sees the data, the run folder and GPUs."""
        self.store, self.rank, self.world = PrefixStore("preflight", store), rank, world
        self.serves = rank == 0  # the store, and so it judges
        self.store.set(f"report/{rank}", json.dumps(own_report(self.config, rank, self.env)))
        self._count_in("came")
        if self.serves:
            self._wait_for_all("came")
            self.reports = [json.loads(self.store.get(f"report/{r}")) for r in range(world)]
            self.probe = f".preflight-{uuid.uuid4().hex[:8]}"  # of this start
            fault = self._put_probe()
            self.store.set("now", json.dumps([time.time(), fault, self.probe]))
        now, fault, self.probe = json.loads(self._get("now"))
        look_s = min(PROBE_S, self.wait_s / 2)
        seen = {"skew": time.time() - now, "fault": fault if self.serves else self._probe_fault(fault, look_s)}
        self.store.set(f"seen/{rank}", json.dumps(seen))
        self._count_in("seen all")
        faults = []
        if self.serves:
            self._wait_for_all("seen all")
            with contextlib.suppress(OSError):  # not there where it could not be written
                self._probe().unlink()
            faults = found_faults(self.reports, [json.loads(self.store.get(f"seen/{r}")) for r in range(world)])
            self.store.set("verdict", json.dumps([faults, sorted({r["host"] for r in self.reports})]))
        faults, self.hosts = json.loads(self._get("verdict"))
        if faults:
            self._refuse(faults)

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """What all ranks do inside, and may hang in, ends within wait_s; or this process ends, with a line that says
        who is not in it. A thread sees to it, with a connection of its own: what hangs cannot be asked."""
        store: Any = self.store.clone()  # type: ignore[attr-defined]
        store.set(f"enters {what}/{self.rank}", "")

        def expire() -> None:
            print(f"error: {self._who_hangs(store, what)}", file=sys.stderr, flush=True)
            time.sleep(LAST_S if self.serves else 0.0)  # it serves the store
            os._exit(LEFT_ALONE)

        timer = threading.Timer(self.wait_s, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        store.set(f"leaves {what}/{self.rank}", "")

    def reduce(self, device: torch.device, host_group: Any) -> None:
        """An all-reduce comes back, in each group; and how fast it is."""
        values = torch.ones((16 if device.type == "cuda" else 1) * 2**20, device=device)
        with self.bounded("an all-reduce"):
            dist.all_reduce(torch.ones(1), group=host_group)
            times = []
            for _ in range(4):
                began = time.perf_counter()
                dist.all_reduce(values)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - began)
        best = min(times[1:])
        rate = 2 * (self.world - 1) / self.world * values.nbytes / best / 1e9
        log.info(
            "preflight: %d ranks on %s; all-reduce of %d MiB in %.3g ms, %.3g GB/s each way and rank; %.1f s in all",
            self.world, ", ".join(self.hosts[:8]) + (", ..." if len(self.hosts) > 8 else ""), values.nbytes >> 20,
            1000 * best, rate, time.perf_counter() - self.began,
        )  # fmt: skip

    def _refuse(self, faults: list[str]) -> None:
        """On every rank; rank 0, which serves the store, leaves last."""
        self.store.add("refused", 1)
        deadline = time.monotonic() + LAST_S
        while self.serves and self.store.add("refused", 0) < self.world and time.monotonic() < deadline:
            time.sleep(0.05)
        raise UsageError("\n  ".join(["before the first step:", *faults] if len(faults) > 1 else faults))

    def _count_in(self, what: str) -> None:
        if self.store.add(what, 1) == self.world:
            self.store.set(f"{what}: all", "")

    def _wait_for_all(self, what: str) -> None:
        """On rank 0. Raises UsageError, on it and those that came, naming those that did not."""
        deadline, told = time.monotonic() + self.wait_s, False
        while not self.store.check([f"{what}: all"]):
            key = "report" if what == "came" else "seen"
            if time.monotonic() > deadline:
                absent = [r for r in range(self.world) if not self.store.check([f"{key}/{r}"])]
                fault = (f"{ranks_text(absent)} did not come within {self.wait_s:.0f} s (train.meet_minutes); "
                         f"{self._where(absent)}")  # fmt: skip
                self.store.set("now", json.dumps([0.0, None, ""]))
                self.store.set("verdict", json.dumps([[fault], []]))
                self.world -= len(absent)
                self._refuse([fault])
            if not told and deadline - time.monotonic() < self.wait_s - 20:
                told = True
                log.info("waiting for %d of %d ranks", self.world - self.store.add(what, 0), self.world)
            time.sleep(0.02)

    def _where(self, absent: list[int]) -> str:
        """What is known of ranks that did not come."""
        came = sorted({json.loads(self.store.get(f"report/{r}"))["host"]
                       for r in range(self.world) if r not in absent})  # fmt: skip
        nodes = self.env.get("SLURM_STEP_NODELIST")
        expected = f" of {nodes}" if nodes else ""
        return f"those on {', '.join(came)} did{expected}; their logs say why, or they do not reach rank 0"

    def _get(self, key: str) -> bytes:
        """Rank 0 sets it, or is gone."""
        try:
            self.store.wait([key], datetime.timedelta(seconds=self.wait_s + 2 * LAST_S))
            return self.store.get(key)
        except RuntimeError as error:
            host, port = self.env.get("MASTER_ADDR"), self.env.get("MASTER_PORT")
            raise UsageError(f"rank {self.rank} on {own_host(self.env)} does not hear from rank 0 at {host}:{port} any "
                             "more; its log says why") from error  # fmt: skip

    def _probe(self) -> Path:
        return Path(str(self.config.train.run_dir), self.probe)

    def _put_probe(self) -> str | None:
        """What hinders writing in the run folder."""
        try:
            self._probe().parent.mkdir(parents=True, exist_ok=True)
            self._probe().write_text("all ranks look for this\n")
        except OSError as error:
            return (f"train.run_dir: {self.config.train.run_dir} cannot be written to on {own_host(self.env)}: "
                    f"{error.strerror}")  # fmt: skip
        return None

    def _probe_fault(self, fault: str | None, look_s: float) -> str | None:
        """What hinders seeing it here."""
        deadline = time.monotonic() + look_s
        while fault is None and not self._probe().exists():
            if time.monotonic() > deadline:
                return (f"train.run_dir: {self.config.train.run_dir} on {own_host(self.env)} is not the folder that "
                        "rank 0 sees; expected one that all machines share")  # fmt: skip
            time.sleep(0.2)
        return None

    def _who_hangs(self, store: Store, what: str) -> str:
        def without(key: str) -> list[int]:
            return [r for r in range(self.world) if not store.check([f"{key} {what}/{r}"])]

        try:
            absent, inside = without("enters"), without("leaves")
            who = absent or inside
            hosts = sorted({json.loads(store.get(f"report/{r}"))["host"] for r in who})
        except RuntimeError:
            who, said = [], "and rank 0 is gone; its log says why"
        else:
            doing = "did not begin it" if absent else "began it, and it did not come back"
            said = f"{ranks_text(who)} on {', '.join(hosts)} {doing}"
        return (f"{what} is not there within {self.wait_s:.0f} s (train.meet_minutes): {said}; if they run, see "
                "docs/slurm.md, The fabric")  # fmt: skip


def own_report(config: Config, rank: int, env: Mapping[str, str]) -> dict[str, Any]:
    """What this rank is and sees, as JSON can hold it."""
    first = env.get("LOCAL_RANK", "0") == "0"  # what is the same for all of a machine is looked up once
    return {
        "host": own_host(env),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "cuda": torch.version.cuda,
        "code": code_version() if first else None,
        "library": hashlib.sha256(library.PATH.read_bytes()).hexdigest()[:12]
        if first and library.PATH.exists()
        else None,
        "faults": [*gpu_faults(env), *(data_faults(config) if first else ())],
    }


def own_host(env: Mapping[str, str]) -> str:
    """What the administrator calls this machine."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def gpu_faults(env: Mapping[str, str]) -> list[str]:
    """Of this process; one on each machine speaks."""
    if env.get("LOCAL_RANK", "0") != "0":
        return []
    processes, seen = int(env.get("LOCAL_WORLD_SIZE") or 1), torch.cuda.device_count()
    given = int(env.get("SLURM_GPUS_ON_NODE") or 0)
    if given and processes > given:
        return [f"{processes} processes, and SLURM gave {given} GPUs; expected one process a GPU: --ntasks-per-node, "
                "--gpus-per-node"]  # fmt: skip
    if given and env.get("DS_ACCELERATOR") != "cpu" and seen < processes:
        return [f"{processes} processes, and torch {torch.__version__} sees {seen} GPUs of the {given} that SLURM "
                "gave; expected all of the node's in each task (--gpus-per-node, not --gpus-per-task); to train on "
                "CPUs: DS_ACCELERATOR=cpu"]  # fmt: skip
    return []


def data_faults(config: Config) -> list[str]:
    sets = {"data.train": config.data.train, "data.val": config.data.val if config.eval.every else None}
    return [f"{key}: {folder} is not there" for key, folder in sets.items()
            if folder and not is_remote(folder) and not Path(folder).exists()]  # fmt: skip


def found_faults(reports: list[dict[str, Any]], seen: list[dict[str, Any]]) -> list[str]:
    """reports, seen: by rank. One line for each fault, with the hosts it was found on."""
    lines = []
    for what in SAME:
        hosts = defaultdict(set)
        for report in reports:
            if report[what] is not None:
                hosts[report[what]].add(report["host"])
        if len(hosts) > 1:
            found = "; ".join(f"{value} on {hosts_text(names)}" for value, names in hosts.items())
            lines.append(f"{what}: not the same everywhere: {found}")
    where = defaultdict(set)
    for report, one in zip(reports, seen, strict=True):
        for fault in [*report["faults"], *([one["fault"]] if one["fault"] else [])]:
            where[fault].add(report["host"])
    for fault, names in where.items():
        everywhere = names == {report["host"] for report in reports}
        lines.append(fault if everywhere or fault.startswith("train.run_dir") else f"{hosts_text(names)}: {fault}")
    skewed = {r["host"]: one["skew"] for r, one in zip(reports, seen, strict=True) if abs(one["skew"]) > SKEW_S}
    lines += [f"the clock of {host} is {skew:+.0f} s off that of {reports[0]['host']}; expected within {SKEW_S:.0f} s"
              for host, skew in skewed.items()]  # fmt: skip
    return lines


def hosts_text(names: set[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:6]) + (f" and {len(some) - 6} more" if len(some) > 6 else "")


def ranks_text(ranks: list[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"
