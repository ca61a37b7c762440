"""A training step with the compiled operator and with ops.reference: seconds and peak memory of both in one run.

    python -m benchmarks.train_step [--config FILE] [--repeats N] [--device cuda --batch B --precision bf16]

Images of 800 x 1066 with 20 boxes each; forward, matching, loss, backward and the optimizer; frozen batch norm, random
weights. Sides take turns, each in a process of its own, and medians are compared. On a GPU every part is waited for,
which the trainer does not do: `s` is of steps in a row, without.
--profile FILE: what the GPU or CPU did in one step of the first side, by operator.
Writes docs/results/train-step.{json,md}, on a GPU gpu-train-step.{json,md}.
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
from framework.engine.ds_config import EngineConfig, autocast
from framework.engine.optimizer import build_optimizer
from framework.losses.criterion import Criterion
from framework.models.build import build_detector
from framework.tracking.meter import peak_memory_gib

SIZE_HW = (800, 1066)
BOXES = 20
STEPS = {"cpu": 3, "cuda": 12}  # of a process; the first quarter does not count
SIDES = {"compiled": "ops", "reference": "ops.reference"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    two_stage = ROOT / "configs" / "coco_r50_deformable_two_stage.yaml"
    parser.add_argument("--config", type=Path, default=two_stage)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=STEPS, default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--profile", type=Path, help="of one step; a text file")
    parser.add_argument("--here", action="store_true", help="one side, in this process; prints JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(steps(args.config, torch.device(args.device), args.batch, args.precision, args.profile)))
        return 0
    runs = {side: [] for side in SIDES}
    for i in range(args.repeats):
        for side in SIDES:
            runs[side].append(in_process(side, args, profile=args.profile if i == 0 else None))
            print(f"{args.config.stem}, {args.precision}, batch {args.batch}, {side}: {median(runs[side])}", flush=True)
    rows = [{"operator": SIDES[side], **median(runs[side])} for side in SIDES]
    ratios = {f"{key}: how many times less": rows[1][key] / rows[0][key] for key in ("s", "peak GiB")}
    result = {"sides": rows, **ratios, "images/s": args.batch / rows[0]["s"]}
    command = f"python -m benchmarks.train_step --config configs/{args.config.name} --repeats {args.repeats}"
    part = f"{args.config.stem}, {SIZE_HW[0]} x {SIZE_HW[1]}"
    usual = [parser.get_default(name) for name in ("device", "batch", "precision")]
    if [args.device, args.batch, args.precision] != usual:
        part, command = f"{part}, {args.precision}, batch {args.batch}", " ".join([command, *settings(args)])
    if args.device == "cpu":
        result |= {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        write("train-step", "A training step on the CPU", part, result, command)
    else:
        write("gpu-train-step", "A training step on a GPU", part, result, command)
    return 0


def settings(args: argparse.Namespace) -> list[str]:
    return ["--device", args.device, "--batch", str(args.batch), "--precision", args.precision]


def in_process(side: str, args: argparse.Namespace, profile: Path | None) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--here", "--config", str(args.config), *settings(args)]
    if profile and side == "compiled":
        command += ["--profile", str(profile)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TENFOLD_OP": side, "PYTHONPATH": path}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def median(runs: list[dict[str, list[float]]]) -> dict[str, float]:
    return {key: statistics.median(number for run in runs for number in run[key]) for key in runs[0]}


def steps(path: Path, device: torch.device, batch: int, precision: str, profile: Path | None) -> dict[str, list[float]]:
    """Seconds of steps, and of their parts; peak memory of the device, on a CPU of the process."""
    config = configuration.load(path, [])
    torch.manual_seed(0)
    model = build_detector(config.model).train().to(device)
    criterion = Criterion(config.loss, config.model.classification)
    optimizer = build_optimizer(model, config.optim, device)
    engine = EngineConfig(precision=precision)
    image = torch.randn(batch, 3, *SIZE_HW, device=device)
    mask = torch.zeros(batch, *SIZE_HW, dtype=torch.bool, device=device)
    boxes = torch.cat([torch.rand(batch * BOXES, 2) * 0.6 + 0.2, torch.rand(batch * BOXES, 2) * 0.3 + 0.05], dim=1)
    labels = torch.randint(0, 91, (batch * BOXES,))
    targets = Targets(labels, boxes, [BOXES] * batch, torch.ones(batch, dtype=torch.bool)).to(device)

    def step(clock) -> list[float]:
        times = [clock()]
        with autocast(engine, device):
            predictions = model(image, mask)
        times.append(clock())
        loss = criterion.total(criterion(predictions, targets, num_boxes=float(batch * BOXES)))
        times.append(clock())
        loss.backward()
        times.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        return [*times, clock()]

    def waited() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    count = STEPS[device.type]
    warm = max(count // 4, 1)
    parts = [step(waited) for _ in range(count)][warm:]
    names = ("forward s", "matching and loss s", "backward s", "optimizer s")
    seconds = {name: [times[i + 1] - times[i] for times in parts] for i, name in enumerate(names)}
    if device.type == "cuda":
        began = waited()
        for _ in range(count):
            step(time.perf_counter)
        whole = [(waited() - began) / count]
    else:
        whole = [times[-1] - times[0] for times in parts]
    peak_gib = peak_memory_gib(device)  # before a profiler takes some
    if profile:
        with torch.profiler.profile() as trace:
            step(waited)
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
        profile.write_text(table + "\n")
    return {"s": whole} | seconds | {"peak GiB": [peak_gib]}


if __name__ == "__main__":
    sys.exit(main())
