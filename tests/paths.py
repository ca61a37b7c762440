"""Where tests find what the repository does not hold; absent things are skipped with the reason."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY.parent / "shared" / "reference"
DATA = Path(os.environ.get("TENFOLD_DATA", REPOSITORY.parent / "shared" / "data"))


def reference_file(name: str) -> Path:
    return _existing(REFERENCE / name, "numbers of the published code")


def data_folder(name: str) -> Path:
    return _existing(DATA / name, "a real data set; set TENFOLD_DATA")


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not here ({what})")
    return path
