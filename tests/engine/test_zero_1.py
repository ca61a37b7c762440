"""ZeRO 1 with all gradients at once does what DeepSpeed does with one after the other."""

import math
from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from framework.engine import ds_config
from framework.engine.ds_config import EngineConfig, at_once, deepspeed_config, start_engine
from framework.engine.optimizer import GROUPS, OptimConfig, build_optimizer
from framework.engine.ranks import Ranks, init_ranks
from framework.engine.shares import MOMENTS, gather, shares_of
from tests.distributed import run_ranks

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
WAYS = ("DeepSpeed's", "ours", "scattered", "told first")
ACCUMULATION, STEPS = 2, 4


class Net(nn.Module):
    """All three parameter groups, of sizes that no world divides; a convolution of maps with their channels last; a
    layer that is not used."""

    def __init__(self, layers: int):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(7, 7, 3), nn.Flatten(), *(nn.Linear(7, 7) for _ in range(layers)))
        self.reference_points, self.unused = nn.Linear(7, 3), nn.Linear(5, 5)

    def forward(self, x):
        maps = x[..., None, None].expand(-1, -1, 3, 3).contiguous(memory_format=torch.channels_last)
        return self.reference_points(self.backbone(maps))


def engine_of(ranks: Ranks, layers: int = 2, **changes: Any) -> Any:
    torch.manual_seed(0)
    model, config = Net(layers), EngineConfig(**{"zero_stage": 1, "precision": "fp32"} | changes)
    return start_engine(model, build_optimizer(model, OptimConfig(lr=1e-2), ranks.device), deepspeed_config(
        config, device=ranks.device, global_batch=2 * ACCUMULATION * ranks.world, micro_batch=2,
        accumulation=ACCUMULATION, clip_norm=0.1,
    ))  # fmt: skip


def backward(engine: Any, seed: int, factor: float = 1.0) -> None:
    x = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed)).to(engine.device)
    engine.backward((engine(x) * factor).square().mean())


class Operators(TorchDispatchMode):
    """The names of those that run, in their order; views are none."""

    VIEWS = ("aten::view", "aten::_unsafe_view", "aten::slice.Tensor", "aten::split.Tensor", "aten::detach",
             "aten::_reshape_alias", "aten::alias")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() not in self.VIEWS:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Trained(NamedTuple):
    norms: list[float]
    states: dict[str, torch.Tensor]  # weights and moments
    spoiled: bool  # whether a step with a gradient that is no number was skipped and left them as they were
    sent: Counter[str]  # collectives of a step


def train(ranks: Ranks, how: str) -> Trained:
    ours = at_once if how != "DeepSpeed's" else lambda *_: False
    with mock.patch.object(ds_config, "at_once", ours):
        engine = engine_of(ranks)
    if how == "scattered":  # as on GPUs
        engine.optimizer.gradients_at_once.scattered = True
    if how == "told first":  # as apex's and DeepSpeed's AdamW
        engine.optimizer.optimizer._step_supports_amp_scaling = False

    def states() -> dict[str, torch.Tensor]:
        shares = shares_of(engine)
        kinds = {"weight": [share.weight for share in shares]}
        kinds |= {moment: [share.moments[moment] for share in shares] for moment in MOMENTS}
        return gather(engine, shares, kinds, ranks, everywhere=True)

    def step(number: int, factor: float = 1.0) -> float:
        for micro in range(ACCUMULATION):
            backward(engine, 100 * number + 10 * ranks.rank + micro, factor)
            engine.step()
        return float(engine.get_global_grad_norm())

    norms = [step(number) for number in range(STEPS - 1)]
    before = states()
    step(STEPS, math.nan if ranks.rank == 0 else 1.0)
    spoiled = not engine.was_step_applied() and all(one.equal(before[name]) for name, one in states().items())
    with Operators() as operators:
        norms.append(step(STEPS + 1))
    assert engine.was_step_applied() and all(weight.grad is None for weight in engine.module.parameters())
    weights = dict(engine.module.named_parameters())
    assert all(
        one.equal(weights[name.split("/")[1]].cpu()) for name, one in states().items() if name.startswith("weight/")
    )
    return Trained(norms, states(), spoiled, Counter(name for name in operators.names if name.startswith("c10d::")))


def all_ways(ranks: Ranks) -> list[Trained]:
    return [train(ranks, how) for how in WAYS]


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """Of which DeepSpeed makes a global, whatever a test before had."""
    monkeypatch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)


@pytest.mark.parametrize("world", [1, 2, pytest.param(1, marks=GPU, id="1 GPU")])
def test_steps_are_those_of_deepspeed(world):
    for expected, *others in run_ranks(world, all_ways):
        assert expected.spoiled and expected.norms[0] > 0.1  # clipped
        for how, found in zip(WAYS[1:], others, strict=True):
            assert found.spoiled, how
            assert found.norms == pytest.approx(expected.norms, rel=1e-5), how
            assert found.states.keys() == expected.states.keys()
            for name, tensor in found.states.items():
                assert torch.allclose(tensor, expected.states[name], rtol=1e-4, atol=1e-7), (how, name)
            scatters = sum(times for name, times in found.sent.items() if "reduce_scatter" in name)
            assert scatters == (len(GROUPS) if how == "scattered" and world == 2 else 0)


def test_many_weights_take_as_few_operators_as_few_and_the_processor_waits_once_after_the_update():
    (few, many) = run_ranks(1, operators_of_updates)[0]
    assert len(few) == len(many) < 60
    update, waits = "aten::_fused_adamw_", "aten::_local_scalar_dense"
    assert many.count(waits) == 1 and many.index(waits) > many.index(update)


def with_gradients(ranks: Ranks, layers: int = 2) -> Any:
    engine = engine_of(ranks, layers)
    for weight in engine.module.parameters():
        weight.grad = torch.ones_like(weight)
    return engine


def operators_of_updates(ranks: Ranks) -> list[list[str]]:
    """From the end of the last backward pass to the next step."""
    found = []
    for layers in (2, 40):
        engine = with_gradients(ranks, layers)
        with Operators() as operators:
            engine.optimizer.reduce_gradients()
            engine.optimizer.step()
        found.append(operators.names)
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_updates_while_the_processor_waits_for_an_event_only():
    run_ranks(1, update_without_waits)


def update_without_waits(ranks: Ranks) -> None:
    for _ in range(2):  # the first one makes what is kept
        zero = with_gradients(ranks).optimizer
        torch.cuda.set_sync_debug_mode("error")
        try:
            zero.reduce_gradients()
            zero.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not zero.overflow


def test_the_norm_of_many_numbers_has_its_digits():
    handler = engine_of(init_ranks()).optimizer.gradients_at_once
    own = [1e-3 * torch.randn(1 << 23, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = torch.cat(own).double().norm().item()
    assert handler._norm(own).item() == pytest.approx(expected, rel=1e-5)


def test_what_deepspeed_does_alone_is_left_to_it():
    for stage, early, offloaded, ours in [
        (0, False, False, False), (1, False, False, True), (2, False, False, False), (3, False, False, False),
        (1, True, False, False), (1, False, True, False),
    ]:  # fmt: skip
        assert at_once(stage, early, offloaded) == ours
    for changes in ({"overlap_comm": True}, {"zero_stage": 2}):
        zero = engine_of(init_ranks(), **changes).optimizer
        assert not hasattr(zero, "gradients_at_once") and zero._grad_acc_hooks
