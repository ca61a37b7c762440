"""What a person reads while it runs: log lines, log.txt, and a progress bar or plain lines, never both."""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from framework.errors import UsageError
from framework.files import refuse_folder_at

LINE_EVERY_S = 30.0

logger = logging.getLogger("tenfold")


@dataclass(frozen=True)
class TrackingConfig:
    """log_every: optimizer steps between two records. pictures: images drawn at each evaluation.

    attention: images of which it is drawn, too, what their most certain query looks at (`attention/<i>`).
    """

    log_every: int = 50
    pictures: int = 4
    attention: int = 0

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise UsageError(f"tracking.log_every is {self.log_every}, expected steps of 1 or more")
        for key in ("pictures", "attention"):
            if getattr(self, key) < 0:
                raise UsageError(f"tracking.{key} is {getattr(self, key)}, expected 0 or more")


class _Console(logging.Handler):
    """Lines on stderr, written around a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as every handler of logging does: a line that cannot be written stops nothing
            self.handleError(record)


def setup_logging(run_dir: str | Path | None, is_main: bool) -> logging.Logger:
    """The logger "tenfold", set up for this process; may be called again.

    The main rank logs from INFO on to stderr, and everything (tracebacks too) to `run_dir`/log.txt where there
    is one. The others say only what is a warning or worse, on stderr with their process id.
    """
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False  # a library that configures the root logger would double every line
    logger.setLevel(logging.DEBUG if is_main else logging.WARNING)
    sender = "" if is_main else f"[process {os.getpid()}] "
    console = _Console()
    console.setLevel(logging.INFO)
    _add(console, f"%(asctime)s {sender}%(message)s", "%H:%M:%S")
    if is_main and run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        _add(
            logging.FileHandler(Path(run_dir) / "log.txt", encoding="utf-8"),
            "%(asctime)s %(levelname)s %(message)s",
        )
    return logger


def _add(handler: logging.Handler, line: str, clock: str | None = None) -> None:
    handler.setFormatter(logging.Formatter(line, clock))
    logger.addHandler(handler)


class PlainProgress:
    """A bar's stand-in where there is no terminal: a line every LINE_EVERY_S seconds and one at the end."""

    def __init__(self, total: int, initial: int, description: str) -> None:
        self.total, self.initial, self.n, self.description = total, initial, initial, description
        self.started = self.last_line = time.monotonic()
        self.values = ""

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.last_line >= LINE_EVERY_S:
            self._line()

    def set_postfix(self, **values: Any) -> None:
        """Values that the next line ends in, like tqdm's."""
        self.values = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())

    def close(self) -> None:
        if self.n > self.initial:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        rate = (self.n - self.initial) / max(self.last_line - self.started, 1e-9)
        left = tqdm.format_interval((self.total - self.n) / rate) if rate > 0 else "?"
        more = f", {self.values}" if self.values else ""
        logger.info("%s: %d/%d, %.2f/s, %s left%s", self.description, self.n, self.total, rate, left, more)

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(total: int, initial: int = 0, description: str = "") -> "tqdm[Any] | PlainProgress":
    """A bar with time left on a terminal, plain lines through the logger otherwise; nothing on quiet ranks.

    Both have update(n), set_postfix(**values), close(), and are context managers.
    """
    if not sys.stderr.isatty():
        return PlainProgress(total, initial, description)
    quiet = not logger.isEnabledFor(logging.INFO)
    return tqdm(total=total, initial=initial, desc=description, disable=quiet, dynamic_ncols=True, file=sys.stderr)


def publish(text: str, result: Any, out: str | Path | None) -> None:
    """A result: text and a line of JSON on stdout, then the JSON in `out` too; on quiet ranks nothing.

    Raises UsageError: `out`, which --out names, is a folder.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    print(text, json.dumps(result), sep="\n", flush=True)  # first: it is there also where `out` cannot be written
    if out is not None:
        refuse_folder_at("--out", out)
        write_json(out, result)


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file as a whole or not at all, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=indent, allow_nan=False)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
