"""50 steps of the trainer in each precision and ZeRO stage: images a second, peak memory, the loss.

    python -m benchmarks.stages [--config FILE] [--steps N] [--jobs N] [--graphs] [key=value ...]

The real command, one process, on drawn images of 640 px, without evaluation; the backbone from scratch. Timed is the
second half of the steps, when everything has been allocated; with several --jobs side by side nothing is. --graphs:
on a GPU, with engine.cuda_graphs, and with engine.compile_layers, beside one run without; so short a run spends most of
its time recording. Without
--config: on a GPU the base R50 at published sizes, two images; on a CPU the small model of
configs/convergence_cpu.yaml, and no fp16, which is for GPUs.
Writes docs/results/stages.{json,md}, on a GPU gpu-stages.{json,md}.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import ROOT, write
from data_tools import convert, synth
from framework.errors import FAILED, command

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3), "fp16": (1, 2, 3)}
GRAPHS = {"no": [], "yes": ["engine.cuda_graphs=true"],
          "of compiled layers": ["engine.cuda_graphs=true", "engine.compile_layers=true"]}  # fmt: skip
WITH_GRAPHS = [("fp32", 0, "yes"), ("bf16", 1, "yes"), ("bf16", 2, "yes"), ("fp16", 1, "yes"),
               ("fp32", 0, "of compiled layers"), ("bf16", 1, "of compiled layers")]  # fmt: skip
USUAL = {"cuda": ["--config", "configs/coco_r50_deformable.yaml", "model.backbone.weights=null",
                  "model.backbone.norm=group", "train.global_batch=2", "train.micro_batch=2"],
         "cpu": ["--config", "configs/convergence_cpu.yaml"]}  # fmt: skip
IMAGES = 120
RECORDS = 10  # of a run; the first half does not count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = (["--config", str(args.config)] if args.config else USUAL[device]) + args.overrides
    name = "gpu-stages" if device == "cuda" else "stages"
    settings = ["--steps", str(args.steps), "--jobs", str(args.jobs), *["--graphs"] * args.graphs]
    said = " ".join(["python -m benchmarks.stages", *settings, *arguments])
    part = f"{args.steps} steps{', CUDA graphs' * args.graphs}"
    runs = [(precision, stage, "no") for precision, stages in STAGES.items() for stage in stages
            if precision != "fp16" or device == "cuda"]  # fmt: skip
    if args.graphs:
        runs = [runs[0], *WITH_GRAPHS]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as side_by_side:
        shards = drawn_shards(Path(folder))
        do = partial(trained, Path(folder), arguments, args.steps, shards)
        for row in side_by_side.map(do, *zip(*runs, strict=True)):
            if args.jobs > 1:
                del row["images/s"]
            first = (rows or [row])[0]["last loss"]
            rows.append(row | {"of the first run's loss": row["last loss"] and first and row["last loss"] / first})
            print(rows[-1], flush=True)
            write(name, "Precisions and ZeRO stages", part, {"runs": rows}, said)  # so far
    return 0 if all(row["outcome"] == "done" for row in rows) else FAILED


def drawn_shards(folder: Path) -> Path:
    synth.main(["--out", str(folder / "drawn"), "--images", str(IMAGES), "--val", "1", "--size", "640"])
    convert.main(["--images", str(folder / "drawn/images"), "--annotations",
                  str(folder / "drawn/annotations/instances_train.json"), "--out", str(folder / "shards")])  # fmt: skip
    return folder / "shards"


def trained(
    folder: Path, arguments: list[str], steps: int, shards: Path, precision: str, stage: int, graphs: str
) -> dict[str, Any]:
    """How a run ended, and medians of what it recorded in its second half."""
    run = folder / f"{precision}-{stage}-{graphs.replace(' ', '-')}"
    line = [sys.executable, "-m", "framework.train", *arguments, f"data.train={shards}", "eval.every=0",
            f"engine.precision={precision}", f"engine.zero_stage={stage}", f"train.max_steps={steps}",
            *GRAPHS[graphs],
            f"train.epochs={steps}", "train.lr_drop_epochs=[]", f"tracking.log_every={max(1, steps // RECORDS)}",
            f"train.run_dir={run}"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path = run / "metrics.jsonl"
    records = [json.loads(one) for one in path.read_text().splitlines()] if path.exists() else []
    records = [one for one in records if "loss/total" in one][-RECORDS // 2 :]
    shutil.rmtree(run, ignore_errors=True)  # its weights
    outcome = "done"
    if ended.returncode or not records:
        outcome, records = f"exit code {ended.returncode}: {ended.stdout.strip().splitlines()[-1]}", []
    return {
        "precision": precision,
        "ZeRO": stage,
        "graphs": graphs,
        "images/s": statistics.median(one["throughput/images_per_s"] for one in records) if records else None,
        "peak GiB": max((one["memory/peak_gib"] for one in records), default=None),
        "last loss": records[-1]["loss/total"] if records else None,
        "outcome": outcome,
    }


if __name__ == "__main__":
    command(main)
