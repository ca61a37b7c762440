"""The convergence experiment: trains what is not trained yet, one process for each run, and writes charts and tables.

    make convergence                                            (a pair: Deformable DETR and DETR-DC5 ten times as long)
    python -m benchmarks.convergence --parts reported --minutes 120 --record

Schedules of one model and seed are one run until the first of them lets its learning rate drop: that much is trained
once, and the longer ones begin with it. A run that the time did not suffice for goes on where it was when the command
is given again. Runs and report are in runs/convergence-<size>/; with --record each finished run (its settings, its
numbers, its event files) and the report go to docs/results/convergence/<size>/, and what stands there is not trained
again. The protocol: docs/convergence.md.

sweep: learning rates, on a seed of their own. pair: what one looks at first. reported: the protocol's runs. longer:
DETR-DC5's schedules of 20 N, where it has not converged in 10 N. more: the other models. without: Deformable DETR with
one thing taken away. attention: where the models look after epochs 1, 5 and 20. again: the shortest schedules,
twice on this machine, which have to be bit-equal. aquarium, deeppcb: photographs, read through TENFOLD_DATA.
"""

import argparse
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as pyplot
import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.real_data import DATA
from benchmarks.results import ROOT, machine, today, write
from data_tools.sample import read_manifest
from framework import convergence
from framework.config import load, save
from framework.errors import FAILED, InputError, UsageError, command
from framework.files import alone_in
from framework.processes import die_with_parent
from framework.tracking.console import setup_logging, write_json
from framework.tracking.curves import read_curve
from framework.tracking.run_folder import different_keys

DATA = DATA.resolve()  # before the command changes its folder
RECORDED = ROOT / "docs" / "results" / "convergence"
LOOKED_AT = (1, 5, 20)  # epochs
LONGER = 20  # N
PHOTOGRAPHS = ("aquarium", "deeppcb")
# They are few, so that an epoch has few steps: six times the epochs, and an evaluation after every third.
MORE_EPOCHS = 6
ON_PHOTOGRAPHS = ("data.sizes=[192]", "data.max_size=256", "model.num_queries=60", "eval.every=3",
                  "eval.image_side=null")  # fmt: skip
# With AVX-512 numpy's arctan2 has other last bits, and the drawn set other pixels: a CPU without it has the last word.
DRAWN_BY = {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512_SKX X86_V4 AVX512_ICL AVX512_SPR"}  # numpy's names, old and new
SHOWN_LINES = 15  # of the log of a run that failed
MOST_SEEDS = 10


@dataclass(frozen=True)
class Model:
    """A model of the experiment: its departures from the size's configuration file, and whose learning rate it has."""

    title: str
    departures: tuple[str, ...] = ()
    tuned_as: str = "deformable"


DETR = ("model.attention=dense", "model.classification=softmax", "model.num_feature_levels=1", "loss.class_weight=1.0")
DC5 = ("model.num_feature_levels=1", "model.backbone.dilation=true")
MODELS = {
    "deformable": Model("Deformable DETR"),
    "refine": Model("+ refinement", ("model.refine_boxes=true",)),
    "two-stage": Model("++ two-stage", ("model.refine_boxes=true", "model.queries=proposals")),
    "detr": Model("DETR", DETR, "detr-dc5"),
    "detr-dc5": Model("DETR-DC5", (*DETR, "model.backbone.dilation=true"), "detr-dc5"),
    "one-level": Model("one level (DC5)", DC5),
    "one-point": Model("one point", ("model.num_points=1",)),
    "dense": Model("dense attention, refinement (DC5)", (*DC5, "model.attention=dense", "model.refine_boxes=true")),
    "softmax": Model("softmax, not focal", ("model.classification=softmax", "loss.class_weight=1.0")),
    "no-auxiliary": Model("no auxiliary losses", ("loss.auxiliary=false",)),
}
WITHOUT = ("one-level", "one-point", "dense", "softmax", "no-auxiliary")


@dataclass(frozen=True)
class Size:
    """epochs: N. times: DETR-DC5's schedules, in N. rates: those tried of each tuned model. chosen: those of the best
    trials, or where none were recorded. jobs: runs side by side."""

    drawn: tuple[str, ...]
    epochs: int
    times: tuple[float, ...]
    rates: dict[str, tuple[float, ...]]
    chosen: dict[str, float]
    jobs: int


SIZES = {
    "cpu": Size(
        drawn=("--images", "3000", "--val", "300", "--size", "160", "--zoom", "2.5"),
        epochs=4, times=(10, 5, 1, 2.5), rates={"deformable": (4e-4, 2e-4, 8e-4), "detr-dc5": (2e-4, 4e-4, 1e-4)},
        chosen={"deformable": 4e-4, "detr-dc5": 2e-4}, jobs=len(os.sched_getaffinity(0)),
    ),
    "gpu": Size(
        drawn=("--images", "10000", "--val", "500", "--size", "192", "--zoom", "1.5"),
        epochs=4, times=(10, 5, 1, 2.5), rates={"detr-dc5": (1e-4, 2e-4, 5e-5), "deformable": (1e-4, 2e-4, 4e-4)},
        chosen={"deformable": 2e-4, "detr-dc5": 1e-4}, jobs=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A complete schedule, its learning rate / 10 at 80 % of its epochs; or the begin of one, `until` an epoch."""

    model: str
    epochs: int
    lr: float
    seed: int
    data: str = "drawn"
    until: int | None = None
    again: int = 0  # which one of equal runs

    @property
    def name(self) -> str:
        parts = [self.model, f"{self.epochs}-epochs", f"lr{self.lr:g}"]
        parts += [self.data] * (self.data != "drawn") + [f"until-{self.until}"] * (self.until is not None)
        return "-".join([*parts, f"seed{self.seed}", *[f"again{self.again}"] * bool(self.again)])

    @property
    def drop(self) -> int:
        """The epoch after which the learning rate drops."""
        return round(0.8 * self.epochs)

    def shares(self, other: "Run") -> bool:
        """Is the other one of the same schedule, longer, so that it begins as this one?"""
        return other.epochs > self.epochs and replace(other, epochs=self.epochs) == self

    @property
    def label(self) -> str:
        return f"{MODELS[self.model].title}, {self.epochs} epochs"


def plan(part: str, size: Size, seeds: int, rates: dict[str, float]) -> list[Run]:
    """The runs of a part, in the order in which they are worth their time. rates: of the tuned models."""
    n, longest = size.epochs, 10 * size.epochs
    rate = {name: rates[model.tuned_as] for name, model in MODELS.items()}

    def of(model: str, epochs: int = n, seed: int = 1, **others: Any) -> Run:
        return Run(model, epochs, rate[model], seed, **others)

    every_seed = range(1, seeds + 1)
    if part == "sweep":
        tried = {"deformable": n, "detr-dc5": 5 * n}
        return [Run(model, epochs, lr, 100) for model, epochs in tried.items() for lr in size.rates[model]]
    if part == "pair":
        return [of("detr-dc5", longest), of("deformable")]
    if part == "reported":
        of_detr = [("detr-dc5", round(times * n)) for times in size.times]
        schedules = [of_detr[0], ("deformable", n), *of_detr[1:]]
        return [of(model, epochs, seed) for seed in every_seed for model, epochs in schedules]
    if part == "longer":  # where the baseline has not converged
        return [of("detr-dc5", LONGER * n, seed) for seed in every_seed]
    if part == "more":
        return [of(model, epochs, seed) for seed in every_seed for model, epochs in
                (("refine", n), ("two-stage", n), ("detr", longest))]  # fmt: skip
    if part == "without":
        return [of(model, n, seed) for seed in every_seed for model in WITHOUT]
    if part == "attention":
        return [of(model, longest, until=max(LOOKED_AT)) for model in ("deformable", "detr-dc5")]
    if part == "again":
        return [of(model, again=which) for model in ("deformable", "detr-dc5") for which in (1, 2)]
    n *= MORE_EPOCHS
    return [of(model, epochs, data=part) for model, epochs in
            (("detr-dc5", 5 * n), ("deformable", n), ("detr-dc5", n), ("deformable", 5 * n))]  # fmt: skip


PARTS = ("sweep", "pair", "reported", "longer", "more", "without", "attention", "again", *PHOTOGRAPHS)


class Experiment:
    """One size of it. work: shards and runs. out: recorded runs and the report."""

    def __init__(self, size: str, record: bool):
        self.name, self.size, self.record = size, SIZES[size], record
        self.config = f"configs/convergence_{size}.yaml"
        self.work = ROOT / "runs" / f"convergence-{size}"
        self.out = RECORDED / size if record else self.work / "report"
        self.made: dict[str, Path] = {}
        self.steps: dict[str, int] = {}

    def plan(self, part: str, seeds: int) -> list[Run]:
        return plan(part, self.size, seeds, self.rates())

    def rates(self) -> dict[str, float]:
        """Of each tuned model the one with the best final AP, where all were tried."""
        best = dict(self.size.chosen)
        sweep = plan("sweep", self.size, 1, best)
        for model in best:
            scores = {run.lr: self.facts(run)["AP"] for run in sweep if run.model == model and self.folder(run)}
            if len(scores) == len(self.size.rates[model]):
                best[model] = max(scores, key=lambda lr: scores[lr])
        return best

    def folder(self, run: Run) -> Path | None:
        """Where a finished run is; None: it is not."""
        place = self.recorded(run) if self.record and run.until is None else self.work / run.name
        return place if (place / "run.json").exists() else None

    def recorded(self, run: Run) -> Path:
        return RECORDED / self.name / run.name

    def facts(self, run: Run) -> dict[str, Any]:
        folder = self.folder(run)
        assert folder is not None
        facts = json.loads((folder / "run.json").read_text())
        assert isinstance(facts, dict)
        return facts

    def shards(self, data: str) -> Path:
        """Folder of shards as seen from ROOT: of the drawn set, or of one that TENFOLD_DATA has.

        The first time they are made, unless they are there; a folder with others ends the command.
        """
        if data not in self.made:
            folder = Path("data", f"convergence-{self.name}")
            source = folder / "drawn" if data == "drawn" else DATA / data
            if data == "drawn":
                python("-m", "data_tools.synth", "--out", str(source), *self.size.drawn, **DRAWN_BY)
            elif not source.is_dir():
                raise UsageError(f"{source} is not there: set TENFOLD_DATA to the folder that {data} is in")
            self.made[data] = folder / f"{data}-shards"
            python("-m", "data_tools.convert", "--images", str(source / "images"),
                   "--annotations", str(source / "annotations"), "--out", str(self.made[data]))  # fmt: skip
        return self.made[data]

    def settings(self, run: Run) -> list[str]:
        """key=value of a run; folders as seen from ROOT."""
        shards = self.shards(run.data)
        classes, steps = len(read_manifest(ROOT / shards / "train").classes), self.steps_of_epoch(run)
        return [
            *MODELS[run.model].departures, f"model.num_classes={classes}",
            f"train.epochs={run.epochs}", f"train.lr_drop_epochs=[{run.drop}]",
            f"optim.lr={run.lr:g}", f"train.seed={run.seed}", f"data.train={shards / 'train'}",
            f"data.val={shards / 'val'}", f"train.run_dir={(self.work / run.name).relative_to(ROOT)}",
            f"tracking.log_every={steps}", *ON_PHOTOGRAPHS * (run.data != "drawn"),
            *([f"train.max_steps={steps * run.until}", "tracking.attention=1"] if run.until else []),
        ]  # fmt: skip

    def steps_of_epoch(self, run: Run) -> int:
        if run.data not in self.steps:
            images = read_manifest(ROOT / self.shards(run.data) / "train").images
            self.steps[run.data] = images // load(ROOT / self.config, []).train.global_batch
        return self.steps[run.data]

    def train(self, runs: Iterable[Run], jobs: int, end: float) -> bool:
        """Train until all are done or the time is over. False: one of them failed."""
        runs = list(dict.fromkeys(runs))
        settings = {run: self.settings(run) for run in runs}
        for run in runs:
            self.refuse_other(run, settings[run])
            finished = (self.work / run.name / "run.json").exists()
            if finished and self.folder(run) is None:
                record(self.work / run.name, self.recorded(run))  # finished without --record
        waiting = [run for run in runs if self.folder(run) is None]
        unfinished = set(waiting)
        free = shares_of_cores(jobs)
        working: dict[Run, tuple[subprocess.Popen[bytes], set[int], Run | None]] = {}
        fine = True
        try:
            while (waiting or working) and time.monotonic() < end:
                while free and (run := next((one for one in waiting if self.can_start(one, unfinished)), None)):
                    waiting.remove(run)
                    cores, longer = free.pop(0), self.to_begin(run, unfinished)
                    until = [f"train.max_steps={run.drop * self.steps_of_epoch(run)}"] if longer else []
                    print(f"{run.name}: starts, or goes on{f', until {longer.name} can' if longer else ''}", flush=True)
                    working[run] = self.start(run, [*settings[run], *until], cores), cores, longer
                time.sleep(0.2)
                for run in [run for run, (process, *_) in working.items() if process.poll() is not None]:
                    process, cores, longer = working.pop(run)
                    free.append(cores)
                    fine &= process.returncode == 0
                    if process.returncode:
                        unfinished.remove(run)
                        lines = (self.work / run.name / "output.txt").read_text().splitlines()[-SHOWN_LINES:]
                        print(f"{run.name}: exit code {process.returncode}:", *lines, sep="\n  ", flush=True)
                    elif longer:
                        self.begin(longer, settings[longer], run)
                        waiting.insert(0, run)
                    else:
                        unfinished.remove(run)
                        self.finished(run, settings[run])
        finally:
            for process, *_ in working.values():
                process.kill()  # a run goes on from its last epoch
                process.wait()
        for run in [*working, *waiting]:
            print(f"{run.name}: not done; the same command goes on with it", flush=True)
        return fine

    def can_start(self, run: Run, unfinished: set[Run]) -> bool:
        """Not while a shorter schedule is still to become its begin."""
        begun = (self.work / run.name / "config.yaml").exists()
        return begun or not any(one.shares(run) and self.can_be_begin(one) for one in unfinished)

    def to_begin(self, run: Run, unfinished: set[Run]) -> Run | None:
        """The next longer schedule that this one has to become the begin of."""
        longer = min((one for one in unfinished if run.shares(one)), key=lambda one: one.epochs, default=None)
        begun = longer and (self.work / longer.name / "config.yaml").exists()
        return None if begun or not self.can_be_begin(run) else longer

    def can_be_begin(self, run: Run) -> bool:
        """Not when its learning rate has dropped."""
        steps = [int(path.name[5:]) for path in (self.work / run.name / "checkpoints").glob("step-*[0-9]")]
        return max(steps, default=0) <= run.drop * self.steps_of_epoch(run)

    def begin(self, run: Run, settings: list[str], shorter: Run) -> None:
        """Give a run the folder of a shorter one, which stands where its learning rate drops."""
        partial = self.work / f"{run.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.work / shorter.name, partial)
        save(load(ROOT / self.config, settings), partial / "config.yaml")
        shutil.rmtree(self.work / run.name, ignore_errors=True)  # of an attempt that ended before it had begun
        partial.rename(self.work / run.name)

    def refuse_other(self, run: Run, settings: list[str]) -> None:
        """Raises UsageError when a finished run was another one than these settings and this set make."""
        folder = self.folder(run)
        if folder is None:
            return
        wanted = load(ROOT / self.config, settings)
        if keys := different_keys(load(folder / "config.yaml", []), wanted):
            raise UsageError(f"{folder.relative_to(ROOT)}: trained with another configuration: {'; '.join(keys)}; "
                             "remove the folder, or restore the configuration")  # fmt: skip
        shards = self.shards(run.data)
        seen, found = self.facts(run)["data_fingerprint"], read_manifest(ROOT / shards / "train").fingerprint
        if seen != found:
            raise UsageError(
                f"{folder.relative_to(ROOT)}: trained on a set with fingerprint {seen}, and {shards} has {found}: they "
                f"cannot be compared. Remove {shards.parent}, so that the set is made again; if it still differs, its "
                "source does, or another numpy or Pillow makes another one")  # fmt: skip

    def start(self, run: Run, settings: list[str], cores: set[int]) -> "subprocess.Popen[bytes]":
        """On cores of its own: two runs that share some wait for each other many times a step.

        It dies with this process, so that no two ever write into one folder.
        """

        parent = os.getpid()

        def prepare() -> None:
            os.sched_setaffinity(0, cores)
            die_with_parent(parent)

        folder = self.work / run.name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "framework.train", "--config", self.config, *settings], cwd=ROOT,
                env=environment() | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),
                stdout=output, stderr=output, preexec_fn=prepare,
            )  # fmt: skip

    def finished(self, run: Run, settings: list[str]) -> None:
        """Write run.json, and where runs are recorded copy what a report needs: not the weights."""
        folder = self.work / run.name
        curve = read_curve(f"{run.label}={folder}")
        assert curve is not None, f"{folder}: trained, but without AP"
        newest = max((folder / "checkpoints").iterdir())
        manifest = json.loads((newest / "MANIFEST.json").read_text())
        environment = json.loads((folder / "environment.json").read_text())
        facts = {**vars(run), "AP": curve.last["AP"], "hours": curve.last["hours"], "points": curve.points,
                 "weights_sha256": manifest["files"]["weights.safetensors"]["sha256"],
                 "data_fingerprint": environment["fingerprint"], "device": environment["device"],
                 "commit": environment["commit"], "machine": machine(), "date": today(),
                 "command": f"python -m framework.train --config {self.config} {' '.join(settings)}"}  # fmt: skip
        write_json(folder / "run.json", facts)
        print(f"{run.name}: AP {100 * (curve.last['AP'] or 0):.1f} after {curve.last['hours'] or 0:.2f} h", flush=True)
        if self.record and run.until is None:
            record(folder, self.recorded(run))

    def report(self) -> None:
        """Charts and tables of what is finished."""
        self.out.mkdir(parents=True, exist_ok=True)
        drawn = ROOT / "data" / f"convergence-{self.name}" / "drawn" / "report.json"
        if drawn.exists():
            shutil.copyfile(drawn, self.out / "set.json")
        whole = [run for part in ("reported", "longer", "more") for run in self.plan(part, MOST_SEEDS)]
        tables = {
            "sweep": self.plan("sweep", 1),
            "with one thing taken away": [run for run in whole if run.model in ("deformable", "refine")]
            + self.plan("without", MOST_SEEDS),
        }
        for title, runs in tables.items():
            if rows := [self.row(run) for run in runs if self.folder(run)]:
                part = "sweep" if title == "sweep" else "reported more without"
                self.write(title, {"runs": rows}, part)
        for model, rate in self.rates().items():
            if rate in (min(self.size.rates[model]), max(self.size.rates[model])):
                print(f"{model}: of the learning rates tried the best, {rate:g}, is at an end; by the protocol both "
                      "tuned models get one more trial (SIZES)")  # fmt: skip
        self.compare("", whole, by_protocol=True)
        for data in PHOTOGRAPHS:
            self.compare(data, self.plan(data, 1))
        self.report_again()
        self.draw_attention()

    def row(self, run: Run) -> dict[str, Any]:
        facts = self.facts(run)
        row = {"model": MODELS[run.model].title, "epochs": run.epochs, "learning rate": run.lr, "seed": run.seed}
        for name in ("AP", "APs", "APm", "APl"):
            value = facts["points"][-1][name]
            row[name] = None if value is None else round(100 * value, 1)
        return row | {"hours": round(facts["hours"], 2), "trained": facts["date"]}

    def compare(self, name: str, runs: list[Run], *, by_protocol: bool = False) -> None:
        """The charts of framework.convergence, measured against DETR-DC5's longest schedule.

        by_protocol: with the ratio, once all schedules are there.
        """
        done = {run: folder for run in runs if (folder := self.folder(run))}
        flags = []
        if by_protocol and (whole := [run for seed in self.whole_seeds() for run in seed]):
            # Only these may be compared by the protocol: a mean over other seeds would be another mean.
            part = {run for name in ("reported", "longer") for run in self.plan(name, MOST_SEEDS) if run not in whole}
            done = {run: folder for run, folder in done.items() if run not in part}
            labels = list(dict.fromkeys(run.label for run in whole if run.model == "detr-dc5"))
            method = next(run.label for run in whole if run.model == "deformable")
            flags = ["--method", method, "--schedules", *labels]
        elif by_protocol:
            print("the protocol's ratio has to wait for a seed of which all schedules are done")
        baseline = sorted((run.epochs, run.label) for run in done if run.model == "detr-dc5")
        if not baseline or all(run.model == "detr-dc5" for run in done):
            return
        models = list(MODELS)
        ordered = sorted(done, key=lambda run: (models.index(run.model), run.epochs, run.seed))
        arguments = [f"{run.label}={done[run].relative_to(ROOT)}" for run in ordered]
        flags += ["--out", str(self.out / name), "--baseline", baseline[-1][1]]
        try:
            convergence.main([*arguments, *flags])
        except (InputError, UsageError) as error:  # runs were left out; the other tables are made all the same
            print(f"no ratios{f' of {name}' if name else ''}: {error}")
        if self.record:  # TensorBoard does not read gzipped runs
            shutil.rmtree(self.out / name / "tensorboard", ignore_errors=True)

    def whole_seeds(self) -> list[list[Run]]:
        """The reported runs of each seed of which all schedules are done, and the longer one if it is of all these."""
        seeds = [[run for run in self.plan("reported", MOST_SEEDS) if run.seed == n] for n in range(1, MOST_SEEDS + 1)]
        whole = [runs for runs in seeds if all(map(self.folder, runs))]
        longer = [next(run for run in self.plan("longer", MOST_SEEDS) if run.seed == runs[0].seed) for runs in whole]
        if all(map(self.folder, longer)):
            whole = [[*runs, more] for runs, more in zip(whole, longer, strict=True)]
        return whole

    def report_again(self) -> None:
        """Are runs of the same seed equal in every bit? (On one machine, with as many cores.)"""
        rows = []
        repeats = self.plan("again", 1)
        for first, run in zip(repeats[::2], repeats[1::2], strict=True):
            if self.folder(first) and self.folder(run):
                a, b = self.facts(first), self.facts(run)
                rows.append({
                    "model": MODELS[run.model].title, "epochs": run.epochs, "seed": run.seed, "AP": a["AP"],
                    "AP, again": b["AP"], "hours": round(a["hours"], 3), "hours, again": round(b["hours"], 3),
                    "weights": a["weights_sha256"][:16],
                    "weights, again": b["weights_sha256"][:16], "equal": a["weights_sha256"] == b["weights_sha256"],
                    "on": " and ".join(dict.fromkeys(f"{one['device']}; {one['machine']}" for one in (a, b))),
                })  # fmt: skip
        if rows:
            self.write("the same seed twice", {"runs": rows}, "again")

    def draw_attention(self) -> None:
        """What each model's most certain query looks at on one image, after some epochs, as a grid of pictures."""
        runs = [run for run in self.plan("attention", 1) if self.folder(run)]
        if not runs:
            return
        self.write(
            "where they look", {"runs": [self.row(run) | {"stopped after": run.until} for run in runs]}, "attention"
        )
        seen = [[picture(self.work / run.name, "attention/0", epoch) for run in runs] for epoch in LOOKED_AT]
        widths = [one.shape[1] / one.shape[0] for one in seen[0]]
        figure, panels = pyplot.subplots(
            len(seen), len(runs), figsize=(5.5 * sum(widths), 5.5 * len(seen)), width_ratios=widths, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for epoch, pictures, row in zip(LOOKED_AT, seen, panels, strict=True):
            for run, shown, panel in zip(runs, pictures, row, strict=True):
                panel.imshow(shown)
                panel.set_title(f"{MODELS[run.model].title}, after epoch {epoch}")
                panel.axis("off")
        figure.savefig(self.out / "attention.png", dpi=100)
        pyplot.close(figure)

    def write(self, title: str, result: dict[str, Any], parts: str) -> None:
        command = f"python -m benchmarks.convergence --size {self.name} --parts {parts} --record"
        write("tables", f"The convergence experiment, size {self.name}", title, result, command, folder=self.out)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    os.chdir(ROOT)  # what is recorded names folders from here
    end = time.monotonic() + 60 * args.minutes
    experiment = Experiment(args.size, args.record)
    fine = True
    with alone_in(experiment.work, "end it"):
        # The sweep first: it decides on the learning rates of the others.
        for parts in ([p for p in args.parts if p == "sweep"], [p for p in args.parts if p != "sweep"]):
            runs = [run for part in parts for run in experiment.plan(part, args.seeds)]
            fine &= experiment.train(runs, args.jobs or experiment.size.jobs, end)
        experiment.report()
    print(f"charts and tables are in {experiment.out.relative_to(ROOT)}")
    return 0 if fine else FAILED


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of images, set and models (cpu)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["pair"], metavar="PART",
                        help=f"of {', '.join(PARTS)} (pair); none: the report of what is there")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=90, help="of training, at most (90)")
    parser.add_argument("--seeds", type=int, default=3, help="of reported runs (3)")
    parser.add_argument("--jobs", type=int, help="runs side by side (cpu: as many as cores; gpu: 4)")
    parser.add_argument("--record", action="store_true", help="in docs/results/convergence/, for this repository")
    args = parser.parse_args(argv)
    if args.minutes < 0:
        raise UsageError(f"--minutes {args.minutes}: expected at least 0")
    if not 1 <= args.seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds {args.seeds}: expected 1 to {MOST_SEEDS}")
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: expected at least 1")
    return args


def shares_of_cores(jobs: int) -> list[set[int]]:
    """The cores of this process, dealt out to so many runs; where there are fewer, runs share one."""
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::jobs]) or {cores[i % len(cores)]} for i in range(jobs)]


def record(folder: Path, target: Path) -> None:
    """Copy what a report needs of a run, not its weights; all of it or nothing. Event files are gzipped and keep the
    time of their names, not the host's name."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "tensorboard").mkdir(parents=True)
    for name in ("config.yaml", "environment.json", "run.json"):
        shutil.copyfile(folder / name, partial / name)
    for i, path in enumerate(sorted((folder / "tensorboard").iterdir())):
        packed = gzip.compress(path.read_bytes(), mtime=0)
        (partial / "tensorboard" / f"events.out.tfevents.{path.name.split('.')[3]}.{i}.gz").write_bytes(packed)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def picture(folder: Path, tag: str, epoch: int) -> np.ndarray:
    """The image (H, W, 3) uint8 that a run logged under a tag at the end of an epoch."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    step = next(one.step for one in events.Scalars("epoch") if one.value == epoch)
    encoded = next(one.encoded_image_string for one in events.Images(tag) if one.step == step)
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def python(*arguments: str, **variables: str) -> None:
    """Run a command of this repository with these environment variables; ends here when it fails."""
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment() | variables).returncode
    if code:
        sys.exit(f"exit code {code} of: python {' '.join(arguments)}")


if __name__ == "__main__":
    command(main)
