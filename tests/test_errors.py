"""Exit codes and one-line messages, of real processes: `command` ends the one that calls it."""

import subprocess
import sys

import pytest

from framework.errors import LEFT_ALONE
from tests.paths import REPOSITORY

SCRIPT = """
import atexit, sys
from framework.errors import InputError, UsageError, command
atexit.register(lambda: print("exit handlers ran"))
def main():
    print("some output")
    {body}
command(main)
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT.format(body=body)], capture_output=True, text=True,
                          cwd=REPOSITORY, timeout=60)  # fmt: skip


@pytest.mark.parametrize(
    "body, code, message",
    [
        ("return None", 0, ""),
        ("return 85", 85, ""),
        ("raise UsageError('key: found 1')", 2, "error: key: found 1\n"),
        ("raise InputError('file: damaged')", 1, "error: file: damaged\n"),
        ("open('/not/there')", 1, "error: [Errno 2] No such file or directory: '/not/there'\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
    ],
)
def test_what_a_user_can_cause_is_one_line(body, code, message):
    result = run(body)
    assert (result.returncode, result.stderr) == (code, message)
    assert result.stdout == "some output\nexit handlers ran\n"


@pytest.mark.parametrize(
    "error, said",
    [
        ("RuntimeError('Connection closed by peer')", ""),
        ("type('DistStoreError', (RuntimeError,), dict())()", ""),
        ("type('DistBackendError', (RuntimeError,), dict())('NCCL error: remote process exited')",
         " (NCCL error: remote process exited)"),
    ],
)  # fmt: skip
def test_another_process_has_left_or_never_came(error, said):
    result = run(f"import framework.errors as errors; errors.MAIN_RANK_FIRST_S = 0; raise {error}")
    assert result.returncode == LEFT_ALONE
    assert result.stderr == (f"error: another process of this run has ended, or is not reached{said}; its own message "
                             "says why\n")  # fmt: skip


def test_what_only_we_can_cause_keeps_its_traceback():
    result = run("assert False, 'ours'")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ours" in result.stderr
