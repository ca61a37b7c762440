"""The report's runner; what its parts measure needs a GPU."""

import json

import pytest
import torch

from benchmarks import gpu_report, results
from framework.errors import UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def rows(folder, part):
    return json.loads((folder / f"gpu-{part}.json").read_text())["commands"]["commands"]


def test_a_part_ends_with_the_command_that_fails_and_the_next_one_starts(folder, monkeypatch):
    parts = {"a": [["-c", "print(1)"], ["-c", "raise SystemExit(3)"], ["-c", "print(2)"]], "b": [["-c", "print(5)"]]}
    monkeypatch.setattr(gpu_report, "PARTS", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "machine", lambda: "as if there were a GPU")
    assert gpu_report.main(["--parts", "a", "b"]) == 1
    assert [row["outcome"] for row in rows(folder, "a")] == ["done", "exit code 3"]
    assert [(row["outcome"], row["last words"]) for row in rows(folder, "b")] == [("done", "5")]
    assert gpu_report.main(["--parts", "b"]) == 0


def test_a_command_that_takes_too_long_is_ended(folder):
    slow = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"  # a process of its own too
    assert not gpu_report.run_part("slow", [["-c", slow]], 1.0)
    [row] = rows(folder, "slow")
    assert (row["outcome"], row["last words"]) == ("not done in time", "begun")
    assert row["s"] < 30  # sleep, too, holds the pipe


def test_misuse():
    with pytest.raises(UsageError, match="--parts sums: expected some of op"):
        gpu_report.main(["--parts", "sums"])
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU that torch can use"):
            gpu_report.main(["--parts", "op"])


def test_the_published_code_takes_its_place_in_the_commands():
    asked = [gpu_report.with_published(line, ["--published", "DIR"]) for line in gpu_report.PARTS["sides"]]
    assert sum(line[-2:] == ["--published", "DIR"] for line in asked) == 2
    for line in gpu_report.PARTS["sides"]:
        assert gpu_report.PUBLISHED not in gpu_report.with_published(line, [])
