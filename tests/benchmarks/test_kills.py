"""A run that is killed goes on to the same numbers: the benchmark of 200 kills, in short."""

import json
import shutil
import subprocess
import sys

import pytest

from benchmarks.kills import Call, calls_of
from tests.paths import REPOSITORY


def run(*options: str) -> dict[str, dict]:
    """What the benchmark found, by part; fails with what it said when a run did not go on as it should."""
    command = [sys.executable, "-m", "benchmarks.kills", *options]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = [line.partition(" ") for line in result.stdout.splitlines()]
    return {part: json.loads(rest) for part, _, rest in found if part in ("random", "commit")}


def test_random_kills():
    found = run("--parts", "random", "--kills", "4", "--lanes", "2", "--seed", "3")["random"]
    assert (found["kills"], found["faults"]) == (4, 0)
    assert found["starts that resumed"] >= 1 and found["runs finished"] >= 2


def test_kills_within_a_commit():
    if shutil.which("strace") is None:
        pytest.skip("strace is not on this machine (a Debian package), and nothing else kills at a system call")
    found = run("--parts", "commit", "--calls", "3", "--lanes", "3")["commit"]
    assert (found["kills"], found["faults"]) == (3, 0)
    assert [row["call"] for row in found["the calls, killed before each"]][::2] == ["mkdir", "rmdir"]
    assert (found["went on from the older one"], found["from the newer one"]) == (2, 1)


def test_calls_are_counted_by_name_and_only_those_that_change_a_checkpoint():
    trace = """\
openat(AT_FDCWD</x>, "/r/checkpoints/step-00000004.tmp/.tmpQF", O_RDWR|O_CREAT, 0600) = 3</r/checkpoints/.tmpQF>
write(2</r/log.txt>, ""..., 78) = 78
write(3</r/checkpoints/step-00000004.tmp/.tmpQF>, ""..., 9) = 9
openat(AT_FDCWD</x>, "/r/checkpoints/step-00000004.tmp/state.json", O_RDONLY) = 3</r/checkpoints/state.json>
rename("/r/checkpoints/step-00000004.tmp", "/r/checkpoints/step-00000004") = 0
unlinkat(3</r/checkpoints/step-00000002>, "state.json", 0 <unfinished ...>) = ?
+++ killed by SIGKILL +++"""
    assert list(calls_of(trace)) == [
        Call("openat", 1, "step-00000004.tmp/.tmp"), Call("write", 2, "step-00000004.tmp/.tmp"),
        Call("rename", 1, "step-00000004.tmp -> step-00000004"), Call("unlinkat", 1, "step-00000002/state.json"),
    ]  # fmt: skip
