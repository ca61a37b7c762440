"""64 to 4096 GPUs, by arithmetic from constants measured here: what start-up, checkpoints and gradients ask for.

    python -m benchmarks.scale

Simulated: no such cluster was used. Measured on this machine: what one rank reads to start (strace), how fast the
store answers that ranks meet at; and, from framework.plan, the traffic of a step and the assignment of images.
Writes docs/results/scale.{json,md}.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks import results
from framework import plan

CONFIG = "configs/coco_r50_deformable_two_stage.yaml"
IMAGES = 118_287  # COCO train2017
WORLDS = (64, 256, 1024, 4096)
PER_NODE = 8
FABRIC_GBS = (12.5, 50.0)  # of each GPU: 100 and 400 Gbit/s
FILE_SYSTEM_GBS = 10.0  # of all nodes together
MEETING = {"every rank": 9, "rank 0, for each rank": 2}  # operations of Preflight.meet on the store


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = start_of_a_rank()
    answers = store_answers_per_s()
    rows = [row_of(world, started, answers) for world in WORLDS]
    constants = {
        "a rank opens files at its start": started["opens"], "and reads, MiB": started["read_mib"],
        "the store answers per second": round(answers), "file system, GB/s (assumed)": FILE_SYSTEM_GBS,
        "fabric of each GPU, GB/s (assumed)": " and ".join(map(str, FABRIC_GBS)),
    }  # fmt: skip
    print(json.dumps(constants, indent=1))
    for row in rows:
        print(json.dumps(row))
    results.write("scale", "From 64 GPUs to 4096, by arithmetic", "scale", constants | {"worlds": rows},
                  "python -m benchmarks.scale")  # fmt: skip


def start_of_a_rank() -> dict[str, Any]:
    """Files opened and bytes read until the trainer's --help, which imports all that training does."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace")
        command = ["strace", "-f", "-e", "trace=openat,read,pread64,mmap", "-e", "status=successful", "-y", "-o",
                   str(trace), sys.executable, "-c", "import framework.train, torch._dynamo"]  # fmt: skip
        subprocess.run(command, cwd=results.ROOT, check=True, capture_output=True)
        opened, read, mapped = 0, 0, set()
        for line in trace.read_text(errors="replace").splitlines():
            if re.search(r" openat\(.*O_RDONLY.* = \d+</[^>]*>", line) and "</proc" not in line and "</sys" not in line:
                opened += 1
            if found := re.search(r" (?:read|pread64)\(\d+<(/[^>]*)>.* = (\d+)$", line):
                read += 0 if found[1].startswith(("/proc", "/sys", "/dev")) else int(found[2])
            if found := re.search(r" mmap\(.*PROT_EXEC.*\d+<(/[^>]*)>", line):
                mapped.add(found[1])
    libraries = sum(os.stat(path).st_size for path in mapped if os.path.exists(path))
    return {"opens": opened, "read_mib": round((read + libraries) / 2**20)}


def store_answers_per_s(clients: int = 2000) -> float:
    """Of the store of one rank 0, to set and get of 400 bytes."""
    store = dist.TCPStore("127.0.0.1", 0, 1, True, datetime.timedelta(seconds=30), wait_for_workers=False)
    began = time.perf_counter()
    for number in range(clients):
        store.set(str(number), "x" * 400)
        store.get(str(number))
    return 2 * clients / (time.perf_counter() - began)


def row_of(world: int, started: dict[str, Any], answers_per_s: float) -> dict[str, Any]:
    planned = plan_of(world)
    (stage,) = (one for one in planned["stages"] if one["configured"])
    gradients = sum(one["sent"] for one in stage["traffic"])
    nodes, checkpoint = world // PER_NODE, 3 * 4 * planned["parameters"]
    asked = MEETING["every rank"] * world + MEETING["rank 0, for each rank"] * world
    return {
        "GPUs": world,
        "files opened, thousands": round(world * started["opens"] / 1000),
        "read, once a node, GiB": round(nodes * started["read_mib"] / 1024, 1),
        "that takes, s": round(nodes * started["read_mib"] * 2**20 / FILE_SYSTEM_GBS / 1e9, 1),
        "meeting, s": round(asked / answers_per_s, 2),
        "checkpoint, MiB": round(checkpoint / 2**20),
        "sent by a GPU in a step, MiB": round(gradients / 2**20),
        **{f"at {rate} GB/s, ms": round(1000 * gradients / rate / 1e9, 1) for rate in FABRIC_GBS},
        "batch": planned["batch"]["global_batch"],
        "steps an epoch": planned["epochs"]["steps_per_epoch"],
        "images left out": planned["assignment"]["left_out"],
        "ranks without the same number of images": len(planned["assignment"]["faults"]),
    }


def plan_of(world: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "plan.json")
        with contextlib.redirect_stdout(io.StringIO()):
            plan.main(["--config", CONFIG, "--nodes", str(world // PER_NODE), "--gpus-per-node", str(PER_NODE),
                       "--images", str(IMAGES), "--out", str(out), f"train.global_batch={2 * world}",
                       "model.backbone.weights=none.pth"])  # fmt: skip
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
