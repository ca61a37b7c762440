"""What a batch script does on its first node before it starts a rank: keeps what was submitted, counts attempts.

    python launch/begin.py FOLDER [--config FILE] [key=value ...]

FOLDER belongs to the job: the first time the code and the resolved configuration are copied there, and a requeued
job runs them, whatever has been changed since. Prints where: the code, the configuration, and the run folder.
Exit code 2: the configuration cannot be used; 1: two starts in a row have brought no new checkpoint.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_tools.sample import read_manifest  # noqa: E402
from framework import config as configuration  # noqa: E402
from framework.config import Config  # noqa: E402
from framework.data.loader import refuse_no_set  # noqa: E402
from framework.data.remote import is_remote  # noqa: E402
from framework.errors import InputError, command  # noqa: E402
from framework.tracking.run_folder import commit_of  # noqa: E402

RUNS_FROM = ("framework", "ops", "data_tools", "launch", "configs")
WITHOUT_PROGRESS = 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch/begin.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)  # --config may come again, after keys
    folder: Path = args.folder
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if folder.exists() and not restarts:  # of an earlier job of this number: SLURM counts anew now and then
        folder.rename(f"{folder}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    if not (folder / "config.yaml").exists():
        keep(folder, args.config, args.overrides)
    config = configuration.load(folder / "config.yaml", [])
    run_dir = Path(str(config.train.run_dir))
    refuse_without_progress(folder / "starts.jsonl", restarts, newest_step(run_dir), run_dir)
    return 0


def keep(folder: Path, config_file: str | None, overrides: list[str]) -> None:
    """The configuration comes last: where it is, all is."""
    config = configuration.load(config_file, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    code = folder / "code"
    shutil.rmtree(code, ignore_errors=True)
    for name in RUNS_FROM:
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    (code / "COMMIT").write_text(commit_of(ROOT) + "\n")
    (folder / "shards.tsv").write_text("".join(f"{key}\t{where}\t{name}\n" for key, where, name in shards(config)))
    unfinished = folder / "config.yaml.tmp"
    configuration.save(config, unfinished)
    os.replace(unfinished, folder / "config.yaml")


def shards(config: Config) -> Iterator[tuple[str, str, str]]:
    """Key, folder, and a name that no other set has, of those that are in folders."""
    for key, where in (("data.train", config.data.train), ("data.val", config.data.val if config.eval.every else None)):
        if where and not is_remote(where):
            refuse_no_set(key, where)
            yield key, where, f"{read_manifest(where).fingerprint[:16]}-{Path(where).name}"


def refuse_without_progress(starts: Path, restart: int, step: int, run_dir: Path) -> None:
    """starts: of this job, a line each, where this one is added."""
    before = [json.loads(line)["step"] for line in starts.read_text().splitlines()] if starts.exists() else []
    with starts.open("a") as file:
        file.write(json.dumps({"restart": restart, "step": step}) + "\n")
    if before[-WITHOUT_PROGRESS:] == WITHOUT_PROGRESS * [step]:
        raise InputError(f"{WITHOUT_PROGRESS} starts of this job in a row have saved nothing after step {step} of "
                         f"{run_dir}; its logs in {starts.parent} say why; mend it and submit again")  # fmt: skip


def newest_step(run_dir: Path) -> int:
    """Of the checkpoints, whole ones or not; 0 without."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


if __name__ == "__main__":
    command(main)
