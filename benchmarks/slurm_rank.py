"""A `python` for the jobs of benchmarks.slurm: the same trainer, which also writes down what it did.

For each step of each rank a line in $TENFOLD_TRACE/<restart>-<rank>.jsonl: the step, the image ids; for each checkpoint
that became one, the step and the time; and when the parts of the start were done. TENFOLD_PACE: seconds that each step
of the first start takes longer, and TENFOLD_SAVE_PACE each checkpoint, so that a fault can be put inside.
"""

import functools
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.time()


def main() -> None:
    script = sys.argv[1]
    if Path(script).name == "train.py":
        record()
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")


def record() -> None:
    import framework.train  # noqa: F401 what takes long
    from framework.engine import step as steps
    from framework.engine.checkpoint import Checkpoints
    from framework.engine.preflight import Preflight

    restart, rank = os.environ.get("SLURM_RESTART_COUNT") or "0", os.environ["SLURM_PROCID"]
    file = open(Path(os.environ["TENFOLD_TRACE"], f"{restart}-{rank}.jsonl"), "a", buffering=1)  # noqa: SIM115
    pace_s, save_pace_s = (float(os.environ[key]) for key in ("TENFOLD_PACE", "TENFOLD_SAVE_PACE"))
    if restart != "0":
        pace_s = 0.0
    train_step, write = steps.train_step, Checkpoints._write

    def done(what: str, at: float) -> None:
        file.write(json.dumps({"done": what, "time": at}) + "\n")

    def recorded(what: str, function: Any) -> Any:
        def call(*args: Any, **rest: Any) -> None:
            function(*args, **rest)
            done(what, time.time())

        return call

    done("python begins", STARTED)
    done("imports", time.time())
    Preflight.meet = recorded("ranks met", Preflight.meet)  # type: ignore[method-assign]
    Preflight.reduce = recorded("group and all-reduce", Preflight.reduce)  # type: ignore[method-assign]
    first = [True]

    @functools.wraps(train_step)
    def recorded_step(engine: Any, criterion: Any, micro_batches: Any, **rest: Any) -> Any:
        time.sleep(pace_s)
        result = train_step(engine, criterion, micro_batches, **rest)
        ids = [image_id for batch in micro_batches for image_id in batch.image_ids]
        file.write(json.dumps({"step": rest["step"] + 1, "ids": ids}) + "\n")
        if first and first.pop():
            done("model, engine and first step", time.time())
        return result

    def recorded_write(self: Checkpoints, state: dict[str, Any], *rest: Any) -> None:
        refuse = self.refuse

        def late() -> None:
            time.sleep(save_pace_s)
            refuse()

        self.refuse = late
        write(self, state, *rest)
        self.refuse = refuse
        if self.failure is None:
            file.write(json.dumps({"saved": state["step"], "time": time.time()}) + "\n")

    steps.train_step, Checkpoints._write = recorded_step, recorded_write


if __name__ == "__main__":
    main()
