"""Errors that a user can cause, and how a command turns them into one line and an exit code."""

import logging
import sys
from collections.abc import Callable
from typing import NoReturn

FAILED, MISUSED = 1, 2


class UsageError(ValueError):
    """A flag, a configuration key or a folder given by the user cannot be used as asked: exit code 2."""


class InputError(ValueError):
    """A file that was read (image, annotation, shard, checkpoint) is not what it has to be: exit code 1."""


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its code; errors a user can cause become one line on stderr, never a traceback."""
    try:
        code = main() or 0
    except UsageError as error:
        code = _report(error, MISUSED)
    except (InputError, OSError) as error:
        code = _report(error, FAILED)
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    sys.exit(code)


def _report(error: object, code: int) -> int:
    logging.getLogger("tenfold").debug("the error in full", exc_info=True)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
