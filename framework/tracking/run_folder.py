"""The folder of a run: the configuration it was started with, where and with what it runs, its evaluations."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from framework import config as configuration
from framework.config import Config
from framework.data.order import DataState
from framework.engine import checkpoint
from framework.engine.ranks import Ranks
from framework.errors import UsageError
from framework.tracking.console import write_json

CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"

# What may differ when a run goes on: how it computes and reports, not what it computes.
FREE_KEYS = (
    "train.run_dir", "train.resume", "train.max_steps", "train.checkpoint_every", "train.keep_checkpoints",
    "train.keep_best", "train.keep_every_epochs", "train.meet_minutes", "train.hang_minutes", "train.rehearse",
    "data.workers", "data.train", "data.val", "data.cache", "data.max_bad", "engine.", "guard.max_skipped",
    "eval.every", "tracking.",
)  # fmt: skip


def refuse_other_run(config: Config, data_state: DataState, last: Path | None) -> None:
    """Raises UsageError when the run folder holds a checkpoint, `last`, that this run would not have made.

    It is of another configuration (names the keys), of other data, or not wanted (train.resume=false). A folder
    without a checkpoint holds nothing that a fresh start could lose.
    """
    folder, how = Path(str(config.train.run_dir)), "expected the same, or another train.run_dir"
    if last is None:
        return
    if not config.train.resume:
        raise UsageError(f"train.resume, train.run_dir: found false, and {last}; set train.resume=true or another "
                         "train.run_dir")  # fmt: skip
    differing = different_keys(configuration.load(folder / CONFIG_FILE, []), config)
    if differing:
        raise UsageError(f"train.run_dir: {folder} holds a run of another configuration: {'; '.join(differing)}; {how}")
    found = checkpoint.read_state(last)["data"]["fingerprint"]
    if found != data_state.fingerprint:
        raise UsageError(f"data.train: {config.data.train} has fingerprint {data_state.fingerprint}, the run in "
                         f"{folder} was trained on {found}; {how}")  # fmt: skip


def record_run(config: Config, ranks: Ranks, facts: dict[str, Any]) -> None:
    """Write the configuration and the environment, with `facts`; collective, so that all have read before."""
    ranks.barrier()
    if ranks.is_main:
        folder = Path(str(config.train.run_dir))
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{CONFIG_FILE}.tmp"
        configuration.save(config, unfinished)
        os.replace(unfinished, folder / CONFIG_FILE)
        write_json(folder / ENVIRONMENT_FILE, describe_environment(ranks) | facts)


def different_keys(stored: Config, wanted: Config) -> list[str]:
    """'key: stored -> wanted' for every key that makes it another run."""
    before, after = configuration.flatten(stored), configuration.flatten(wanted)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in after
        if before[key] != after[key] and not key.startswith(FREE_KEYS)
    ]


def evaluation_name(step: int) -> str:
    return f"evaluation/step-{step:08d}.json"


def best_evaluation(run_dir: str | Path) -> tuple[int, float] | None:
    """Step and AP of the best evaluation that the run has recorded, the first of equal ones."""
    documents = [json.loads(path.read_bytes()) for path in sorted(Path(run_dir, "evaluation").glob("step-*.json"))]
    best = max(documents, key=lambda one: one["AP"], default=None)
    return (best["step"], best["AP"]) if best else None


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    packages = ("torch", "deepspeed", "webdataset", "pycocotools", "omegaconf", "numpy")
    cuda = ranks.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": code_version(),
        "world": ranks.world,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else f"CPU, {len(os.sched_getaffinity(0))} cores",
    }


def code_version() -> str:
    """The commit of the source this runs from, with + where it was changed since, and a hash of what it is.

    A copy of the source has the commit in a file COMMIT.
    """
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("framework/**/*.py"), *root.glob("ops/**/*.py"), *root.glob("data_tools/*.py")]):
        digest.update(path.read_bytes())
    return f"{commit_of(root)}, sources {digest.hexdigest()[:12]}"


def commit_of(root: Path) -> str:
    named = root / "COMMIT"
    if named.exists():
        return named.read_text().strip()
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown commit"
