"""What this rank holds of every trainable parameter and of Adam's moments, by the parameter's name, in any ZeRO stage.

Stage 0 holds everything everywhere. Stages 1 and 2 hold one flat partition of each parameter group, of which a
parameter is a fragment. Stage 3 holds an equal part of each parameter, the last one padded. All of it is read from
DeepSpeed's private attributes: its version is pinned for that, and tests/engine/test_checkpoint.py holds them to it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framework.engine.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
SENT_AT_ONCE = 1 << 24  # numbers, 64 MiB


@dataclass
class Share:
    """The part of one parameter whose optimizer state lives on this rank: `numel` numbers from `start` on.

    weight: the float32 weight that the optimizer updates, a flat view; moments: likewise. adam_state: with "step".
    """

    name: str
    start: int
    numel: int
    weight: Tensor
    moments: dict[str, Tensor]
    adam_state: dict[str, Any]


def shares_of(engine: Any) -> list[Share]:
    """Every call makes new ones; their views stay true while training goes on."""
    if engine.zero_optimization_stage() == 3:
        return list(_parts_of_parameters(engine))
    partitions = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
    return list(_whole_parameters(engine) if partitions is None else _fragments_of_groups(engine, partitions))


def trainable_shapes(engine: Any) -> dict[str, torch.Size]:
    """The full shape of each trainable parameter by name, tied ones once."""
    return {
        name: getattr(parameter, "ds_shape", parameter.shape)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def gather(engine: Any, shares: list[Share], pieces: Mapping[str, list[Tensor]], ranks: Ranks, *,
           everywhere: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """Whole tensors "<kind>/<name>", float32 copies on the CPU, on the main rank or everywhere; elsewhere none.

    pieces: of each kind, what every share holds of it, in the shares' order. Collective.
    """
    whole: dict[str, Tensor] = {}
    replicated = engine.zero_optimization_stage() == 0
    if replicated and not (ranks.is_main or everywhere):
        return whole
    for kind, held in pieces.items():
        mine = {share.name: (share, piece) for share, piece in zip(shares, held, strict=True)}
        for shapes in _portions(trainable_shapes(engine)):
            flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=ranks.device)
            views = dict(zip(shapes, flat.split([shape.numel() for shape in shapes.values()]), strict=True))
            for name, view in views.items():
                if name in mine:
                    share, piece = mine[name]
                    view[share.start :][: share.numel].copy_(piece)
            if not replicated:
                ranks.sum(flat)
            if ranks.is_main or everywhere:
                whole |= {f"{kind}/{name}": view.cpu().view(shapes[name]) for name, view in views.items()}
    return whole


def load_moments(engine: Any, shares: list[Share], tensor: Callable[[str], Tensor], steps: float) -> None:
    """Adam's moments, tensor("<moment>/<name>") whole, and the number of steps it has taken."""
    for share in shares:
        for moment, view in share.moments.items():
            view.copy_(part_of(tensor(f"{moment}/{share.name}"), share))
        share.adam_state["step"] = _like(share.adam_state["step"], steps)
    for group in engine.optimizer.param_groups:
        group["step"] = int(steps)  # where apex's FusedAdam counts; others have it too, or do not mind


def adam_steps(engine: Any, shares: list[Share]) -> float:
    """How many steps Adam has taken: those of the run less those that were skipped."""
    counted = [group["step"] for group in engine.optimizer.param_groups if "step" in group]  # apex; DeepSpeed: 0
    return float(max([*counted, *(share.adam_state["step"] for share in shares)], default=0))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {name: p.data for name, p in module.named_parameters()} | dict(module.named_buffers())


def fixed_tensors(engine: Any) -> dict[str, Tensor]:
    """Copies of buffers and of parameters that are not trained, float32 on the CPU. Collective."""
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    gathered: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero import GatheredParameters

        gathered = GatheredParameters(list(frozen.values()))
    with gathered:
        fixed = {**frozen, **dict(engine.module.named_buffers())}
        return {name: tensor.detach().float().cpu().clone() for name, tensor in fixed.items()}


def part_of(whole: Tensor, share: Share) -> Tensor:
    return whole.flatten()[share.start : share.start + share.numel]


def _whole_parameters(engine: Any) -> Iterator[Share]:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            adam = _adam_state(engine.optimizer, parameter)
            moments = {m: adam[m].view(-1) for m in MOMENTS}
            yield Share(name, 0, parameter.numel(), parameter.data.view(-1), moments, adam)


def _fragments_of_groups(engine: Any, partitions: list[Tensor]) -> Iterator[Share]:
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping if parameter.requires_grad else None
        if mapping is not None:
            adam = _adam_state(engine.optimizer.optimizer, partitions[mapping.param_group_index])
            there = mapping.hp_fragment_address
            moments = {m: adam[m].narrow(0, there.start, there.numel) for m in MOMENTS}
            start = mapping.lp_fragment_address.start
            yield Share(name, start, there.numel, mapping.hp_fragment.data, moments, adam)


def _parts_of_parameters(engine: Any) -> Iterator[Share]:
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        adam = _adam_state(zero.optimizer, flat)
        offset = 0
        for parameter in parameters:
            length = parameter.partition_numel()
            start = length * parameter.ds_zero_partition_rank
            numel = max(0, min(length, parameter.ds_numel - start))
            weight, *moments = (t.data.narrow(0, offset, numel) for t in (flat, *(adam[m] for m in MOMENTS)))
            yield Share(names[id(parameter)], start, numel, weight, dict(zip(MOMENTS, moments, strict=True)), adam)
            offset += length


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


def _portions(shapes: dict[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    portion: dict[str, torch.Size] = {}
    for name, shape in shapes.items():
        portion[name] = shape
        if sum(one.numel() for one in portion.values()) >= SENT_AT_ONCE:
            yield portion
            portion = {}
    if portion:
        yield portion
