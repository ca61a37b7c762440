"""A checkpoint that any world size loads: tensors by parameter name, plain files, committed as a whole.

    <run>/checkpoints/step-00001234/
        weights.safetensors     fp32 weights and buffers, by name, tied ones once
        optimizer.safetensors   exp_avg/<name>, exp_avg_sq/<name>: Adam's moments, float32, in the shape of the weight
        state.json              step, Adam's step count, data state, learning rates, classes
        MANIFEST.json           size and sha256 of the three

Dropout and augmentation draw from (seed, step) and (seed, epoch, image), so no generator has a state to keep.
Commit: everything is written to step-N.tmp and synced, the manifest last; then the folder is renamed. Readers take
the newest folder whose manifest verifies.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from framework.engine.ranks import Ranks
from framework.errors import InputError, UsageError
from framework.files import sha256_of, sync
from framework.models.weights import WEIGHTS_FILE

log = logging.getLogger("tenfold")

OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE = "optimizer.safetensors", "state.json", "MANIFEST.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(run_dir: str | Path, engine: Any, state: dict[str, Any], *, ranks: Ranks, keep: int) -> Path:
    """Write the checkpoint of state["step"]; collective. Keeps the newest `keep` and returns the folder.

    Raises InputError on every rank when the writing one fails; what was there before stays.
    """
    tensors = _gather(engine, ranks)
    folder = Path(run_dir) / "checkpoints" / f"step-{state['step']:08d}"
    failure = None
    if tensors is not None:
        try:
            _write(folder, _full_weights(engine.module, tensors), tensors, state)
            _drop_old(folder, keep)
        except (OSError, SafetensorError) as error:
            failure = f"checkpoint {folder} could not be written: {error}"
    failure = next((f for f in ranks.all_gather_objects(failure) if f), None)
    if failure:
        raise InputError(failure)
    return folder


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


def load(folder: str | Path, engine: Any) -> dict[str, Any]:
    """Put weights, buffers and moments into the engine of this rank; returns the state.

    Raises InputError: the checkpoint is of another model; names what differs. Nothing is changed then.
    """
    weights, state = read_weights(folder), read_state(folder)
    own = _named_tensors(engine.module)
    _refuse_misfits(folder, own, weights)
    with torch.no_grad(), safe_open(Path(folder) / OPTIMIZER_FILE, framework="pt") as optimizer_file:
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        for share in _shares(engine):
            part = slice(share.start, share.start + share.numel)
            share.master.copy_(weights[share.name].flatten()[part])
            for moment, view in share.moments.items():
                view.copy_(optimizer_file.get_tensor(f"{moment}/{share.name}").flatten()[part])
            share.adam_state["step"] = _like(share.adam_state["step"], state["adam_step"])
    for group in engine.optimizer.param_groups:
        if "step" in group:  # where DeepSpeed's and apex's FusedAdam count
            group["step"] = int(state["adam_step"])
    return state


@dataclass
class _Share:
    """The part of one parameter whose optimizer state lives on this rank: `numel` numbers from `start` on."""

    name: str
    start: int
    numel: int
    master: Tensor  # flat view, float32
    moments: dict[str, Tensor]  # flat views, float32
    adam_state: dict[str, Any]


def _shares(engine: Any) -> Iterator[_Share]:
    """ZeRO 0 holds whole parameters; ZeRO 1 and 2 one flat partition a group, of which a parameter is a fragment.

    Uses DeepSpeed's private `_hp_mapping` and `single_partition_of_fp32_groups`: the version is pinned for that.
    """
    partitions = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if partitions is None:
            adam = _adam_state(engine.optimizer, parameter)
            moments = {m: adam[m].view(-1) for m in MOMENTS}
            yield _Share(name, 0, parameter.numel(), parameter.data.view(-1), moments, adam)
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            adam = _adam_state(engine.optimizer.optimizer, partitions[mapping.param_group_index])
            there = mapping.hp_fragment_address
            moments = {m: adam[m].narrow(0, there.start, there.numel) for m in MOMENTS}
            start = mapping.lp_fragment_address.start
            yield _Share(name, start, there.numel, mapping.hp_fragment.data, moments, adam)


def _adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Adam's state of a parameter, created where no step was taken yet; torch counts in a tensor, others in an int."""
    adam = optimizer.state[parameter]
    for moment in MOMENTS:
        if moment not in adam:
            adam[moment] = torch.zeros_like(parameter, dtype=torch.float32)
    if "step" not in adam:
        own = isinstance(optimizer, torch.optim.AdamW)
        adam["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device) if own else 0
    return adam


def _like(current: Any, value: float) -> Any:
    return torch.full_like(current, value) if isinstance(current, Tensor) else type(current)(value)


def _gather(engine: Any, ranks: Ranks) -> dict[str, Tensor] | None:
    """master/<name>, exp_avg/<name>, exp_avg_sq/<name> on the main rank, None elsewhere; and adam_step there."""
    shapes = {n: p.shape for n, p in engine.module.named_parameters() if p.requires_grad}
    starts, total = {}, 0
    for name, shape in shapes.items():
        starts[name] = total
        total += shape.numel()
    shares = list(_shares(engine))
    replicated = not hasattr(engine.optimizer, "single_partition_of_fp32_groups")
    contributed = [] if replicated and not ranks.is_main else shares
    tensors: dict[str, Tensor] = {}
    for kind in ("master", *MOMENTS):
        flat = torch.zeros(total, dtype=torch.float32, device=ranks.device)
        for share in contributed:
            source = share.master if kind == "master" else share.moments[kind]
            flat[starts[share.name] + share.start :][: share.numel].copy_(source)
        flat = ranks.sum(flat).cpu()
        if ranks.is_main:
            tensors |= {f"{kind}/{n}": flat[starts[n] :][: s.numel()].view(s) for n, s in shapes.items()}
    if not ranks.is_main:
        return None
    counted = [group["step"] for group in engine.optimizer.param_groups if "step" in group]
    tensors["adam_step"] = torch.as_tensor(float(max(counted, default=shares[0].adam_state["step"])))
    return tensors


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {name: p.data for name, p in module.named_parameters()} | dict(module.named_buffers())


def _full_weights(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensors.get(f"master/{name}", tensor.detach().float().cpu()).contiguous()
        for name, tensor in _named_tensors(module).items()
    }


def _write(folder: Path, weights: dict[str, Tensor], tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    moments = {name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith(MOMENTS)}
    save_file(weights, temporary / WEIGHTS_FILE)
    save_file(moments, temporary / OPTIMIZER_FILE)
    state = state | {"adam_step": tensors["adam_step"].item()}
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
    files = {}
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE):
        sync(temporary / name)
        files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": sha256_of(temporary / name)}
    (temporary / MANIFEST_FILE).write_text(json.dumps({"step": state["step"], "files": files}, indent=1))
    sync(temporary / MANIFEST_FILE)
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)  # only a broken one of the same step can be in the way
    temporary.rename(folder)
    sync(folder.parent)


def _drop_old(saved: Path, keep: int) -> None:
    """Keep `saved` and the newest before it; what claims to be newer did not verify, or this run would be after it."""
    folders = _folders(saved.parent)
    mine = folders.index(saved)
    for folder in folders[:mine] + folders[mine + keep :]:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(parent: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    found = [p for p in parent.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name)]
    return sorted(found, key=lambda p: p.name, reverse=True)


def _verified(run_dir: str | Path) -> Iterator[Path]:
    for folder in _folders(Path(run_dir) / "checkpoints"):
        fault = _fault(folder)
        if fault is None:
            yield folder
        else:
            log.warning("checkpoint %s is not used: %s", folder, fault)


def _fault(folder: Path) -> str | None:
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
