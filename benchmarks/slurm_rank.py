"""A `python` for the jobs of benchmarks.slurm: the same trainer, which also writes down what it did.

For each step of each rank a line in $TENFOLD_TRACE/<restart>-<rank>.jsonl: the step, the image ids; for each checkpoint
that became one, the step and the time. TENFOLD_PACE: seconds that each step of the first start takes longer, and
TENFOLD_SAVE_PACE each checkpoint, so that a fault can be put inside.
"""

import functools
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    script = sys.argv[1]
    if Path(script).name == "train.py":
        record()
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")


def record() -> None:
    from framework.engine import step as steps
    from framework.engine.checkpoint import Checkpoints

    restart, rank = os.environ.get("SLURM_RESTART_COUNT") or "0", os.environ["SLURM_PROCID"]
    file = open(Path(os.environ["TENFOLD_TRACE"], f"{restart}-{rank}.jsonl"), "a", buffering=1)  # noqa: SIM115
    pace_s, save_pace_s = (float(os.environ[key]) for key in ("TENFOLD_PACE", "TENFOLD_SAVE_PACE"))
    if restart != "0":
        pace_s = 0.0
    train_step, write = steps.train_step, Checkpoints._write

    @functools.wraps(train_step)
    def recorded_step(engine: Any, criterion: Any, micro_batches: Any, **rest: Any) -> Any:
        time.sleep(pace_s)
        result = train_step(engine, criterion, micro_batches, **rest)
        ids = [image_id for batch in micro_batches for image_id in batch.image_ids]
        file.write(json.dumps({"step": rest["step"] + 1, "ids": ids}) + "\n")
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
