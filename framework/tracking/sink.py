"""Where numbers and pictures go: to TensorBoard's event files and metrics.jsonl, on other ranks nowhere."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from framework.tracking.console import write_json


class Sink(Protocol):
    """scalars: name -> number, written under these names; what is not finite becomes NaN (in JSON null).

    picture: `draw` gives uint8 RGB (H, W, 3), or None for no picture, and is called only where pictures are kept.
    document: JSON in the run folder, like evaluation/step-00000100.json.
    """

    def scalars(self, values: Mapping[str, float], step: int, epoch: float) -> None: ...

    def picture(self, tag: str, draw: Callable[[], np.ndarray | None], step: int) -> None: ...

    def document(self, name: str, content: Any) -> None: ...

    def close(self) -> None: ...


class NullSink:
    """The sink of the ranks that record nothing."""

    def scalars(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        pass

    def picture(self, tag: str, draw: Callable[[], np.ndarray | None], step: int) -> None:
        pass

    def document(self, name: str, content: Any) -> None:
        pass

    def close(self) -> None:
        pass


class FileSink:
    """TensorBoard events under `tensorboard/` and one JSON line for each call of `scalars` in metrics.jsonl.

    Both are flushed at each call: a process that is killed after a checkpoint has lost no point before it.
    refuse: raises when this run may not write any more.
    """

    def __init__(self, run_dir: Path, resume_step: int, refuse: Callable[[], None] = lambda: None) -> None:
        self.run_dir, self.refuse = run_dir, refuse
        refuse()
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_later_lines(run_dir / "metrics.jsonl", resume_step)
        for document in (run_dir / "evaluation").glob("step-*.json"):
            if int(document.stem.removeprefix("step-")) > resume_step:
                document.unlink()
        self.events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
        self.lines = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 closed by close()

    def scalars(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        self.refuse()
        numbers = {name: float(value) for name, value in values.items()}
        for name, value in (numbers | {"epoch": float(epoch)}).items():
            self.events.add_scalar(name, value if math.isfinite(value) else math.nan, step)
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.lines.write(json.dumps(line | {"step": step, "epoch": epoch, "time": time.time()}) + "\n")
        self.lines.flush()
        self.events.flush()

    def picture(self, tag: str, draw: Callable[[], np.ndarray | None], step: int) -> None:
        image_HW3 = draw()
        if image_HW3 is not None:
            self.events.add_image(tag, image_HW3, step, dataformats="HWC")

    def document(self, name: str, content: Any) -> None:
        self.refuse()
        write_json(self.run_dir / name, content)

    def close(self) -> None:
        self.events.close()
        self.lines.close()


def open_sink(
    run_dir: str | Path, is_main: bool, resume_step: int | None = None, refuse: Callable[[], None] = lambda: None
) -> Sink:
    """The sink of this rank. What an earlier attempt wrote after `resume_step` is forgotten.

    None: the run starts; all that an attempt without a checkpoint may have left is forgotten.
    """
    return FileSink(Path(run_dir), resume_step or 0, refuse) if is_main else NullSink()


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that a killed process left unfinished is passed over."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _drop_later_lines(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_lines(path) if record.get("step", 0) <= step]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, path)
