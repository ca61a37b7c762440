"""Memory that a process frees."""

import ctypes
import subprocess
import sys

import pytest

TWICE = """
import resource
from framework.processes import keep_freed_memory
{}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(first: str) -> int:
    return int(subprocess.check_output([sys.executable, "-c", TWICE.format(first)]))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no mallopt: not glibc")
def test_freed_memory_is_used_again():
    given_back, kept = faults(""), faults("keep_freed_memory()")
    assert kept < 8 <= given_back  # at least one page of 2 MiB, or thousands of 4 KiB, each time


FORKED = """
import os, re
from framework.processes import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
bytes(bytearray(2**27))
{}
if os.fork() == 0:
    print(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read()).group(1), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no mallopt: not glibc")
def test_processes_that_are_forked_do_not_hold_it():
    held, given_back = (
        int(subprocess.check_output([sys.executable, "-c", FORKED.format(first)])) / 2**10
        for first in ("", "give_back_freed_memory()")
    )
    assert held > 128 > given_back  # MiB, of which 256 had been freed
