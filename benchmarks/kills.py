"""SIGKILL at random times and at every system call of a commit: does a run always go on, and to the same numbers?

    python -m benchmarks.kills [--kills 200] [--parts random commit] [--calls N] [--lanes L] [--seed S]
                               [--minutes M] [--record]

random: runs of framework.train on two ranks (gloo, a small detector, a drawn set), a checkpoint every second step, ZeRO
    stages 0 to 3 by turns. One rank, or all, are killed while the run starts, trains or saves; survivors have to leave
    by themselves; then the same command again in the same folder, until the run has reached its end.
commit: a run on one rank; strace kills it before the k-th system call of its second commit, for every k: mkdir, open
    for writing, write, fsync, rename, unlink, rmdir, of the thread that writes.

After each death: the newest committed folder is what its manifest says, and to the byte what a run that nobody killed
saved at that step; it is not older than the newest at the kill; the losses recorded are that run's, to the last bit.
The next start has to go on from it. Exit code 1 and the run folders when any of this fails.
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.forkserver import set_forkserver_preload
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.distributed import IMPORTED_BEFORE
from tests.runs import TINY

ROOT = Path(__file__).resolve().parent.parent
EVERY, STAGES, WORLD = 2, (0, 1, 2, 3), 2
STEPS, COMMIT_STEPS, KILLED_STEP = 24, 6, 4
MOST_LOST = 2 * EVERY  # the step is recorded before the run waits for the checkpoint before, which is still written
GRACE_S = 60.0  # so long the others may take to leave
START_GRACE_S = 15.0  # while they start: one that waits for a rank that never came waits for very long (patience)
WORKERS_S = 30.0  # how long data workers may outlive the rank that they work for
LONGEST_SAVE_S = 0.05  # a kill is aimed at so much of a commit
LIMIT_S = 300.0  # of a whole run that nobody kills
SETTINGS = ["model.num_queries=24", "train.global_batch=4", "train.epochs=100", "train.lr_drop_epochs=[2]",
            f"train.checkpoint_every={EVERY}", "eval.every=0"]  # fmt: skip
# Before each of these; of openat those that write. What a file system is asked for when something is committed.
CALLS = ("mkdir", "mkdirat", "openat", "creat", "write", "writev", "pwrite64", "copy_file_range", "sendfile",
         "ftruncate", "fallocate", "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat", "unlink",
         "unlinkat", "rmdir")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=200, help="of the part random")
    parser.add_argument("--calls", type=int, help="of the part commit, spread over the commit; all, if not given")
    parser.add_argument("--lanes", type=int, default=3, help="runs at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of the times and victims")
    parser.add_argument("--minutes", type=float, default=600.0, help="a part begins no more kills after so many")
    parser.add_argument("--record", action="store_true", help="in docs/results/")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    set_forkserver_preload([*IMPORTED_BEFORE, "framework.train"])
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    faults: list[str] = []
    results = {}
    draw(folder)
    for part in args.parts:
        result, found = PARTS[part](folder, args)
        faults += found
        results[part] = result
        print(part, json.dumps(result), flush=True)
        if args.record:
            from benchmarks.results import write

            options = f" --kills {args.kills} --seed {args.seed}" if part == "random" else ""
            options += f" --minutes {args.minutes:g}" if args.minutes != parser.get_default("minutes") else ""
            command = f"python -m benchmarks.kills --parts {part} --lanes {args.lanes}{options} --record"
            write("kills", "Kills", part, result, command)
    if faults:
        print(*faults, f"the run folders are in {folder}", sep="\n", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return 1 if faults else 0


# A run, and what it left.


def draw(folder: Path) -> None:
    """The data and the configuration of all runs."""
    process = context().Process(target=_draw, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "draw.txt").read_text()
    (folder / "kills.yaml").write_text(TINY)


def _draw(folder: Path) -> None:
    from data_tools import convert, synth

    _speak_into(folder / "draw.txt")
    assert synth.main(["--out", str(folder / "set"), "--images", "40", "--size", "64", "--classes", "3"]) == 0
    assert convert.main(["--images", str(folder / "set/images"), "--annotations", str(folder / "set/annotations"),
                         "--out", str(folder / "shards"), "--workers", "1"]) == 0  # fmt: skip


def context() -> Any:
    return multiprocessing.get_context("forkserver")


class Start:
    """One start of the command: as many processes as ranks, with what a launcher gives them.

    gate: the thread that writes the checkpoint of KILLED_STEP says there who it is, and waits until it may.
    """

    def __init__(self, run: Path, world: int, overrides: list[str], gate: Path | None = None) -> None:
        self.run, self.began = run, time.time()
        self.log = run / "log.txt"
        self.out = run.with_suffix(".out")
        self.before = {path: path.stat().st_size if path.exists() else 0 for path in (self.log, self.out)}
        run.mkdir(parents=True, exist_ok=True)
        data = run.parent / "shards/train"
        arguments = ["--config", str(run.parent / "kills.yaml"), f"train.run_dir={run}", f"data.train={data}",
                     *SETTINGS, *overrides]  # fmt: skip
        port = free_port()
        self.ranks: list[BaseProcess] = [
            context().Process(target=_rank, args=(arguments, rank, world, port, self.out, gate))
            for rank in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]

    def ended(self) -> bool:
        return None not in self.codes()

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within so many."""
        return until(self.ended, seconds)

    def kill(self, victims: list[int]) -> None:
        for victim in victims:
            self.ranks[victim].kill()

    def workers(self) -> list[tuple[int, str]]:
        """Its children, by pid and the time at which they began."""
        found = []
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                for children in Path(f"/proc/{rank.pid}/task").glob("*/children"):
                    found += [(int(pid), _began(int(pid))) for pid in children.read_text().split()]
        return [(pid, began) for pid, began in found if began]

    def resumed(self) -> str | None:
        """What this start says it goes on from; "" when from nothing; None when it does not say yet."""
        found = re.search(r"resuming from (\S+)\n|a fresh run in ", self.new_text(self.log))
        return found and Path(found[1] or "").name

    def first_step_s(self, step: int) -> float | None:
        """Seconds from its start to the first step after the one that it went on from."""
        new = [record["time"] for record in records(self.run) if record["step"] > step]
        return min(new) - self.began if new and min(new) > self.began else None

    def new_text(self, path: Path) -> str:
        """What this start has written there."""
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(self.before[path])
            return file.read().decode(errors="replace")

    def said(self) -> str:
        return self.new_text(self.out)[-3000:]


def _rank(arguments: list[str], rank: int, world: int, port: int, said: Path, gate: Path | None) -> None:
    """python -m framework.train, in a process that has imported what takes long."""
    _speak_into(said)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_WORLD_SIZE=str(len(os.sched_getaffinity(0))),
    )  # one thread each
    try:
        from framework.errors import command
        from framework.train import main

        if gate is not None:
            _wait_at(gate)
        command(partial(main, arguments))
    except BaseException:  # Python would end so
        traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(1)


def _speak_into(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _wait_at(gate: Path) -> None:
    from framework.engine.checkpoint import Checkpoints

    write, open_gate = Checkpoints._write, gate.with_suffix(".open")

    def after_the_gate(self: Checkpoints, state: dict[str, Any], *rest: Any) -> None:
        if state["step"] == KILLED_STEP:
            unfinished = gate.with_suffix(".tmp")
            unfinished.write_text(str(threading.get_native_id()))
            unfinished.rename(gate)
            while not open_gate.exists():
                time.sleep(0.005)
        write(self, state, *rest)

    Checkpoints._write = after_the_gate  # type: ignore


def free_port() -> int:
    """Below those that the system gives to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(12000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def until(true: Callable[[], Any], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def _began(pid: int) -> str:
    """The start of a process, in the system's ticks; "" when it is not there, or dead and not buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def committed(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def newest(run: Path) -> Path | None:
    return next(reversed(committed(run)), None)


def step_of(folder: Path | None) -> int:
    return int(folder.name[5:]) if folder else 0


def is_saving(run: Path, since: float = 0.0) -> bool:
    """Whether a folder is there that was begun since (time.time()) and is not committed."""
    for folder in (run / "checkpoints").glob("*.tmp"):
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime > since:
                return True
    return False


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name.startswith(("loss/", "grad_norm", "lr/", "epoch"))}


def digests(folder: Path) -> dict[str, str]:
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest()
            for file in ("weights.safetensors", "optimizer.safetensors")}  # fmt: skip


@dataclass
class Whole:
    """What a run that nobody killed recorded and saved, by step; seconds to its first step, and between steps."""

    numbers: dict[int, dict[str, Any]]
    digests: dict[int, dict[str, str]]
    start_s: float
    step_s: float


def whole_run(folder: Path, name: str, world: int, overrides: list[str], steps: int) -> Whole:
    start = Start(folder / name, world, [*overrides, f"train.max_steps={steps}", "train.keep_checkpoints=1000"])
    if not start.wait(LIMIT_S) or any(start.codes()):
        start.kill(list(range(world)))
        raise SystemExit(f"the run that nobody kills failed: {start.codes()}\n{start.said()}")
    found = records(start.run)
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    times = [record["time"] for record in found]
    return Whole(
        {record["step"]: numbers(record) for record in found},
        {step_of(one): digests(one) for one in committed(start.run)},
        times[0] - start.began, (times[-1] - times[0]) / (steps - 1),
    )  # fmt: skip


class Wholes:
    """The whole run of each ZeRO stage, once a lane needs it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, dict[int, Whole]()
        self.locks = {stage: threading.Lock() for stage in STAGES}

    def of(self, stage: int) -> Whole:
        with self.locks[stage]:
            if stage not in self.found:
                overrides = [f"engine.zero_stage={stage}"]
                self.found[stage] = whole_run(self.folder, f"whole-stage{stage}", WORLD, overrides, STEPS)
            return self.found[stage]


def faults_of(run: Path, whole: Whole, at_the_kill: Path | None) -> tuple[list[str], Path | None, int]:
    """What is wrong with a run folder whose processes are dead; its newest checkpoint; steps since."""
    faults, last = [], newest(run)
    if step_of(last) < step_of(at_the_kill):
        faults.append(f"{at_the_kill} was committed, and now the newest is {last}")
    if last:
        faults += broken(last)
        if not faults and digests(last) != whole.digests.get(step_of(last)):
            faults.append(f"{last} is not what the whole run saved at that step")
    found = records(run)
    if [record["step"] for record in found] != list(range(1, len(found) + 1)):
        faults.append(f"{run}/metrics.jsonl has the steps {[record['step'] for record in found]}")
    for record in found:
        if numbers(record) != whole.numbers.get(record["step"]):
            faults.append(f"{run}: the numbers of step {record['step']} are not those of the whole run")
    lost = len(found) - step_of(last)
    if not 0 <= lost <= MOST_LOST:
        faults.append(f"{run}: {len(found)} steps were recorded, the newest checkpoint is {last}")
    return faults, last, lost


def broken(folder: Path) -> list[str]:
    """What a committed folder has that its manifest does not say. Written without the engine's own reader."""
    try:
        files = json.loads((folder / "MANIFEST.json").read_bytes())["files"]
        assert len(files) == 3
        for name, said in files.items():
            data = (folder / name).read_bytes()
            if len(data) != said["bytes"] or hashlib.sha256(data).hexdigest() != said["sha256"]:
                return [f"{folder} was committed, and {name} is not what its manifest says"]
    except (OSError, ValueError, KeyError, AssertionError) as error:
        return [f"{folder} was committed, and is broken: {error!r}"]
    return []


# Random kills.


@dataclass
class Tally:
    """What the lanes see, together."""

    wanted: int
    ends: float  # time.monotonic() after which no kill begins
    lock: threading.Lock = field(default_factory=threading.Lock)
    begun: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)  # one a kill
    resumes: int = 0
    fresh: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    broken_off: int = 0  # starts that had ended before they were to be killed

    def another(self) -> bool:
        """Whether one more kill is to begin; counts it."""
        with self.lock:
            if self.begun >= self.wanted or time.monotonic() > self.ends:
                return False
            self.begun += 1
            return True


class Lane:
    """Runs one after the other, each killed and started again until it has reached its end."""

    def __init__(self, number: int, folder: Path, seed: int, wholes: Wholes, tally: Tally) -> None:
        self.number, self.folder, self.wholes, self.tally = number, folder, wholes, tally
        self.random = random.Random(f"{seed}/{number}")
        self.orphans: list[tuple[int, str, float, Path]] = []

    def work(self) -> None:
        runs = 0
        try:
            while self.tally.begun < self.tally.wanted and time.monotonic() < self.tally.ends:
                stage = STAGES[(self.number + runs) % len(STAGES)]
                self.one_run(self.folder / f"lane{self.number}-run{runs}", stage)
                runs += 1
            time.sleep(WORKERS_S if self.orphans else 0)
            self.look_for_orphans()
        except BaseException:
            self.tally.faults.append(f"lane {self.number}: {traceback.format_exc()}")
            raise

    def one_run(self, run: Path, stage: int) -> None:
        """Until its end, killed on the way as long as kills are wanted."""
        whole, expected = self.wholes.of(stage), None
        overrides = [f"engine.zero_stage={stage}", f"train.max_steps={STEPS}"]
        for number in range(1, 1000):
            where = f"{run.name}, start {number}"
            start = Start(run, WORLD, overrides)
            killed = self.tally.another() and self.kill_some(start, whole, stage, where)
            if not killed:
                ended = start.wait(LIMIT_S)
                start.kill(list(range(WORLD)))
                start.wait(10)
                if not ended or any(start.codes()):
                    self.fault(where, f"nobody killed it, and it left with {start.codes()}\n{start.said()}")
                    return
            resumed = start.resumed()
            if resumed is not None and resumed != (expected.name if expected else ""):
                self.fault(where, f"went on from {resumed or 'nothing'}, not from {expected}")
            faults, last, lost = faults_of(run, whole, expected)
            for fault in faults:
                self.fault(where, fault)
            with self.tally.lock:
                if resumed is not None:
                    self.tally.resumes += bool(resumed)
                    self.tally.fresh += not resumed
                if (seconds := start.first_step_s(step_of(expected))) is not None:
                    self.tally.start_s.append(seconds)
                if killed:  # of a start that had not got so far, it was lost before
                    killed["lost"] = lost if resumed is not None else None
            if faults:
                return
            if not killed:
                if step_of(last) != STEPS or lost or is_saving(run):
                    self.fault(where, f"left with 0, its newest checkpoint is {last}, or a .tmp is left")
                with self.tally.lock:
                    self.tally.finished += 1
                return
            expected = last
            self.look_for_orphans()

    def kill_some(self, start: Start, whole: Whole, stage: int, where: str) -> dict[str, Any] | None:
        """Kill one rank or all at a random time, and wait for the others; None when the run had ended before."""
        aim = self.random.choices(["start", "training", "saving"], [35, 35, 30])[0]
        part = self.random.random()
        victims = [self.random.randrange(WORLD)] if self.random.random() < 0.5 else list(range(WORLD))
        self.await_moment(start, aim, part, whole)
        known, children = newest(start.run), start.workers()
        saving = is_saving(start.run, start.began)
        place = "start" if start.resumed() is None else "saving" if saving else "training"
        begun = time.time() - start.began
        if start.ended():
            with self.tally.lock:
                self.tally.begun -= 1
                self.tally.broken_off += 1
            return None
        start.kill(victims)
        killed_at = time.monotonic()
        deadline = killed_at + WORKERS_S
        self.orphans += [(pid, began, deadline, start.run) for pid, began in children]
        left_alone = start.wait(START_GRACE_S if place == "start" else GRACE_S)
        took = time.monotonic() - killed_at
        start.kill(list(range(WORLD)))
        start.wait(10)
        codes = start.codes()
        survivors = [code for rank, code in enumerate(codes) if rank not in victims]
        if all(codes[victim] != -signal.SIGKILL for victim in victims):  # it was faster
            with self.tally.lock:
                self.tally.begun -= 1
                self.tally.broken_off += 1
            if any(codes):
                self.fault(where, f"left with {codes} before it was killed\n{start.said()}")
            return None
        if not left_alone and place != "start":
            self.fault(where, f"rank {victims} was killed while {place}; the other was there {GRACE_S} s later")
        now = newest(start.run)
        if 0 in survivors and step_of(now) != STEPS:
            self.fault(where, f"rank {victims} was killed while {place}; the others left with {survivors}")
        if step_of(now) < step_of(known):
            self.fault(where, f"{known} was committed before the kill, and after it the newest is {now}")
        told = start.new_text(start.out).strip()
        row = {
            "place": place, "victims": "all" if len(victims) == WORLD else f"rank {victims[0]}", "stage": stage,
            "at": begun, "survivor_s": took if survivors and left_alone else None,
            "survivor": (survivors[0] if left_alone else "none") if survivors else None,
            "newest": step_of(now), "traceback": told.splitlines()[-1] if "Traceback" in told else None,
        }  # fmt: skip
        with self.tally.lock:
            self.tally.rows.append(row)
            count = len(self.tally.rows)
        print(f"kill {count}: {where}, stage {stage}, {row['victims']} after {begun:.2f} s, {place}, newest "
              f"{row['newest']}" + (f"; other: {survivors[0]} after {took:.1f} s" if survivors else ""),
              flush=True)  # fmt: skip
        return row

    def await_moment(self, start: Start, aim: str, part: float, whole: Whole) -> None:
        """aim: what the run should be doing then. part: 0 to 1, how far on with it."""
        with self.tally.lock:
            typical = statistics.median([*self.tally.start_s[-20:], whole.start_s])
        if aim == "start":
            until(start.ended, part * typical)
            return
        until(lambda: start.ended() or start.resumed() is not None, LIMIT_S)
        if aim == "training":
            until(start.ended, part * 8 * whole.step_s)
            return
        skipped, part = divmod(3 * part, 1)  # commits
        first = step_of(newest(start.run)) + EVERY * skipped
        until(lambda: start.ended() or step_of(newest(start.run)) >= first, LIMIT_S)
        until(lambda: start.ended() or is_saving(start.run, start.began), LIMIT_S)
        until(start.ended, part * LONGEST_SAVE_S)

    def look_for_orphans(self) -> None:
        now = time.monotonic()
        for pid, began, deadline, run in self.orphans:
            if deadline < now and _began(pid) == began:
                self.fault(run.name, f"process {pid}, a child of a killed rank, is there {WORKERS_S} s later")
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self.orphans = [one for one in self.orphans if one[2] >= now and _began(one[0]) == one[1]]

    def fault(self, where: str, what: str) -> None:
        print(f"FAULT {where}: {what}", flush=True)
        with self.tally.lock:
            self.tally.faults.append(f"{where}: {what}")


def random_kills(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    wholes = Wholes(folder)
    tally = Tally(args.kills, time.monotonic() + 60 * args.minutes)
    lanes = [Lane(n, folder, args.seed, wholes, tally) for n in range(args.lanes)]
    threads = [threading.Thread(target=lane.work) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return summary(tally, args), tally.faults


def summary(tally: Tally, args: argparse.Namespace) -> dict[str, Any]:
    rows = tally.rows
    alone = [row for row in rows if row["victims"] != "all"]
    lost = [row["lost"] for row in rows if row.get("lost") is not None]
    waits = [row["survivor_s"] for row in alone if row["survivor_s"] is not None]

    def count(place: str, victims: str) -> int:
        return sum(row["place"] == place and row["victims"] == victims for row in rows)

    kinds = ["rank 0", "rank 1", "all"]
    return {
        "kills by place": [
            {"killed": kind} | {place: count(place, kind) for place in PLACES}
            | {"together": sum(row["victims"] == kind for row in rows)} for kind in kinds
        ],
        "kills": len(rows), "kills wanted": args.kills, "seed": args.seed,
        "kills by ZeRO stage": {f"stage {s}": sum(row["stage"] == s for row in rows) for s in STAGES},
        "runs finished": tally.finished, "starts that had finished before their kill": tally.broken_off,
        "starts that resumed": tally.resumes, "starts without a checkpoint yet": tally.fresh,
        "faults": len(tally.faults), "steps between checkpoints": EVERY,
        "steps lost at most": max(lost, default=0), "steps lost, mean": statistics.fmean(lost or [0]),
        "s from start to first new step": _quantiles(tally.start_s),
        "s until the survivor of one left": _quantiles(waits),
        f"survivors still waiting after {START_GRACE_S:g} s for a rank that died while it started":
            sum(row["survivor"] == "none" for row in alone),
        "tracebacks that survivors showed": "; ".join(row["traceback"] for row in alone if row["traceback"]) or "none",
        "exit codes of survivors": dict(sorted(Counter(str(row["survivor"]) for row in alone).items())),
    }  # fmt: skip


def _quantiles(values: list[float]) -> str:
    if not values:
        return "none"
    return f"median {statistics.median(values):.1f}, at most {max(values):.1f}"


PLACES = ("start", "training", "saving")


# A kill at each call of a commit.


@dataclass(frozen=True)
class Call:
    """name: of the system call. nth: which one of that name of the thread. target: what it is about, in short."""

    name: str
    nth: int
    target: str


def commit_kills(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if shutil.which("strace") is None:
        raise SystemExit("strace is not here, and nothing else kills at a call; Debian: apt-get install strace")
    whole = whole_run(folder, "whole-alone", 1, [], COMMIT_STEPS)
    trace, _ = at_the_gate(folder / "watched", None)
    calls = list(calls_of(trace))
    commit_of(calls)
    chosen = calls
    if args.calls and args.calls < len(calls):
        places = [round(n * (len(calls) - 1) / max(1, args.calls - 1)) for n in range(args.calls)]
        chosen = [calls[place] for place in places]
    ends, rows, faults = time.monotonic() + 60 * args.minutes, [], []
    with ThreadPoolExecutor(args.lanes) as pool:
        seen = pool.map(partial(one_call, folder, whole, calls, ends), chosen)
        for call, (row, found) in zip(chosen, seen, strict=True):
            faults += [f"before {call}: {fault}" for fault in found]
            rows += [row] if row else []
            print(f"call {len(rows)} of {len(chosen)}: {row}", *found, flush=True)
    kinds = Counter(row["call"] for row in rows)
    return {
        "the calls, killed before each": rows, "calls of the commit": len(calls), "kills": len(rows),
        "by call": dict(kinds), "went on from the older one": sum(row["went on from"] == EVERY for row in rows),
        "from the newer one": sum(row["went on from"] == KILLED_STEP for row in rows), "faults": len(faults),
    }, faults  # fmt: skip


def one_call(folder: Path, whole: Whole, calls: list[Call], ends: float, call: Call) -> tuple[Any, list[str]]:
    """A run that is killed before the call, and goes on."""
    if time.monotonic() > ends:
        return None, []
    run = folder / f"call-{calls.index(call):03d}"
    trace, before = at_the_gate(run, call)
    seen = list(calls_of(trace))
    if not seen or (seen[-1].name, seen[-1].nth) != (call.name, call.nth) or "killed by SIGKILL" not in trace:
        return None, [f"the run was not killed there; its calls: {trace}"]
    faults, last, lost = faults_of(run, whole, before)
    if step_of(last) != (KILLED_STEP if calls.index(commit_of(calls)) < calls.index(call) else EVERY):
        faults.append(f"the newest checkpoint is {last}")
    start = Start(run, 1, COMMIT_OVERRIDES)
    if not start.wait(LIMIT_S) or any(start.codes()):
        start.kill([0])
        faults.append(f"the next start left with {start.codes()}\n{start.said()}")
    if start.resumed() != (last.name if last else ""):
        faults.append(f"the next start went on from {start.resumed()}, not from {last}")
    more, end, left = faults_of(run, whole, last)
    faults += more
    if step_of(end) != COMMIT_STEPS or left or is_saving(run):
        faults.append(f"the next start ended with {end}")
    return {"call": call.name, "nth of its name": call.nth, "on": call.target, "went on from": step_of(last),
            "steps lost": lost}, faults  # fmt: skip


def at_the_gate(run: Path, call: Call | None) -> tuple[str, Path | None]:
    """A fresh run whose second commit strace watches and, before the call, ends: what strace wrote; the newest
    checkpoint before the commit."""
    gate, trace = run.with_suffix(".gate"), run.with_suffix(".trace")
    start = Start(run, 1, COMMIT_OVERRIDES, gate)
    tracer = None
    try:
        if not until(lambda: gate.exists() or start.ended(), LIMIT_S) or start.ended():
            raise RuntimeError(f"the run did not come to its second commit: {start.codes()}\n{start.said()}")
        before = newest(run)
        command = ["strace", "-y", "-s", "0", "-p", gate.read_text(), "-o", str(trace),
                   "-e", "trace=" + ",".join(f"?{name}" for name in CALLS)]  # fmt: skip
        if call is not None:
            command += ["-e", f"inject={call.name}:signal=SIGKILL:when={call.nth}"]
        told = run.with_suffix(".strace")
        with told.open("w") as file:
            tracer = subprocess.Popen(command, stderr=file)
        if not until(lambda: "attached" in told.read_text() or tracer.poll() is not None, 30) or tracer.poll():
            raise RuntimeError(f"strace does not watch the run: {told.read_text()}")
        time.sleep(0.05)  # it has said so before it stops the thread for the first time
        gate.with_suffix(".open").touch()
        if not start.wait(LIMIT_S):
            raise RuntimeError("a run that strace watches does not end")
        tracer.wait(30)
        return trace.read_text(), before
    finally:
        start.kill([0])
        if tracer is not None and tracer.poll() is None:
            tracer.kill()


def calls_of(trace: str) -> Iterator[Call]:
    """Those that change something under checkpoints/."""
    counts: Counter[str] = Counter()
    for line in trace.splitlines():
        found = re.match(r"(\w+)\((.*)", line)
        if not found:
            continue
        name, rest = found[1], found[2]
        counts[name] += 1
        if "/checkpoints" not in rest or (name == "openat" and not re.search("O_WRONLY|O_RDWR|O_CREAT", rest)):
            continue
        paths = [path.partition("checkpoints")[2].strip("/") or "checkpoints"
                 for path in re.findall(r'[<"]([^<>"]*/checkpoints[^<>"]*)', rest.partition(") = ")[0])]  # fmt: skip
        paths = [re.sub(r"/\.tmp\w+", "/.tmp", path) for path in paths]  # safetensors, before it renames
        paths = [re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", path) for path in paths]  # the writer
        names = re.findall(r'>, "([^"/]+)"', rest)
        yield Call(name, counts[name], " -> ".join(paths) + "".join(f"/{one}" for one in names))


def commit_of(calls: list[Call]) -> Call:
    """The one after which the checkpoint is there."""
    name = f"step-{KILLED_STEP:08d}"
    (found,) = (call for call in calls if call.name.startswith("rename") and call.target == f"{name}.tmp -> {name}")
    return found


COMMIT_OVERRIDES = [f"train.max_steps={COMMIT_STEPS}", "train.keep_checkpoints=1"]
PARTS = {"random": random_kills, "commit": commit_kills}


if __name__ == "__main__":
    sys.exit(main())
