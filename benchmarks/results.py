"""Where benchmarks write what they saw: <name>.json, and the same as Markdown beside it, in docs/results/."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def write(
    name: str, title: str, part: str, result: dict[str, Any], command: str, *, folder: Path | None = None
) -> None:
    """Replace the section `part` of the results `name`, stamped with command, date, commit, machine.

    In `result`, a value that is a list of dicts becomes a table of its own.
    """
    path = (folder or RESULTS) / f"{name}.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[part] = result | {
        "command": command,
        "date": today(),
        "commit": commit(),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(everything, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(title, everything))


def today() -> str:
    return datetime.date.today().isoformat()


def commit() -> str:
    """What TENFOLD_COMMIT says, for a copy that git knows as another commit; else with + where the tree is changed."""
    if named := os.environ.get("TENFOLD_COMMIT"):
        return named
    git = ["git", "describe", "--always", "--dirty=+"]
    found = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    return "unknown" if found.returncode else found.stdout.strip()


def machine() -> str:
    cores = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, torch {torch.__version__}"
    return f"{cores}; {gpu()}" if torch.cuda.is_available() else f"{cores}, no GPU"


def gpu() -> str:
    """Name, driver and highest clocks."""
    wanted = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem",
        "--format=csv,noheader",
        "--id=0",
    ]
    try:
        facts = subprocess.run(wanted, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts = "nvidia-smi says nothing"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda} (driver, clocks: {facts})"


def markdown(title: str, everything: dict[str, Any]) -> str:
    lines = [f"# {title}", ""]
    for part, result in everything.items():
        tables = {key: value for key, value in result.items() if isinstance(value, list)}
        lines += [f"## {part}", ""]
        for rows in tables.values():
            lines += [*_table(list(rows[0]), [list(row.values()) for row in rows]), ""]
        lines += [*_table(["what", "value"], [[k, v] for k, v in result.items() if k not in tables]), ""]
    return "\n".join(lines)


def _table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [heads, ["---"] * len(heads), *([_shown(value) for value in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
