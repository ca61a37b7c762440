"""50 steps of the trainer in each precision and ZeRO stage: images a second, peak memory, the loss.

    python -m benchmarks.stages [--config FILE] [--steps N] [key=value ...]

The real command, one process, on drawn images of 640 px, without evaluation; the backbone from scratch. Timed is the
second half of the steps, when everything has been allocated. Without --config: on a GPU the base R50 at published
sizes, two images; on a CPU the small model of configs/convergence_cpu.yaml, and no fp16, which is for GPUs.
Writes docs/results/stages.{json,md}, on a GPU gpu-stages.{json,md}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import ROOT, write
from data_tools import convert, synth
from framework.errors import InputError, command

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3), "fp16": (1, 2, 3)}
USUAL = {"cuda": ["--config", "configs/coco_r50_deformable.yaml", "model.backbone.weights=null",
                  "model.backbone.norm=group", "train.global_batch=2", "train.micro_batch=2"],
         "cpu": ["--config", "configs/convergence_cpu.yaml"]}  # fmt: skip
IMAGES = 120
RECORDS = 10  # of a run; the first half does not count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = (["--config", str(args.config)] if args.config else USUAL[device]) + args.overrides
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shards = drawn_shards(Path(folder))
        for precision, stages in STAGES.items():
            for stage in stages if precision != "fp16" or device == "cuda" else ():
                run = trained(Path(folder), arguments, args.steps, shards, precision, stage)
                rows.append({"precision": precision, "ZeRO": stage, **run, "of the first run's loss": None})
                rows[-1]["of the first run's loss"] = run["last loss"] / rows[0]["last loss"]
                print(rows[-1], flush=True)
    said = " ".join(["python -m benchmarks.stages", "--steps", str(args.steps), *arguments])
    name = "gpu-stages" if device == "cuda" else "stages"
    write(name, "Precisions and ZeRO stages", f"{args.steps} steps", {"runs": rows}, said)
    return 0


def drawn_shards(folder: Path) -> Path:
    synth.main(["--out", str(folder / "drawn"), "--images", str(IMAGES), "--val", "1", "--size", "640"])
    convert.main(["--images", str(folder / "drawn/images"), "--annotations",
                  str(folder / "drawn/annotations/instances_train.json"), "--out", str(folder / "shards")])  # fmt: skip
    return folder / "shards"


def trained(
    folder: Path, arguments: list[str], steps: int, shards: Path, precision: str, stage: int
) -> dict[str, float]:
    """A run's medians of what it recorded in its second half."""
    run = folder / f"{precision}-{stage}"
    line = [sys.executable, "-m", "framework.train", *arguments, f"data.train={shards}", "eval.every=0",
            f"engine.precision={precision}", f"engine.zero_stage={stage}", f"train.max_steps={steps}",
            f"train.epochs={steps}", "train.lr_drop_epochs=[]", f"tracking.log_every={max(1, steps // RECORDS)}",
            f"train.run_dir={run}"]  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)  # fmt: skip
    if ended.returncode:
        raise InputError(f"exit code {ended.returncode} of {' '.join(line)}:\n{ended.stdout[-3000:]}")
    records = [json.loads(one) for one in (run / "metrics.jsonl").read_text().splitlines()]
    records = [one for one in records if "loss/total" in one][-RECORDS // 2 :]
    return {
        "images/s": statistics.median(one["throughput/images_per_s"] for one in records),
        "peak GiB": max(one["memory/peak_gib"] for one in records),
        "last loss": records[-1]["loss/total"],
    }


if __name__ == "__main__":
    command(main)
