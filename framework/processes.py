"""What processes of one command owe each other."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def die_with_parent() -> None:
    """From now on this process is killed when the one that started it ends, however that ends. Linux; elsewhere it
    does nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
