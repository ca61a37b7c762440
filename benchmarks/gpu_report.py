"""What needs a GPU, in parts of at most 8 minutes, each with its results in docs/results/gpu-<part>.{json,md}.

    make gpu-report [PARTS="op train sides memory stages tests sanitizer convergence"]
                    [PUBLISHED=FOLDER]                  (offline, in your own environment: PYTHON=python3)

A part is some commands, one after the other. A command that fails, or is not done in time, is recorded with what it
printed last and ends its part; the next part starts all the same. TENFOLD_COMMIT names the commit
where git does not know it.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.results import ROOT, write
from framework.errors import FAILED, UsageError, command

PART_S = 480.0  # of all commands of a part
SHOWN_LINES = 15  # of the output of a command that failed
# For the GPUs that are there; does nothing where it is built.
BUILD = ["make", "-s", "build", f"PYTHON={sys.executable}"]
TRAIN_STEP = ["-m", "benchmarks.train_step", "--repeats", "1", "--device", "cuda"]
BASE = "coco_r50_deformable"
PUBLISHED = "{published}"  # what --published says
PARTS = {
    "op": [BUILD, ["-m", "benchmarks.precision", "--device", "cuda"], ["-m", "benchmarks.op_gpu"]],
    "train": [
        BUILD,
        *(
            [*TRAIN_STEP, "--config", f"configs/{config}.yaml", "--batch", batch, "--precision", precision, *sides]
            for config, batch, precision, *sides in (
                (BASE, "2", "fp32"),
                (BASE, "2", "bf16"),
                (BASE, "4", "bf16"),
                ("coco_r50_deformable_two_stage", "4", "bf16"),
            )
        ),
    ],
    "sides": [
        BUILD,
        *(
            [*TRAIN_STEP, "--config", f"configs/{config}.yaml", "--batch", batch, "--precision", "bf16", "--sides", *of]
            for config, batch, *of in (
                *((BASE, batch, "compiled-graphs", "graphs", PUBLISHED) for batch in ("2", "4")),
                (BASE, "2", "engine-compiled-graphs", "engine-graphs", "engine"),
                (BASE, "2", "ops", "products-kept", "recomputed"),
                ("coco_r50_detr", "4", "graphs", "ops"),
            )
        ),
    ],
    "memory": [BUILD, ["-m", "benchmarks.largest_batch"]],
    "stages": [
        BUILD,
        ["-m", "benchmarks.stages", "--jobs", "4"],
        ["-m", "benchmarks.stages", "--jobs", "4", "--graphs"],
    ],
    "tests": [BUILD, ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]],
    "sanitizer": [BUILD, ["-m", "benchmarks.gpu_sanitizer"]],
    # Goes on where the last call was stopped, while runs/ is still there.
    "convergence": [
        BUILD,
        ["-m", "benchmarks.convergence", "--size", "gpu", "--parts", "sweep", "reported", "--minutes", "5", "--record"],
    ],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", metavar="PART", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--published", metavar="FOLDER", help="a checkout of the published code, built")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            raise UsageError(f"--parts {part}: expected some of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise UsageError("no GPU that torch can use: this report is about one; `make bench` measures on the CPU")
    published = ["--published", args.published] if args.published else []
    outcomes = {
        part: run_part(part, [with_published(arguments, published) for arguments in PARTS[part]], PART_S)
        for part in args.parts
    }
    return 0 if all(outcomes.values()) else FAILED


def with_published(arguments: list[str], published: list[str]) -> list[str]:
    return [word for one in arguments for word in (published if one == PUBLISHED else [one])]


def run_part(part: str, commands: list[list[str]], limit_s: float) -> bool:
    """Run the commands until one fails, and record how each ended. True: all of them did what they should."""
    end = time.monotonic() + limit_s
    rows: list[dict[str, Any]] = []
    for arguments in commands:
        rows.append(run_command(arguments, end - time.monotonic()))
        print(f"{part}: {rows[-1]['command']}: {rows[-1]['outcome']} after {rows[-1]['s']} s", flush=True)
        if rows[-1]["outcome"] != "done":
            break
    write(f"gpu-{part}", f"On a GPU: {part}", "commands", {"commands": rows}, f"make gpu-report PARTS={part}")
    return len(rows) == len(commands) and rows[-1]["outcome"] == "done"


def run_command(arguments: list[str], limit_s: float) -> dict[str, Any]:
    """A command of this repository's Python, or make: how it ended, its seconds, its last words where it failed."""
    line = arguments if arguments[0] == "make" else [sys.executable, *arguments]
    environment = (
        {"TENFOLD_CUDA_ARCHS": "native"}
        | os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    )
    started = time.monotonic()
    process = subprocess.Popen(line, cwd=ROOT, env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(limit_s, 1.0))
        outcome = "done" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        kill_all_of(process)
        output, outcome = process.communicate()[0], "not done in time"
    except BaseException:
        kill_all_of(process)
        raise
    lines = output.strip().splitlines()
    kept = lines[-1:] if outcome == "done" else lines[-SHOWN_LINES:]
    seconds = round(time.monotonic() - started, 1)
    return {
        "command": " ".join(line).replace(sys.executable, "python"),
        "outcome": outcome,
        "s": seconds,
        "last words": " / ".join(kept),
    }


def kill_all_of(process: subprocess.Popen[str]) -> None:
    """With its own processes: the next part needs the GPU for itself."""
    os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    command(main)
