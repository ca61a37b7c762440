"""The costs of a step are those of DeepSpeed and of GPUs: compared with both, not with formulas of our own."""

import json
import pydoc
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from benchmarks import largest_batch
from framework import plan
from framework.engine import costs
from framework.engine.costs import Setup, Weight
from framework.engine.ds_config import EngineConfig, deepspeed_config
from framework.models import backbone
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig, build_detector
from framework.models.linear import Float32Linear
from ops.linear import Linear
from tests.distributed import run_ranks
from tests.models.variants import VARIANTS
from tests.paths import REPOSITORY

GIB = 2**30
TINY = ModelConfig(num_classes=7, num_queries=20, width=64, num_heads=4, ffn_width=128, encoder_layers=2,
                   decoder_layers=2, backbone=BackboneConfig(name="resnet10", norm="group", width=32))  # fmt: skip


def meta_detector(config):
    with torch.device("meta"):
        return build_detector(config)


@pytest.mark.parametrize("config, recomputed, dtype", [
    (TINY, False, torch.float32), (TINY, True, torch.float32), (TINY, False, torch.bfloat16),
    (replace(TINY, queries="proposals", refine_boxes=True), True, torch.float32),
])  # fmt: skip
def test_tensors_without_content_keep_as_much_as_real_ones(config, recomputed, dtype):
    real, fake = build_detector(config), meta_detector(config)
    if recomputed:
        real.recompute_activations()
        fake.recompute_activations()
    named = dict([*real.named_parameters(), *real.named_buffers()])
    measured = costs.alive_after_forward(real, named, (64, 96), 2, dtype)
    # Of bf16 a CPU's norms keep their statistics in float32, which a fake's do not.
    few = {torch.float32: 0, torch.bfloat16: 2e-3}[dtype]
    planned = costs.activations(fake, (64, 96), 2, dtype, as_on_gpu=False)
    assert planned.total() == pytest.approx(measured.total(), rel=few, abs=0)
    assert planned == pytest.approx(measured, rel=2 * few, abs=0)  # by part


def test_what_backward_saves_is_alive_and_little_else_is():
    model, saved = build_detector(TINY), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predictions = model(torch.zeros(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool))
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    alive = costs.activations(meta_detector(TINY), (64, 96), 2, torch.float32, as_on_gpu=False).total()
    assert predictions.logits_KBQC.requires_grad
    assert sum(saved.values()) <= alive <= 1.3 * sum(saved.values())


@pytest.mark.parametrize("dropout, matrices", [(0.1, 1), (0.0, 0)])
def test_dense_attention_keeps_no_matrix_on_a_gpu(dropout, matrices):
    """A CPU keeps one where it drops some of it out."""
    config = replace(TINY, attention="dense", num_feature_levels=1, classification="softmax", dropout=dropout)
    sizes = (1024, 1024)  # 1,024 tokens
    matrix = 4 * TINY.num_heads * 1024**2
    on_cpu, on_gpu = (costs.activations(meta_detector(config), sizes, 1, torch.float32, as_on_gpu=gpu)["encoder"]
                      for gpu in (False, True))  # fmt: skip
    assert (on_cpu - on_gpu) / matrix / TINY.encoder_layers == pytest.approx(matrices, abs=0.2)


def test_a_plan_has_the_channels_last_on_every_cpu(monkeypatch):
    alive = [costs.activations(meta_detector(TINY), (256, 256), 2, torch.bfloat16)]
    monkeypatch.setattr(costs, "convolved_format", None)  # not replaced, but these
    for order in (torch.channels_last, torch.contiguous_format):
        monkeypatch.setattr(backbone, "convolved_format", lambda *_, found=order: found)
        alive.append(costs.activations(meta_detector(TINY), (256, 256), 2, torch.bfloat16))
    assert alive[0] == alive[1] != alive[2]


def recorded(name):
    return json.loads((REPOSITORY / f"docs/results/{name}.json").read_text())


def test_memory_of_a_step_on_a_gpu():
    """The peak that an H200 showed: weights, moments, activations, when backward starts and gradients are to come."""
    sides = recorded("gpu-train-step")["coco_r50_deformable, 800 x 1066, bf16, batch 2"]["sides"]
    (ops,) = [side for side in sides if side["side"] == "ops"]
    model = meta_detector(VARIANTS["base"])
    bytes_of = costs.memory(0, setup_of(model))
    alive = costs.activations(model, (800, 1066), 2, torch.bfloat16).total()
    total = bytes_of["weights"] + bytes_of["optimizer"] + alive
    assert 0.9 < total / GIB / ops["peak GiB"] < 1  # what the loss keeps is not in it


def test_the_largest_batches_that_are_planned_are_those_that_fitted():
    for path in largest_batch.CONFIGS[:1]:
        rows = recorded("gpu-largest-batch")[path.stem]["GPUs"]
        assert [row["GB"] for row in rows] == [str(gb) for gb in plan.GPUS_GB]
        predicted = largest_batch.predicted(path)  # of then and of now, when a step takes no buckets
        assert all(row["fit"] == pytest.approx(row["predicted"], rel=0.1) for row in rows)
        assert all(row["fit"] == pytest.approx(predicted[row["GB"]], rel=0.1) for row in rows)


def setup_of(model, **changes):
    zero = SimpleNamespace(reduce_bucket_size=1000, param_persistence_threshold=100_000, max_live_parameters=10**9,
                           max_reuse_distance=10**9, overlap_comm=False)  # fmt: skip
    settings = {"buffers": sum(b.numel() for b in model.buffers()), "world": 1, "accumulation": 1, "lower_bytes": 4,
                "recomputed": False, "offload_optimizer": False, "zero": zero}  # fmt: skip
    return Setup(costs.weights_of(model), **settings | changes)


def test_sending_early_takes_a_second_set_of_buckets():
    setup = setup_of(meta_detector(TINY))
    early = replace(setup, zero=SimpleNamespace(**vars(setup.zero) | {"overlap_comm": True}))
    for stage, factor in ((2, 2), (3, 1)):
        assert costs.memory(stage, early)["buckets"] == factor * costs.memory(stage, setup)["buckets"]
    assert costs.memory(0, setup)["buckets"] == costs.memory(1, setup)["buckets"] == 0
    assert costs.memory(1, early) == costs.memory(1, early) | {"buckets": costs.memory(2, early)["buckets"]}


def test_weights_of_the_published_detector():
    model = meta_detector(VARIANTS["base"])
    weights = costs.weights_of(model)
    assert sum(one.elements for one in weights) == 40_069_665  # shared heads once
    assert sum(one.elements for one in weights if one.trainable) == 39_847_265


@pytest.mark.parametrize("variant", ["two_stage", "detr"])
def test_layers_that_compute_in_lower_precision_are_sent_in_it(variant):
    """All linear layers and convolutions but those that stay float32."""
    config = deepspeed_config(EngineConfig(precision="bf16"), device=torch.device("cpu"), global_batch=1, micro_batch=1,
                              accumulation=1, clip_norm=0.1)  # fmt: skip
    named = config["torch_autocast"]["lower_precision_safe_modules"]
    used = {
        type(module)
        for module in meta_detector(VARIANTS[variant]).modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    } - {Float32Linear, NonDynamicallyQuantizableLinear}
    assert len(used) == 3 and used == {pydoc.locate(name) for name in named}


def test_what_is_sharded_shrinks_with_the_ranks():
    weights = [Weight(6400, True, True), Weight(640, True, False), Weight(64, False, False)]
    at = {world: [costs.memory(stage, replace(setup_of(nn.Module(), world=world, accumulation=2), weights=weights))
                  for stage in costs.STAGES] for world in (1, 64)}  # fmt: skip
    assert [one["optimizer"] for one in at[1]] == [8 * 7040, *[12 * 7040] * 3]
    assert [one["optimizer"] for one in at[64]] == [8 * 7040, *[12 * 110] * 3]
    assert [one["gradients"] for one in at[64]] == [4 * 7040, 4 * 7040, 2 * 4 * 110, 4 * 110]
    assert [one["weights"] for one in at[64]] == [*[4 * 7104] * 3, 4 * (7104 + 111)]
    offloaded = replace(setup_of(nn.Module(), offload_optimizer=True), weights=weights)
    assert costs.memory(1, offloaded)["optimizer"] == 0 and costs.memory(1, offloaded)["host"] == 12 * 7040


def test_large_models_give_up_what_stage_3_gathered():
    weights = [Weight(600_000_000, True, True)]
    large = replace(setup_of(nn.Module(), world=4, lower_bytes=2), weights=weights)
    gathers = [replace(large, recomputed=recomputed) for recomputed in (False, True)]
    assert [costs.traffic(3, one)[1].times for one in gathers] == [2, 3]
    assert costs.traffic(3, replace(large, weights=[Weight(400_000_000, True, True)]))[1].times == 1
    scatter = costs.traffic(3, large)[0]
    assert scatter.sent == 2 * 600_000_000 * 3 / 4
    assert costs.traffic(2, large)[0].sent == 2 * scatter.sent  # all-reduced
    assert costs.traffic(1, large)[0].sent == 2 * scatter.sent  # float32


class Net(nn.Module):
    """Large and small parameters, some of them sent in bf16, one frozen."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Linear(512, 512), nn.LayerNorm(512), Linear(512, 256), nn.LayerNorm(256))
        self.layers[2].bias.requires_grad_(False)

    def forward(self, x):
        return self.layers(x)


def one_step(ranks, accumulation):
    """Of each stage: what DeepSpeed sends in a step, by collective, and holds meanwhile, in bytes."""
    from deepspeed.comm.torch import TorchBackend

    from framework.engine.ds_config import start_engine

    sent = Counter()
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(TorchBackend, name, counted(getattr(TorchBackend, name), name, sent))
    found = []
    for stage in (1, 2, 3):
        model = Net()
        engine = start_engine(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), {
            "train_batch_size": 2 * accumulation, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.1,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 400_000},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": True, "dtype": "bfloat16",
                               "lower_precision_safe_modules": ["ops.linear.Linear"]},
            "data_types": {"grad_accum_dtype": "fp32"},
        })  # fmt: skip
        if stage == 1:
            engine.optimizer.gradients_at_once.scattered = True  # as on GPUs
        for _ in range(2):  # stage 3 learns in the first step what is used again
            sent.clear()
            for _ in range(accumulation):
                loss = engine(torch.randn(1, 512)).sum()
                buckets = []
                hook = model.layers[0].weight.register_hook(lambda _, engine=engine, buckets=buckets: buckets.append(
                    sum(one.nbytes for bucket in engine.optimizer.ipg_buckets.values() for one in held(bucket.buffer))
                ))  # fmt: skip
                engine.backward(loss)
                hook.remove()
                engine.step()
        states = engine.optimizer.optimizer.state
        optimizer = sum(p.nbytes + sum(s[m].nbytes for m in ("exp_avg", "exp_avg_sq")) for p, s in states.items())
        found.append((dict(sent), buckets[-1], optimizer))
        engine.destroy()
    return found


def held(buffer):
    return buffer if isinstance(buffer, list) else [buffer]


def counted(collective, name, sent):
    def call(self, *args, **kwargs):
        tensors = [t for t in [*args, *kwargs.values()] if isinstance(t, torch.Tensor)]
        sent[name] += max((t.nbytes for t in tensors), default=0)
        return collective(self, *args, **kwargs)

    return call


def test_deepspeed_sends_and_holds_what_is_planned():
    accumulation = 2
    found = run_ranks(2, one_step, accumulation)[0]
    called = {"all-reduce": "all_reduce", "all-gather": "all_gather_into_tensor",
              "reduce-scatter": "reduce_scatter_tensor"}  # fmt: skip
    for stage, (sent, buckets, optimizer) in zip((1, 2, 3), found, strict=True):
        zero = SimpleNamespace(reduce_bucket_size=400_000, param_persistence_threshold=100_000,
                               max_live_parameters=10**9, max_reuse_distance=10**9, overlap_comm=False)  # fmt: skip
        setup = setup_of(Net(), world=2, accumulation=accumulation, lower_bytes=2, zero=zero)
        planned = Counter()
        for one in costs.traffic(stage, setup):
            planned[called[one.name]] += one.times * one.bytes
        for name, size in planned.items():
            assert sent[name] == pytest.approx(size, abs=200), (stage, name)  # the norm of the gradients; padding
        assert buckets == costs.memory(stage, setup)["buckets"]
        assert optimizer == pytest.approx(costs.memory(stage, setup)["optimizer"], abs=200)
