import os
import sys
import types

import pytest
import torch

from framework.engine.ds_config import EngineConfig, deepspeed_config, memory_savers
from framework.engine.optimizer import OptimConfig, build_optimizer, learning_rates, parameter_groups
from framework.engine.shares import Share, adam_steps, load_moments
from framework.errors import UsageError
from framework.models.build import build_detector
from tests.models.variants import VARIANTS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_groups_of_the_published_recipe():
    with torch.device("meta"):
        model = build_detector(VARIANTS["base"])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(model, OptimConfig())}
    assert set(groups) == {"rest", "backbone", "sampling"}
    assert all(name.startswith("backbone.layer") for name in groups["backbone"])
    assert all("sampling_offsets" in n or "reference_points" in n for n in groups["sampling"])
    assert len(groups["sampling"]) == 2 * 12 + 2  # weight and bias of 12 attentions, and of the reference points
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set.union(*groups.values()) == trainable and sum(map(len, groups.values())) == len(trainable)


def rate(step, **changes):
    config = OptimConfig(**changes)
    return learning_rates(config, step, global_batch=128, steps_per_epoch=10, drop_epochs=[4, 6])


def test_schedule():
    assert rate(0) == {"rest": 2e-4, "backbone": pytest.approx(2e-5), "sampling": pytest.approx(2e-5)}
    assert rate(39)["rest"] == 2e-4
    assert rate(40)["rest"] == pytest.approx(2e-5)
    assert rate(60)["rest"] == pytest.approx(2e-6)
    assert rate(0, lr_scaling="sqrt")["rest"] == pytest.approx(4e-4)
    assert rate(0, lr_scaling="linear")["rest"] == pytest.approx(8e-4)
    assert [rate(s, warmup_steps=4)["rest"] / 2e-4 for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def largest_difference_from_adamw(impl: str, device: torch.device) -> float:
    """After three steps of a small network."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(30, 40).to(device)
    plain = torch.nn.Linear(30, 40).to(device)
    plain.load_state_dict(ours.state_dict())
    try:
        a = build_optimizer(ours, OptimConfig(impl=impl), device)
    except UsageError as error:
        pytest.skip(str(error))
    b = torch.optim.AdamW(plain.parameters(), lr=2e-4, weight_decay=1e-4)
    for _ in range(3):
        for model, optimizer in ((ours, a), (plain, b)):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 60, device=device).view(2, 30)).square().sum().backward()
            optimizer.step()
    return (ours.weight - plain.weight).abs().max().item()


@pytest.mark.parametrize("impl", ["auto", "torch", "deepspeed"])
def test_each_implementation_is_adamw(impl):
    if impl == "deepspeed" and not os.environ.get("TENFOLD_SLOW"):
        pytest.skip("DeepSpeed compiles its Adam for a minute; TENFOLD_SLOW=1 tests it")
    assert largest_difference_from_adamw(impl, CPU) < 1e-7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("impl", ["torch", "deepspeed", "apex"])
def test_each_implementation_is_adamw_on_a_gpu(impl):
    assert largest_difference_from_adamw(impl, CUDA) < 1e-6


def test_apex_is_asked_for_where_it_is_not(monkeypatch):
    with pytest.raises(UsageError, match="optim.impl: found apex on a machine without GPU"):
        build_optimizer(torch.nn.Linear(1, 1), OptimConfig(impl="apex"), CPU)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UsageError, match="not installed; install NVIDIA apex from its repository"):
        build_optimizer(torch.nn.Linear(1, 1), OptimConfig(impl="apex"), CUDA)
    other = types.ModuleType("apex")
    other.__file__, other.__path__ = "site-packages/apex/__init__.py", []
    monkeypatch.setitem(sys.modules, "apex", other)
    with pytest.raises(UsageError, match="PyPI's 'apex' is another project"):
        build_optimizer(torch.nn.Linear(1, 1), OptimConfig(impl="apex"), CUDA)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(zero_stage=0, precision="bf16"), "engine.zero_stage, engine.precision: found 0 and bf16"),
        (dict(zero_stage=0, precision="fp16"), "engine.zero_stage, engine.precision: found 0 and fp16"),
        (dict(zero_stage=7), "engine.zero_stage: found 7"),
        (dict(secondary_partition=0), "engine.secondary_partition: found 0"),
        (dict(secondary_partition=2), "engine.secondary_partition, engine.zero_stage: found 2 and 1"),
        (dict(zero_stage=3, quantized_gradients=True), "engine.quantized_gradients: found true; DeepSpeed 0.19.8"),
        (dict(zero_stage=3, quantized_weights=True), "engine.quantized_weights: found true; DeepSpeed would"),
        (dict(zero_stage=0, offload_optimizer=True), "engine.zero_stage, engine.offload_optimizer"),
        (dict(zero_stage=0, overlap_comm=True), "engine.overlap_comm, .*: found true, 0 and false"),
        (dict(zero_stage=3, overlap_comm=True), "engine.overlap_comm, .*: found true, 3 and false"),
        (dict(cuda_graphs=True, overlap_comm=True), "engine.overlap_comm, .*: found true, 1 and true"),
        (dict(keep_products=True), "engine.keep_products, .*: found true, false and 1"),
        (
            dict(keep_products=True, activation_checkpointing=True, zero_stage=3),
            "engine.keep_products, .*: found true, t",
        ),
    ],
)
def test_refused_engines(changes, message):
    with pytest.raises(UsageError, match=message):
        EngineConfig(**changes)


def test_refused_on_the_cpu():
    for config, message in (
        (EngineConfig(precision="fp16"), "engine.precision: found fp16 on a machine without GPU"),
        (EngineConfig(zero_stage=3, secondary_partition=3), "engine.secondary_partition: found 3 with 4 processes"),
    ):
        with pytest.raises(UsageError, match=message):
            deepspeed_config(config, device=CPU, global_batch=8, micro_batch=1, accumulation=2, clip_norm=1.0)


@pytest.mark.parametrize("counts_in_group, counts_in_state", [(0, 5), (5, 0), (None, 5)])
def test_where_an_adam_counts_its_steps(counts_in_group, counts_in_state):
    """DeepSpeed's FusedAdam in its state, beside a 0 in its group; apex's in its group; torch's in its state."""
    group = {} if counts_in_group is None else {"step": counts_in_group}
    engine = types.SimpleNamespace(optimizer=types.SimpleNamespace(param_groups=[{}, group]))
    states = [{"step": 0}, {"step": counts_in_state}]
    shares = [Share(f"{n}", 0, 1, torch.zeros(1), {}, state) for n, state in enumerate(states)]
    assert adam_steps(engine, shares) == 5
    load_moments(engine, shares, None, 7.0)
    assert [group["step"] for group in engine.optimizer.param_groups] == [7, 7]
    assert [state["step"] for state in states] == [7, 7]


def test_an_adam_that_cannot_be_built_is_told(monkeypatch):
    def no_compiler(*_args, **_settings):
        raise RuntimeError("Unable to JIT load the cpu_adam op\nand much more")

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", no_compiler)
    with pytest.raises(UsageError, match="found deepspeed, whose Adam cannot be built here .*set optim.impl=auto"):
        build_optimizer(torch.nn.Linear(1, 1), OptimConfig(impl="deepspeed"), CPU)


def test_what_saves_memory_is_what_is_not_set_yet_and_goes_with_the_rest():
    always = "a smaller train.micro_batch or data.max_size"
    for changes, keys in [
        ({}, ["engine.activation_checkpointing=true"]),
        ({"precision": "fp32"}, ["engine.precision=bf16", "engine.activation_checkpointing=true"]),
        ({"precision": "fp32", "zero_stage": 0, "activation_checkpointing": True}, ["engine.zero_stage=1"]),
        ({"cuda_graphs": True}, ["engine.cuda_graphs=false"]),
        ({"cuda_graphs": True, "compile_layers": True}, ["engine.cuda_graphs=false engine.compile_layers=false"]),
        ({"activation_checkpointing": True, "keep_products": True}, ["engine.keep_products=false"]),
    ]:
        assert memory_savers(EngineConfig(**changes)) == " or ".join([always, *keys])
        for key in keys:  # none is refused
            settings = [one.removeprefix("engine.").split("=") for one in key.split()]
            EngineConfig(
                **changes | {name: {"true": True, "false": False, "1": 1}.get(to, to) for name, to in settings}
            )
