"""Jobs of launch/coco_64gpu.sh on a real SLURM of one machine: disturbed by each fault of a cluster, and on 64 ranks.

    python -m benchmarks.slurm [--parts faults start all] [--only T1 T3 ...]

faults: three nodes of two dummy GPUs (launch/local_cluster); four ranks, gloo, a small detector on drawn images; all
    else is the code that trains on 64 GPUs. After each fault: does the job go on by itself; is the loss of every step
    that of the undisturbed run; was every image of an epoch trained on once, less the declared tail; did only one
    write?
start: from sbatch to the first step with 1, 8, 16, 32 ranks on 8 x 8 dummy GPUs, and where the time goes.
all: the same with 64 ranks, which train 20 steps and evaluate, are put back into the queue once, and end; needs 24 GiB.
Writes docs/results/slurm.{json,md}. As root, with SLURM and munge installed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from framework.engine.incarnation import FILE as INCARNATIONS
from framework.tracking.sink import read_lines
from launch.local_cluster.__main__ import daemons
from tests.runs import TINY

IMAGES, BATCH, EPOCHS = 50, 8, 4
STEPS_PER_EPOCH = IMAGES // BATCH  # and a tail of 2 images
STEPS = EPOCHS * STEPS_PER_EPOCH
FAULT_STEP = 9
BAND = 1e-4  # of losses in another world; docs/engine.md
WAIT_S = 240.0
SETTINGS = [
    "model.queries=learned", "model.refine_boxes=false", "model.num_queries=40", "data.sizes=[96]", "data.max_size=128",
    f"train.global_batch={BATCH}", "train.micro_batch=2", f"train.epochs={EPOCHS}", "train.lr_drop_epochs=[3]",
    "train.checkpoint_every=4", "train.hang_minutes=0.5", f"eval.every={EPOCHS}", "eval.batch=2",
    "model.backbone.weights=null", "tracking.pictures=0",
]  # fmt: skip


class Cluster:
    """Up inside `with`."""

    def __init__(self, folder: Path, nodes: int, gpus: int) -> None:
        self.folder, self.size = folder, ["--nodes", str(nodes), "--gpus", str(gpus)]
        self.env = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "MASTER_ADDR": "127.0.0.1",
                    "DS_ACCELERATOR": "cpu"}  # fmt: skip

    def __enter__(self) -> "Cluster":
        self.command("up", *self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self.command("down")

    def wait_until_idle(self, nodes: int) -> None:
        deadline, found = time.monotonic() + WAIT_S, ""
        while (found := self.run("sinfo", "-h", "-p", "main", "-o", "%D %T")) != f"{nodes} idle":
            if time.monotonic() > deadline:
                raise RuntimeError(f"after {WAIT_S:.0f} s the nodes are not idle: {found}")
            time.sleep(0.5)

    def command(self, *words: str) -> str:
        command = [sys.executable, "-m", "launch.local_cluster", *words, "--dir", str(self.folder)]
        return self.run(*command, cwd=results.ROOT)

    def run(self, *command: str, check: bool = True, **rest: Any) -> str:
        done = subprocess.run(command, env=self.env | rest.pop("env", {}), capture_output=True, text=True, **rest)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout.strip()


@dataclasses.dataclass
class Job:
    """One that was submitted, its run folder, and what its ranks wrote down."""

    cluster: Cluster
    id: str
    run_dir: Path
    trace: Path
    console: Path

    def shown(self) -> dict[str, str]:
        """SLURM's record of it."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.cluster.run("scontrol", "show", "job", self.id)))

    def state(self) -> str:
        return self.shown()["JobState"]

    def restarts(self) -> int:
        return int(self.shown()["Restarts"])

    def steps(self) -> Iterator[tuple[int, int, int, list[int]]]:
        """Restart, rank, step, image ids."""
        for path in self.trace.glob("*.jsonl"):
            restart, rank = map(int, path.stem.split("-"))
            for line in read_lines(path):
                if "step" in line:
                    yield restart, rank, line["step"], line["ids"]

    def wait_for(self, what: str, happened: Callable[[], object], patience_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + patience_s
        while not happened():
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {self.id}: no {what} within {patience_s:.0f} s\n{self.console.read_text()}")
            time.sleep(0.1)

    def wait_for_step(self, step: int, restart: int = 0) -> None:
        self.wait_for(f"step {step}", lambda: any(s >= step and r == restart for r, _, s, _ in self.steps()))

    def wait_for_state(self, *states: str, patience_s: float = WAIT_S) -> None:
        self.wait_for(f"state {states}", lambda: self.state() in states, patience_s)

    def wait_for_requeue(self, restart: int = 1, patience_s: float = WAIT_S) -> None:
        self.wait_for("requeue", lambda: self.restarts() >= restart, patience_s)

    def rank_pids(self, restart: int = 0) -> dict[int, int]:
        """Process ids of the ranks by their number."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = dict(
                    v.split("=", 1) for v in process.joinpath("environ").read_text().split("\0") if "=" in v
                )
                parent = int(re.findall(r"PPid:\s(\d+)", process.joinpath("status").read_text())[0])
                if (variables.get("SLURM_JOB_ID") == self.id and variables.get("TENFOLD_TRACE") == str(self.trace)
                        and int(variables.get("SLURM_RESTART_COUNT") or 0) == restart and "SLURM_STEP_ID" in variables
                        and "slurmstepd" in Path(f"/proc/{parent}/comm").read_text()
                        and b"train.py" in process.joinpath("cmdline").read_bytes()):  # fmt: skip
                    found[int(variables["SLURM_PROCID"])] = int(process.name)
        return found

    def kill_rank(self, rank: int, restart: int = 0) -> None:
        os.kill(self.rank_pids(restart)[rank], signal.SIGKILL)

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss/total"] for line in read_lines(self.run_dir / "metrics.jsonl")
                if "loss/total" in line}  # fmt: skip

    def said(self, words: str) -> bool:
        logs = self.console.parent.glob(f"runs/jobs/{self.id}/logs/*/rank-*.log")
        return any(words in path.read_text() for path in (self.console, *logs))


class Lab:
    """Where jobs are submitted from: a copy of the repository, data, and a run folder for each job."""

    def __init__(self, folder: Path, cluster: Cluster, images: int = IMAGES) -> None:
        self.folder, self.cluster, self.count = folder, cluster, 0
        for name in ("framework", "ops", "data_tools", "launch", "configs"):
            (folder / name).symlink_to(results.ROOT / name)
        (folder / "small.yaml").write_text(TINY)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{results.ROOT}" exec {sys.executable} '
                          f'{results.ROOT}/benchmarks/slurm_rank.py "$@"\n')  # fmt: skip
        python.chmod(0o755)
        for command in (
            ["data_tools.synth", "--out", "drawn", "--images", str(images), "--val", "8", "--size", "64"],
            ["data_tools.convert", "--images", "drawn/images", "--annotations", "drawn/annotations", "--reencode",
             "--out", "shards"],
        ):  # fmt: skip
            cluster.run(sys.executable, "-m", *command, cwd=folder)

    def submit(
        self, *settings: str, nodes: int = 2, tasks: int = 2, options: tuple[str, ...] = (), pace_s: float = 0.25,
        save_pace_s: float = 0.0, run_dir: Path | None = None,
    ) -> Job:  # fmt: skip
        self.count += 1
        run_dir, trace = run_dir or self.folder / f"run{self.count}", self.folder / f"trace{self.count}"
        trace.mkdir()
        console = self.folder / f"console{self.count}.txt"
        console.touch()
        job = self.cluster.run(
            "sbatch", "--parsable", "--output", str(console), f"--nodes={nodes}", f"--ntasks-per-node={tasks}",
            f"--gpus-per-node={tasks}", "--cpus-per-task=1", *options, "launch/coco_64gpu.sh", "--config", "small.yaml",
            *SETTINGS, "data.train=shards/train", "data.val=shards/val", f"train.run_dir={run_dir}", *settings,
            cwd=self.folder,
            env={"TENFOLD_PYTHON": f"{self.folder}/python", "TENFOLD_TRACE": str(trace), "TENFOLD_PACE": str(pace_s),
                 "TENFOLD_SAVE_PACE": str(save_pace_s)},
        )  # fmt: skip
        return Job(self.cluster, job, run_dir, trace, console)


def verify(job: Job, undisturbed: Job, restarts: int, band: float = 0.0) -> dict[str, Any]:
    """After the job has ended well. `faults`: what is not as it has to be."""
    shown, faults = job.shown(), []
    if shown["JobState"] != "COMPLETED" or shown["ExitCode"] != "0:0":
        faults.append(f"state {shown['JobState']}, exit code {shown['ExitCode']}")
    if int(shown["Restarts"]) != restarts:
        faults.append(f"{shown['Restarts']} restarts, expected {restarts}")
    losses, expected = job.losses(), undisturbed.losses()
    if sorted(losses) != list(range(1, STEPS + 1)):
        faults.append(f"steps recorded: {sorted(losses)}")
    worst = max(abs(losses[s] / expected[s] - 1) for s in losses) if losses else float("inf")
    if worst > band:
        faults.append(f"losses are {worst:.2g} off")
    faults += image_faults(job)
    faults += writer_faults(job)
    return {"restarts": int(shown["Restarts"]), "state": shown["JobState"],
            "losses": "bit-equal" if worst == 0 else f"within {worst:.1e}",
            "images": "each once" if not image_faults(job) else "not", "faults": faults}  # fmt: skip


def image_faults(job: Job) -> list[str]:
    """Of the attempt at each step that counts, the last."""
    last: dict[int, int] = {}
    for restart, _, step, _ in job.steps():
        last[step] = max(last.get(step, 0), restart)
    seen: dict[int, list[int]] = defaultdict(list)
    for restart, _, step, ids in job.steps():
        if last[step] == restart:
            seen[(step - 1) // STEPS_PER_EPOCH] += ids
    expected = STEPS_PER_EPOCH * BATCH
    return [f"epoch {epoch + 1}: {len(ids)} images, {len(set(ids))} different ones, expected {expected}"
            for epoch, ids in sorted(seen.items()) if not len(ids) == len(set(ids)) == expected]  # fmt: skip


def writer_faults(job: Job) -> list[str]:
    """A checkpoint of one start that became one after the next start had begun."""
    began = {}
    for line in read_lines(job.run_dir / INCARNATIONS):
        began[line["restart"]] = line["time"]
    faults = []
    for path in job.trace.glob("*-0.jsonl"):
        restart = int(path.stem.split("-")[0])
        later = min((_seconds(t) for r, t in began.items() if r > restart), default=float("inf"))
        faults += [f"start {restart + 1} saved step {line['saved']} after start {restart + 2} had begun"
                   for line in read_lines(path) if line.get("time", 0) > later + 1]  # fmt: skip
    return faults


def _seconds(text: str) -> float:
    import datetime

    return datetime.datetime.fromisoformat(text).timestamp()


def expect(job: Job, words: str) -> None:
    if not job.said(words):
        raise RuntimeError(f"nobody said {words!r}:\n{job.console.read_text()}")


# Each returns the job, its expected restarts, and the band of its losses.
Outcome = tuple[Job, int, float]


def warned(lab: Lab) -> Job:
    """A job that has got USR2 and is back in the queue."""
    job = lab.submit()
    job.wait_for_step(FAULT_STEP)
    lab.cluster.run("scancel", "--batch", "--signal=USR2", job.id)
    job.wait_for_requeue()
    return job


def t1_warned(lab: Lab) -> Outcome:
    """USR2 before the time limit, as --signal=B:USR2@300 sends it"""
    job = warned(lab)
    expect(job, "stopped by SIGUSR2")
    return job, 1, 0.0


def t2_preempted(lab: Lab) -> Outcome:
    """preempted by a partition of higher priority, with 30 s of grace (CONT and TERM)"""
    job = lab.submit()
    job.wait_for_step(FAULT_STEP)
    lab.cluster.run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive",
                             "--output=/dev/null", "--wrap=sleep 1")  # fmt: skip
    job.wait_for_requeue()
    expect(job, "which is saved")
    return job, 1, 0.0


def t3_killed_in_a_step(lab: Lab) -> Outcome:
    """SIGKILL of one rank, inside a step"""
    job = lab.submit()
    job.wait_for_step(FAULT_STEP)
    job.kill_rank(3)
    job.wait_for_requeue()
    return job, 1, 0.0


def t3_killed_in_a_save(lab: Lab) -> Outcome:
    """SIGKILL of the main rank, inside a save"""
    job = lab.submit(save_pace_s=0.6)
    job.wait_for("second save", lambda: any("step-00000008" in p.name and p.name.endswith(".tmp")
                                            for p in job.run_dir.glob("checkpoints/*")))  # fmt: skip
    job.kill_rank(0)
    job.wait_for_requeue()
    if (job.run_dir / "checkpoints/step-00000008").exists():
        raise RuntimeError("the save was over when its rank was killed")
    return job, 1, 0.0


def t4_lost_daemon(lab: Lab) -> Outcome:
    """kill -9 of the slurmd of the main rank: SLURM starts the job elsewhere, its ranks live on"""
    job = lab.submit(nodes=1, pace_s=8.0)  # all ranks on that node, so that nothing but the fence ends them
    job.wait_for_step(5)
    node = job.shown()["NodeList"]
    left = job.rank_pids()
    os.kill(daemons(lab.cluster.folder)[f"slurmd-{node}"], signal.SIGKILL)
    job.wait_for_requeue()
    job.wait_for("end of the ranks that were left", lambda: not set(job.rank_pids(0)) & set(left))
    expect(job, "another start of this run has taken over")
    lab.cluster.run("slurmd", "-N", node, "-f", f"{lab.cluster.folder}/slurm.conf",
                    env={"PATH": f"{os.environ['PATH']}:/usr/sbin"})  # fmt: skip
    return job, 1, BAND


def t5_node_down(lab: Lab) -> Outcome:
    """a node set down by the administrator"""
    job = lab.submit()
    job.wait_for_step(FAULT_STEP)
    lab.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=maintenance")
    job.wait_for_requeue()
    job.wait_for_step(FAULT_STEP + 2, restart=1)
    if "n2" in (nodes := job.shown()["NodeList"]):
        raise RuntimeError(f"it is on {nodes} again")
    lab.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)  # it may be back by itself
    return job, 1, 0.0


def t6_half_the_nodes(lab: Lab) -> Outcome:
    """requeued onto half the nodes: twice the accumulation"""
    job = warned(lab)
    lab.cluster.run("scontrol", "update", f"JobId={job.id}", "NumNodes=1-1", "NumTasks=2", "NumCPUs=2")
    job.wait_for_step(FAULT_STEP + 2, restart=1)
    expect(job, "2 ranks x 2 images x 2 accumulated")
    return job, 1, BAND


def t7_stopped_rank(lab: Lab) -> Outcome:
    """SIGSTOP of a rank: the others' watchdogs end the job with 86"""
    job = lab.submit("train.hang_minutes=0.2")
    job.wait_for_step(FAULT_STEP)
    os.kill(job.rank_pids()[1], signal.SIGSTOP)
    job.wait_for_requeue()
    if not list(job.run_dir.glob("hung-rank*.txt")):
        raise RuntimeError("no rank wrote where it stands")
    return job, 1, 0.0


def t8_damaged_checkpoint(lab: Lab) -> Outcome:
    """a flipped byte in the newest checkpoint, between two starts"""
    job = warned(lab)
    damaged = damage_newest(job)
    job.wait_for_step(FAULT_STEP + 2, restart=1)
    expect(job, f"{damaged} is not used")
    return job, 1, 0.0


def damage_newest(job: Job) -> Path:
    """A bit of the newest checkpoint; returns it."""
    newest = max(job.run_dir.glob("checkpoints/step-????????"))
    with open(newest / "weights.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    return newest


def t9_full_disk(lab: Lab) -> Outcome:
    """disk full at a save: the job fails with 1; room is made, and it is put back by hand"""
    disk = lab.folder / "small-disk"
    disk.mkdir()
    lab.cluster.run("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk))
    try:
        job = lab.submit(run_dir=disk / "run")
        job.wait_for_step(FAULT_STEP)
        free = shutil.disk_usage(disk).free
        (disk / "others").write_bytes(b"x" * (free - 64 * 1024))
        job.wait_for_state("FAILED")
        expect(job, "No space left on device")
        if (code := job.shown()["ExitCode"]) != "1:0":
            raise RuntimeError(f"exit code {code}")
        (disk / "others").unlink()
        lab.cluster.run("scontrol", "requeue", job.id)
        job.wait_for_state("COMPLETED")
        kept = lab.folder / f"run{lab.count}"
        shutil.copytree(disk / "run", kept)
        job.run_dir = kept
    finally:
        lab.cluster.run("umount", "-l", str(disk))
    return job, 1, 0.0


FAULTS = {
    "T1": t1_warned, "T2": t2_preempted, "T3 step": t3_killed_in_a_step, "T3 save": t3_killed_in_a_save,
    "T4": t4_lost_daemon, "T5": t5_node_down, "T6": t6_half_the_nodes, "T7": t7_stopped_rank,
    "T8": t8_damaged_checkpoint, "T9": t9_full_disk,
}  # fmt: skip


def faults(names: list[str]) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "cluster", 3, 2) as cluster:
        lab = Lab(Path(folder), cluster)
        undisturbed = lab.submit(pace_s=0)
        undisturbed.wait_for_state("COMPLETED", "FAILED")
        if found := verify(undisturbed, undisturbed, 0)["faults"]:
            raise RuntimeError(f"undisturbed: {found}\n{undisturbed.console.read_text()}")
        for name in names:
            began = time.monotonic()
            try:
                cluster.wait_until_idle(3)
                job, restarts, band = FAULTS[name](lab)
                job.wait_for_state("COMPLETED", "FAILED", "CANCELLED")
                row = verify(job, undisturbed, restarts, band)
            except (RuntimeError, OSError, KeyError) as error:
                row = {"faults": [f"{type(error).__name__}: {error}"]}
            row = {"fault": f"{name.split()[0]}: {FAULTS[name].__doc__}", **row}
            row |= {"seconds": round(time.monotonic() - began)}
            print(json.dumps(row), flush=True)
            rows.append(row | {"faults": "; ".join(row["faults"]) or "none"})
    return {"faults": rows}


LARGE = ["train.micro_batch=1", "train.lr_drop_epochs=[]", "train.meet_minutes=30", "train.hang_minutes=0",
         "data.workers=0", "eval.batch=1", "train.epochs=2"]  # fmt: skip


def start() -> dict[str, Any]:
    """Seconds from sbatch until rank 0 has done each part of its start, of ranks that share the cores."""
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "cluster", 8, 8) as cluster:
        lab = Lab(Path(folder), cluster, images=64)
        rows = []
        for nodes, tasks in ((1, 1), (1, 8), (2, 8), (4, 8)):
            submitted = time.time()
            job = lab.submit(*LARGE, f"train.global_batch={nodes * tasks}", "train.max_steps=1", "eval.every=0",
                             nodes=nodes, tasks=tasks, pace_s=0)  # fmt: skip
            job.wait_for_state("COMPLETED", "FAILED", patience_s=3000)
            rows.append(start_of(job, submitted) | {"state": job.state()})
            print(json.dumps(rows[-1]), flush=True)
    return {"start": rows}


def start_of(job: Job, submitted: float) -> dict[str, Any]:
    ends = {line["done"]: round(line["time"] - submitted, 1) for line in read_lines(job.trace / "0-0.jsonl")
            if "done" in line}  # fmt: skip
    return {"ranks": len(list(job.trace.glob("0-*.jsonl"))), **ends}


def all_ranks() -> dict[str, Any]:
    """64 ranks: 20 steps, an evaluation, and a warning between."""
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "cluster", 8, 8) as cluster:
        lab = Lab(Path(folder), cluster, images=640)
        submitted = time.time()
        job = lab.submit(*LARGE, "train.global_batch=64", "eval.every=2", nodes=8, tasks=8, pace_s=0)
        job.wait_for("step 8", lambda: any(step >= 8 for _, _, step, _ in job.steps()), patience_s=3000)
        pids = job.rank_pids()
        memory = sum(proportional_memory(pid) for pid in pids.values())
        print(json.dumps(start_of(job, submitted)), flush=True)
        cluster.run("scancel", "--batch", "--signal=USR2", job.id)
        job.wait_for_requeue(patience_s=3000)
        job.wait_for_state("COMPLETED", "FAILED", patience_s=3000)
        evaluated = sorted(path.name for path in job.run_dir.glob("evaluation/*.json"))
        shutil.copy(job.console, results.RESULTS / "slurm-64-ranks.txt")
        return {"start": [start_of(job, submitted)], "ranks": len(pids), "state": job.state(),
                "restarts": job.restarts(), "evaluated": ", ".join(evaluated), "steps": len(job.losses()),
                "memory of all ranks, GiB": round(memory / 2**30, 1),
                "minutes": round((time.time() - submitted) / 60, 1)}  # fmt: skip


def proportional_memory(pid: int) -> int:
    """Bytes of a process, of shared ones its part."""
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


PARTS = {"faults": faults, "start": start, "all": all_ranks}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slurm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="T", help="of the faults")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what was started ends, too
    for part in args.parts:
        found = faults(args.only) if part == "faults" else PARTS[part]()
        if part != "faults" or args.only == list(FAULTS):
            command = f"python -m benchmarks.slurm --parts {part}"
            results.write("slurm", "Jobs of launch/coco_64gpu.sh on one machine", part, found, command)


if __name__ == "__main__":
    main()
