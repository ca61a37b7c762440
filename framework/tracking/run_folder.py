"""The folder of a run: the configuration it was started with, and where and with what it runs."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from framework import config as configuration
from framework.config import Config
from framework.engine.ranks import Ranks
from framework.errors import UsageError
from framework.tracking.console import write_json

CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"

# What may differ when a run goes on: how it computes and reports, not what it computes.
FREE_KEYS = ("train.run_dir", "train.resume", "train.max_steps", "train.checkpoint_every", "train.keep_checkpoints",
             "data.workers", "data.train", "data.val", "engine.", "eval.every", "tracking.")  # fmt: skip


def open_run(config: Config, ranks: Ranks, facts: dict[str, Any]) -> None:
    """Make the run folder, or check that it is this run's; collective. `facts` are added to environment.json.

    Raises UsageError: the folder holds a run of another configuration; names the keys that differ.
    """
    folder = Path(str(config.train.run_dir))
    stored = folder / CONFIG_FILE
    if stored.exists():
        differing = different_keys(configuration.load(stored, []), config)
        if differing:
            raise UsageError(
                f"train.run_dir: {folder} holds a run of another configuration: {'; '.join(differing)}; "
                "expected the same, or another train.run_dir"
            )
    ranks.barrier()  # everybody has read before the main rank writes
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = stored.with_suffix(".tmp")
        configuration.save(config, unfinished)
        os.replace(unfinished, stored)
        write_json(folder / ENVIRONMENT_FILE, describe_environment(ranks) | facts)


def different_keys(stored: Config, wanted: Config) -> list[str]:
    """'key: stored -> wanted' for every key that makes it another run."""
    before, after = configuration.flatten(stored), configuration.flatten(wanted)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in after
        if before[key] != after[key] and not key.startswith(FREE_KEYS)
    ]


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    packages = ("torch", "deepspeed", "webdataset", "pycocotools", "omegaconf", "numpy")
    cuda = ranks.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _git_commit(),
        "world": ranks.world,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else f"CPU, {len(os.sched_getaffinity(0))} cores",
    }


def _git_commit() -> str | None:
    """The commit of the source this runs from, with + where it was changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
