"""Errors that a user can cause, and how a command turns them into one line and an exit code."""

import atexit
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

FAILED, MISUSED, LEFT_ALONE = 1, 2, 87  # the last: another process has ended; like 85 and 86, start again
MAIN_RANK_FIRST_S = 3.0
PEER_HAS_LEFT = ("onnection closed by peer", "onnection reset by peer", "roken pipe")  # gloo's words
PEER_IS_AWAY = ("DistStoreError", "DistNetworkError", "DistBackendError")  # torch's, the last of them of nccl


class UsageError(ValueError):
    """A flag, a configuration key or a folder given by the user cannot be used as asked: exit code 2."""


class InputError(ValueError):
    """A file that was read (image, annotation, shard, checkpoint) is not what it has to be: exit code 1."""


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its code; errors a user can cause become one line on stderr, never a traceback.

    An error that all processes of a run meet is told once: the others wait, and the launcher ends them when the
    first one has left. What only one of them met, it tells a little later.
    """
    try:
        code = main() or 0
    except UsageError as error:
        code = _report(error, MISUSED)
    except (InputError, OSError) as error:
        code = _report(error, FAILED)
    except RuntimeError as error:
        left = any(words in str(error) for words in PEER_HAS_LEFT)
        if not left and type(error).__name__ not in PEER_IS_AWAY:
            raise
        said = "" if left else f" ({str(error).splitlines()[0]})" if str(error) else ""
        code = _report(f"another process of this run has ended, or is not reached{said}; its own message says why",
                       LEFT_ALONE)  # fmt: skip
        time.sleep(2 * MAIN_RANK_FIRST_S)
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process once everything registered for its exit is done, but without Python's own teardown.

    During that teardown a process with gloo's threads was now and then aborted ("terminate called without an active
    exception"), with its work done: a thread that asks for the interpreter then is ended by force. Threads that
    still have work to do have to be joined before, or by a function registered with atexit.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _report(error: object, code: int) -> int:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(MAIN_RANK_FIRST_S)
    logging.getLogger("tenfold").debug("error: %s", error, exc_info=True)  # the traceback, in log.txt
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
