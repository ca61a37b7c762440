"""What processes of one command owe each other."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def die_with_parent(parent: int) -> None:
    """From now on this process is killed when the thread of `parent`, a process id, that forked it ends, however that
    ends. Linux; elsewhere it does nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)
