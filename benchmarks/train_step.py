"""A training step with the compiled operator and with ops.reference: seconds and peak memory of both in one run.

    python -m benchmarks.train_step [--config FILE] [--repeats N]

One image of 800 x 1066 with 20 boxes; forward, matching, loss, backward and the optimizer, in float32 on the CPU;
frozen batch norm, random weights. Sides take turns, each in a process of its own, and medians are compared.
Writes docs/results/train-step.{json,md}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.results import ROOT, write
from framework import config as configuration
from framework.data.batch import Targets
from framework.engine.optimizer import build_optimizer
from framework.losses.criterion import Criterion
from framework.models.build import build_detector
from framework.tracking.meter import peak_memory_gib

SIZE_HW = (800, 1066)
BOXES = 20
STEPS = 3  # of a process; the first does not count
SIDES = {"compiled": "ops", "reference": "ops.reference"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "coco_r50_deformable_two_stage.yaml")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="one side, in this process; prints JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(steps(args.config)))
        return 0
    runs = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side in SIDES:
            runs[side].append(in_process(side, args.config))
    rows = [{"operator": SIDES[side], **median(runs[side])} for side in SIDES]
    ratios = {f"{key}: how many times less": rows[1][key] / rows[0][key] for key in ("s", "peak GiB")}
    command = f"python -m benchmarks.train_step --config configs/{args.config.name} --repeats {args.repeats}"
    result = {"sides": rows, **ratios, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    part = f"{args.config.stem}, {SIZE_HW[0]} x {SIZE_HW[1]}"
    write("train-step", "A training step on the CPU", part, result, command)
    return 0


def in_process(side: str, config: Path) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--here", "--config", str(config)]
    environment = os.environ | {"TENFOLD_OP": side, "PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def median(runs: list[dict[str, list[float]]]) -> dict[str, float]:
    return {key: statistics.median(number for run in runs for number in run[key]) for key in runs[0]}


def steps(path: Path) -> dict[str, list[float]]:
    """Seconds of each step but the first, and of its parts; peak resident memory of the process."""
    config = configuration.load(path, [])
    torch.manual_seed(0)
    model = build_detector(config.model).train()
    criterion = Criterion(config.loss, config.model.classification)
    optimizer = build_optimizer(model, config.optim, torch.device("cpu"))
    image = torch.randn(1, 3, *SIZE_HW)
    mask = torch.zeros(1, *SIZE_HW, dtype=torch.bool)
    boxes = torch.cat([torch.rand(BOXES, 2) * 0.6 + 0.2, torch.rand(BOXES, 2) * 0.3 + 0.05], dim=1)
    targets = Targets(torch.randint(0, 91, (BOXES,)), boxes, [BOXES], torch.ones(1, dtype=torch.bool))
    seconds: dict[str, list[float]] = {"s": [], "forward s": [], "matching and loss s": [], "backward s": []}
    for _ in range(STEPS):
        started = time.perf_counter()
        predictions = model(image, mask)
        predicted = time.perf_counter()
        loss = criterion.total(criterion(predictions, targets, num_boxes=float(BOXES)))
        compared = time.perf_counter()
        loss.backward()
        done = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        parts = (time.perf_counter() - started, predicted - started, compared - predicted, done - compared)
        for key, part in zip(seconds, parts, strict=True):
            seconds[key].append(part)
    peak_gib = peak_memory_gib(torch.device("cpu"))
    return {key: numbers[1:] for key, numbers in seconds.items()} | {"peak GiB": [peak_gib]}


if __name__ == "__main__":
    sys.exit(main())
