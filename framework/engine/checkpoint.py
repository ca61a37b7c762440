"""A checkpoint that any ZeRO stage, precision and world size loads: tensors by parameter name, plain files, committed
as a whole.

    <run>/checkpoints/step-00001234/
        weights.safetensors     fp32 weights and buffers, by name, tied ones once; of a run with an EMA, its weights
        optimizer.safetensors   exp_avg/<name>, exp_avg_sq/<name>: Adam's moments, float32, in the shape of the weight;
                                of a run with an EMA weight/<name> too, those that are trained
        state.json              step, Adam's step count, data state, learning rates, classes
        MANIFEST.json           size and sha256 of the three

Dropout and augmentation draw from (seed, step) and (seed, epoch, image), so no generator has a state to keep.
Commit: everything is written to step-N.<writer>.tmp and synced, the manifest last; then the folder is renamed. Readers
take the newest folder whose manifest verifies.
"""

import contextlib
import json
import logging
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from framework.engine.ds_config import loss_scaler
from framework.engine.ema import Ema
from framework.engine.ranks import Ranks
from framework.engine.shares import (
    MOMENTS,
    adam_steps,
    fixed_tensors,
    gather,
    load_moments,
    named_tensors,
    part_of,
    shares_of,
)
from framework.errors import InputError, UsageError
from framework.files import sha256_of, sync
from framework.models.weights import WEIGHTS_FILE

log = logging.getLogger("tenfold")

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter")
WRITER = uuid.uuid4().hex[:8]  # this process: one that should have ended may still write under the name of its own
OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE = "optimizer.safetensors", "state.json", "MANIFEST.json"


class Checkpoints:
    """Those that one run writes; a thread of the main rank does it, while training goes on.

    The tensors are in host memory by then. Where there is less memory left than they take, training waits.
    keep: given the steps of the newest checkpoint and of all before it, the steps of those that stay; what claims to
        be newer did not verify, or this run would be after it, and goes.
    refuse: raises when this run may not write any more; asked last before a checkpoint becomes one.
    """

    def __init__(
        self, run_dir: str | Path, ranks: Ranks, keep: Callable[[list[int]], set[int]],
        refuse: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.run_dir, self.ranks, self.keep, self.refuse = Path(run_dir), ranks, keep, refuse
        self.failure: str | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._join()

    def save(self, engine: Any, state: dict[str, Any], ema: Ema | None = None) -> None:
        """Write the checkpoint of state["step"]. Collective.

        Raises InputError on every rank when the last one could not be written; what was there before stays.
        """
        self.finish()
        shares = shares_of(engine)
        pieces = {"weight": [share.weight for share in shares]}
        pieces |= {moment: [share.moments[moment] for share in shares] for moment in MOMENTS}
        if ema is not None:
            pieces["ema"] = ema.pieces
            state = state | {"ema_updates": ema.updates}
        if (scaler := loss_scaler(engine)) is not None:
            state = state | {"loss_scale": {name: getattr(scaler, name) for name in SCALER_STATE}}
        tensors = gather(engine, shares, pieces, self.ranks)
        fixed = fixed_tensors(engine)
        if not self.ranks.is_main:
            return
        state = state | {"adam_step": adam_steps(engine, shares)}
        self._thread = threading.Thread(target=self._write, args=(state, tensors, fixed), name="checkpoint")
        self._thread.start()
        if _free_memory() < sum(tensor.nbytes for tensor in tensors.values()):
            self._join()

    def finish(self) -> None:
        """Wait until what was saved is on the disk. Collective.

        Raises InputError on every rank when it could not be written.
        """
        self._join()
        failure = next((f for f in self.ranks.all_gather_objects(self.failure) if f), None)
        if failure:
            raise InputError(failure)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: dict[str, Any], tensors: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
        folder, began = folder_of(self.run_dir, state["step"]), time.perf_counter()
        try:
            _write(folder, tensors, fixed, state, self.refuse)
        except Exception as error:  # whatever it is: the run must not go on as if it were saved
            self.failure = f"checkpoint {folder} could not be written: {type(error).__name__}: {error}"
            log.error(self.failure)
            shutil.rmtree(_unfinished(folder), ignore_errors=True)  # what it takes of a full disk
        else:
            log.info("saved %s in %.2g s", folder, time.perf_counter() - began)
            try:
                self.refuse()  # those of another start are not ours to drop
                self._drop_old(folder)
            except Exception as error:  # what was saved is saved
                log.warning("old checkpoints stay: %s: %s", type(error).__name__, error)

    def _drop_old(self, saved: Path) -> None:
        folders = _folders(saved.parent)
        older = [folder for folder in folders if folder.name <= saved.name]
        kept = self.keep([_step_of(folder) for folder in older])
        for folder in folders:
            if folder != saved and (folder not in older or _step_of(folder) not in kept):
                shutil.rmtree(folder, ignore_errors=True)
        for unfinished in saved.parent.glob("step-*.tmp"):  # of an attempt that was killed while it wrote
            shutil.rmtree(unfinished, ignore_errors=True)


def folder_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def newest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says, or None; broken ones are logged."""
    return next(_verified(run_dir), None)


def newest_on_all(run_dir: str | Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint that verifies on the main rank; collective.

    Raises UsageError on every rank when another one does not see the same: an older one taken instead, or a fresh
    start, would end in the loss of the newer.
    """
    found = newest(run_dir)
    names = ranks.all_gather_objects(found.name if found else None)
    if len(set(names)) > 1:
        raise UsageError(
            f"train.run_dir: {run_dir} does not hold the same checkpoints for all processes (newest whole ones: "
            f"{', '.join(map(str, names))}); expected one folder that all machines share"
        )
    return found


def read_state(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / STATE_FILE).read_bytes())


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Weights and buffers by name, float32 on the CPU."""
    return load_file(Path(folder) / WEIGHTS_FILE)


def load_weights(folder: str | Path, module: nn.Module) -> None:
    """Put the weights that are trained, and the buffers, into a module that no engine has yet.

    Raises InputError: the checkpoint is of another model; names what differs. Nothing is changed then.
    """
    weights, own = read_weights(folder), named_tensors(module)
    _refuse_misfits(folder, own, weights)
    with torch.no_grad(), safe_open(Path(folder) / OPTIMIZER_FILE, framework="pt") as optimizer_file:
        trained = set(optimizer_file.keys())
        for name, tensor in own.items():
            averaged = f"weight/{name}" in trained
            tensor.copy_(optimizer_file.get_tensor(f"weight/{name}") if averaged else weights[name])


def load_optimizer(folder: str | Path, engine: Any, ema: Ema | None = None) -> dict[str, Any]:
    """Put the moments, and the EMA, into this rank's share of an engine; returns the state.

    An EMA that the checkpoint does not have begins with its weights.
    """
    state = read_state(folder)
    with torch.no_grad(), safe_open(Path(folder) / OPTIMIZER_FILE, framework="pt") as optimizer_file:
        load_moments(engine, shares_of(engine), optimizer_file.get_tensor, state["adam_step"])
    if (scaler := loss_scaler(engine)) is not None:
        vars(scaler).update(state.get("loss_scale", {}))
    if ema is not None and "ema_updates" in state:
        averages, ema.updates = read_weights(folder), state["ema_updates"]
        for share, piece in zip(ema.shares, ema.pieces, strict=True):
            piece.copy_(part_of(averages[share.name], share))
    return state


def _write(
    folder: Path, tensors: dict[str, Tensor], fixed: dict[str, Tensor], state: dict[str, Any],
    refuse: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """tensors: by kind and name; see `Checkpoints.save`."""
    temporary = _unfinished(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shown, kept = ("ema", ("weight", *MOMENTS)) if "ema_updates" in state else ("weight", MOMENTS)
    weights = {name.removeprefix(f"{shown}/"): t for name, t in tensors.items() if name.startswith(f"{shown}/")}
    save_file({name: tensor.contiguous() for name, tensor in (weights | fixed).items()}, temporary / WEIGHTS_FILE)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if name.split("/")[0] in kept},
              temporary / OPTIMIZER_FILE)  # fmt: skip
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
    files = {}
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE):
        sync(temporary / name)
        files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": sha256_of(temporary / name)}
    (temporary / MANIFEST_FILE).write_text(json.dumps({"step": state["step"], "files": files}, indent=1))
    sync(temporary / MANIFEST_FILE)
    sync(temporary)
    refuse()
    shutil.rmtree(folder, ignore_errors=True)  # only a broken one of the same step can be in the way
    temporary.rename(folder)
    sync(folder.parent)


def _folders(parent: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    found = [p for p in parent.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name)]
    return sorted(found, key=lambda p: p.name, reverse=True)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.{WRITER}.tmp")


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _free_memory() -> float:
    """Bytes that the machine can still give, infinite where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def _verified(run_dir: str | Path) -> Iterator[Path]:
    for folder in _folders(Path(run_dir) / "checkpoints"):
        fault = fault_of(folder)
        if fault is None:
            yield folder
        else:
            log.warning("checkpoint %s is not used: %s", folder, fault)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
        for name in (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE):
            path = folder / name
            if path.stat().st_size != files[name]["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {files[name]['bytes']}"
            if sha256_of(path) != files[name]["sha256"]:
                return f"{name} does not have the sha256 of its manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _refuse_misfits(folder: str | Path, own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is unknown" for name in weights if name not in own]
    faults += [
        f"{name}: found {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{folder}: a checkpoint of another model: {'; '.join(faults[:3])}{more}")
