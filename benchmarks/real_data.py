"""The whole way on real photographs: convert, check, train at published sizes with R50, resume, evaluate, overfit.

    python -m benchmarks.real_data [--parts coco_open aquarium two_stage detr overfit] [--work DIR]

coco_open, aquarium: 20 steps of the base recipe (800 px, two processes on the CPU, micro-batch 1) in two sessions of
10, the second resumed from the first; group norm, since an ImageNet file cannot be downloaded here;
precision auto, which is bf16 where the CPU has instructions for it. two_stage, detr: 20 steps of these recipes on the
first 4 images of coco_open, all of them in every step, short side 480, so that the loss has to fall. overfit: a small
model on the first 8 images of aquarium, to AP50 of at least 0.95. Each part replaces its own section of
docs/results/real-data.{json,md}. The images are read through TENFOLD_DATA.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, write

DATA = Path(os.environ.get("TENFOLD_DATA", ROOT.parent / "shared" / "data"))

BASE = ["model.backbone.norm=group", "model.backbone.weights=null", "engine.activation_checkpointing=true",
        "train.global_batch=2", "train.micro_batch=1", "tracking.log_every=1", "data.workers=0"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real-data", help="folder for shards and runs")
    args = parser.parse_args()
    for part in args.parts:
        command = f"python -m benchmarks.real_data --parts {part}"
        write("real-data", "Real photographs, the whole way", part, PARTS[part](args.work), command)
    return 0


def twenty_steps(name: str, work: Path) -> dict[str, Any]:
    shards, run = work / name / "shards", work / name / "run"
    timings = {"convert": convert(DATA / name, shards), "check": python("-m", "data_tools.check", str(shards))}
    overrides = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"train.run_dir={run}", *BASE]
    if name == "aquarium":
        overrides += ["model.num_classes=null", "data.labels=contiguous"]
    shutil.rmtree(run, ignore_errors=True)  # or a finished run would be resumed, and its times be none
    timings["10 steps"] = train("coco_r50_deformable.yaml", "train.max_steps=10", "eval.every=0", *overrides)
    timings["10 more, resumed, and evaluation"] = train(
        "coco_r50_deformable.yaml", "train.max_steps=20", "eval.every=1", *overrides
    )
    return {"timings_s": timings, **summary(run)}


def same_images(config: str, work: Path) -> dict[str, Any]:
    """Does the loss of a recipe fall over 20 steps on the same photographs?"""
    shards, run = work / "coco_open4" / "shards", work / config
    timings = {"convert": convert_first("coco_open", 4, work / "coco_open4")}
    shutil.rmtree(run, ignore_errors=True)
    timings["20 steps"] = train(
        f"{config}.yaml", f"data.train={shards / 'train'}", f"train.run_dir={run}", *BASE, "train.global_batch=4",
        "train.max_steps=20", "optim.backbone_lr_scale=1.0", "eval.every=0", "data.sizes=[480]", "data.max_size=800",
        "data.crop_resize=[]",
    )  # fmt: skip
    return {"config": config, "timings_s": timings, **summary(run)}


def overfit(work: Path) -> dict[str, Any]:
    """The training images are the validation images: can the whole chain learn what it is shown?"""
    shards, run = work / "aquarium8" / "shards", work / "overfit"
    timings = {"convert": convert_first("aquarium", 8, work / "aquarium8")}
    shutil.rmtree(run, ignore_errors=True)
    timings["training and evaluations"] = train(
        "overfit.yaml", f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"train.run_dir={run}"
    )
    return {"timings_s": timings, **summary(run)}


def convert_first(name: str, count: int, folder: Path) -> float:
    """Shards of a set's first training images, for training and for validation."""
    annotations = first_images(DATA / name / "annotations" / "instances_train.json", count)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations))
    return convert(folder, folder / "shards", DATA / name / "images")


def first_images(path: Path, count: int) -> dict[str, Any]:
    annotations = json.loads(path.read_text())
    images = sorted(annotations["images"], key=lambda image: image["file_name"])[:count]
    ids = {image["id"] for image in images}
    kept = [a for a in annotations["annotations"] if a["image_id"] in ids]
    return {"images": images, "annotations": kept, "categories": annotations["categories"]}


def convert(source: Path, shards: Path, images: Path | None = None) -> float:
    return python("-m", "data_tools.convert", "--images", str(images or source / "images"),
                  "--annotations", str(source / "annotations"), "--out", str(shards))  # fmt: skip


def train(config: str, *overrides: str) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return python("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port),
                  "framework/train.py", "--config", f"configs/{config}", *overrides)  # fmt: skip


def python(*arguments: str) -> float:
    """Run a command of this repository and return its seconds; ends here when it fails."""
    print("$ python", *arguments, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    started = time.monotonic()
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(f"exit code {code} of: python {' '.join(arguments)}")
    return round(time.monotonic() - started, 1)


def summary(run: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss/total" in r]
    evaluations = sorted((run / "evaluation").glob("*.json"))
    last = json.loads(evaluations[-1].read_text()) if evaluations else {}
    shown = [steps[i] for i in sorted({0, len(steps) // 4, len(steps) // 2, 3 * len(steps) // 4, len(steps) - 1})]
    return {
        "steps": steps[-1]["step"],
        "loss": {str(r["step"]): round(r["loss/total"], 3) for r in shown},
        "images_per_s": sorted(r["throughput/images_per_s"] for r in steps)[len(steps) // 2],
        "peak_gib_per_process": max(r["memory/peak_gib"] for r in steps),
    } | {name: last[name] for name in ("AP", "AP50") if name in last}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "coco_open": partial(twenty_steps, "coco_open"),
    "aquarium": partial(twenty_steps, "aquarium"),
    "two_stage": partial(same_images, "coco_r50_deformable_two_stage"),
    "detr": partial(same_images, "coco_r50_detr"),
    "overfit": overfit,
}


if __name__ == "__main__":
    sys.exit(main())
