"""ZeRO 1 with all gradients at once does what DeepSpeed does with one after the other."""

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from framework.engine import ds_config
from framework.engine.ds_config import EngineConfig, at_once, deepspeed_config, start_engine
from framework.engine.optimizer import GROUPS, OptimConfig, build_optimizer
from framework.engine.ranks import Ranks
from framework.engine.shares import MOMENTS, gather, shares_of
from tests.distributed import run_ranks

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
WAYS = ("DeepSpeed's", "ours", "scattered", "told first")
ACCUMULATION, STEPS = 2, 4


class Net(nn.Module):
    """All three parameter groups, of sizes that no world divides; the last layer of `unused` is."""

    def __init__(self, layers: int):
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Linear(7, 7) for _ in range(layers)))
        self.reference_points, self.unused = nn.Linear(7, 3), nn.Linear(5, 5)

    def forward(self, x):
        return self.reference_points(self.backbone(x))


def engine_of(ranks: Ranks, layers: int = 2) -> Any:
    torch.manual_seed(0)
    model, config = Net(layers), EngineConfig(zero_stage=1, precision="fp32")
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
    usual = ds_config.at_once
    if how == "DeepSpeed's":
        ds_config.at_once = lambda zero: False
    engine = engine_of(ranks)
    ds_config.at_once = usual
    if how == "scattered":  # as on GPUs
        engine.optimizer.step.__self__.scattered = True
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


def operators_of_updates(ranks: Ranks) -> list[list[str]]:
    """From the end of the last backward pass to the next step."""
    found = []
    for layers in (2, 40):
        engine = engine_of(ranks, layers)
        for weight in engine.module.parameters():
            weight.grad = torch.ones_like(weight)
        with Operators() as operators:
            engine.optimizer.reduce_gradients()
            engine.optimizer.step()
        found.append(operators.names)
    return found


def test_what_deepspeed_does_alone_is_left_to_it():
    settings = dict(device=torch.device("cpu"), global_batch=2, micro_batch=2, accumulation=1, clip_norm=1.0)
    for stage, changes, ours in [
        (0, {}, False), (1, {}, True), (2, {}, False), (3, {}, False), (1, {"overlap_comm": True}, False),
        (1, {"offload_optimizer": True}, False),
    ]:  # fmt: skip
        config = deepspeed_config(EngineConfig(zero_stage=stage, precision="fp32", **changes), **settings)
        assert at_once(config["zero_optimization"]) == ours
