"""CUDA graphs: what they compute is what the detector computes, for every size of batch; nothing else changes."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from framework.data.batch import blank_batch
from framework.engine import graphs
from framework.engine.ds_config import EngineConfig, autocast, deepspeed_config
from framework.engine.graphs import GRAIN, Graphs, as_tensors, computing_with, fill, in_place_of, padded_shape
from framework.errors import UsageError
from framework.losses.criterion import Criterion
from framework.losses.matcher import LossConfig
from framework.models.build import ModelConfig, build_detector
from tests.engine.test_waits import MODELS
from tests.engine.tiny import batch_of, tiny_detector

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_a_batch_goes_into_the_corner_of_a_larger_one():
    images, padding = torch.rand(2, 3, 70, 128), torch.rand(2, 70, 128) > 0.5
    shape, padded = padded_shape(images)
    assert (shape, padded) == ((2, 3, 128, 128), True) and GRAIN == 64
    larger, mask = torch.ones(shape), torch.zeros(2, 128, 128, dtype=torch.bool)
    fill(images, padding, larger, mask)
    assert larger[..., :70, :].equal(images) and not larger[..., 70:, :].any()
    assert mask[:, :70].equal(padding) and mask[:, 70:].all()
    fill(images, None, larger, mask)
    assert not mask[:, :70].any() and mask[:, 70:].all()
    assert padded_shape(larger) == (shape, False)


def test_on_a_cpu_the_detector_computes_as_before_and_the_key_is_refused():
    detector, inputs = tiny_detector().train(), batch_of(0).inputs("cpu")
    torch.manual_seed(0)
    before = detector(*inputs).logits_KBQC
    Graphs(detector)
    torch.manual_seed(0)
    assert detector(*inputs).logits_KBQC.equal(before)
    settings = dict(device=torch.device("cpu"), global_batch=2, micro_batch=2, accumulation=1, clip_norm=1.0)
    with pytest.raises(UsageError, match="engine.cuda_graphs: found true on a machine without GPU"):
        deepspeed_config(EngineConfig(cuda_graphs=True), **settings)
    for other in ({"zero_stage": 3}, {"activation_checkpointing": True}):
        with pytest.raises(UsageError, match="engine.cuda_graphs, engine.zero_stage"):
            EngineConfig(cuda_graphs=True, **other)
    with pytest.raises(UsageError, match="engine.compile_layers, engine.cuda_graphs: found true and false"):
        EngineConfig(compile_layers=True)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_leaves_stand_in_for_the_weights_tied_ones_too_for_one_call(config: ModelConfig):
    torch.manual_seed(0)
    detector = build_detector(config)
    weights = [weight for weight in detector.parameters() if weight.requires_grad]
    leaves = [weight.detach().requires_grad_() for weight in weights]
    before = dict(detector.named_parameters(remove_duplicate=False))
    for _ in range(2):
        with in_place_of(weights, leaves, detector):
            outputs = as_tensors(detector(torch.rand(2, 3, 64, 96)))
        torch.autograd.grad(outputs, leaves, [torch.ones_like(one) for one in outputs])  # each of them was used
        after = dict(detector.named_parameters(remove_duplicate=False))
        assert list(before) == list(after) and all(before[name] is after[name] for name in before)


def test_other_functions_take_the_place_of_forward_for_one_call():
    layer = torch.nn.Linear(2, 2)
    x, plain = torch.rand(2), layer.forward
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), computing_with([(layer, lambda x: plain(x) * 2)]):
            assert layer(x).equal(plain(x) * 2)
            raise ZeroDivisionError
        assert layer(x).equal(plain(x)) and "forward" not in vars(layer)


class Doubled:
    """As graphs are, but on a CPU: output = 2 * weight, in memory that stays where it is."""

    def __init__(self, weights):
        self.weights, self.used = weights, [True, False]
        self.outputs, self.output_gradients = [torch.zeros(3)], [torch.zeros(3)]
        self.gradients = torch.zeros(5)
        self.forward = SimpleNamespace(replay=lambda: self.outputs[0].copy_(2 * weights[0].detach()))
        self.backward = SimpleNamespace(replay=lambda: self.gradients[:3].copy_(2 * self.output_gradients[0]))


def test_a_replay_s_results_stay_and_gradients_add_up():
    weights = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    owner, recorded = SimpleNamespace(passes=0), Doubled(weights)
    [first] = graphs._Replay.apply(owner, recorded, *weights)
    (first * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    with torch.no_grad():
        weights[0].mul_(5)
    owner.passes += 1
    [second] = graphs._Replay.apply(owner, recorded, *weights)
    second.sum().backward()
    assert first.tolist() == [2, 2, 2] and second.tolist() == [10, 10, 10]
    assert weights[0].grad.tolist() == [4, 6, 8] and weights[1].grad is None
    [third] = graphs._Replay.apply(owner, recorded, *weights)
    owner.passes += 1
    with pytest.raises(RuntimeError, match="engine.cuda_graphs: the backward pass of a forward pass that another one"):
        third.sum().backward()


def losses_and_gradients(detector, inputs, targets, criterion, precision, seed):
    torch.manual_seed(seed)
    with autocast(EngineConfig(precision=precision), torch.device("cuda")):
        predictions = detector(*inputs)
    losses = criterion(predictions, targets, 4.0)
    criterion.total(losses).backward()
    return losses


@gpu
@needs_gpu
@pytest.mark.parametrize("compile_layers", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_losses_and_gradients_are_the_detectors(config: ModelConfig, precision: str, compile_layers: bool):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = replace(config, dropout=0.0) if compile_layers else config  # compiled layers draw other numbers
    plain = build_detector(config).cuda().train()
    recorded = copy.deepcopy(plain)
    record, criterion = Graphs(recorded, compile_layers=compile_layers), Criterion(LossConfig(), config.classification)
    hooks = [weight.expand_as(weight).grad_fn for weight in recorded.parameters()]  # as DeepSpeed keeps them
    rel = {"fp32": 1e-4, "bf16": 3e-2}[precision]
    sizes = [[(70, 96), (96, 64)], [(128, 128)] * 2, [(70, 96), (96, 64)], [(64, 200), (30, 190)]]
    for accumulated in range(2):
        for i, sizes_hw in enumerate(sizes):
            batch = blank_batch(sizes_hw, boxes=2)
            batch.pixels_P.random_(0, 255)
            images, padding = batch.inputs("cuda")
            shape, padded = padded_shape(images)
            larger = torch.zeros(shape, device="cuda")
            mask = None if padding is None and not padded else torch.zeros(2, *shape[2:], dtype=torch.bool).cuda()
            fill(images, padding, larger, mask)
            targets = batch.targets.to("cuda")
            expected = losses_and_gradients(plain, (larger, mask), targets, criterion, precision, 10 * accumulated + i)
            found = losses_and_gradients(
                recorded, (images, padding), targets, criterion, precision, 10 * accumulated + i
            )
            for name, loss in expected.items():
                assert found[name].item() == pytest.approx(loss.item(), rel=rel, abs=rel), (name, sizes_hw)
        for (name, weight), other in zip(plain.named_parameters(), recorded.parameters(), strict=True):
            assert (weight.grad is None) == (other.grad is None), name
            if weight.grad is not None:
                off = (weight.grad - other.grad).norm() / weight.grad.norm().clamp(min=1e-3)
                assert off < 10 * rel, (name, accumulated, off.item())
    assert len(record.recorded) == 3 and len(hooks) > 0
    with torch.no_grad():
        for weight in (*plain.parameters(), *recorded.parameters()):
            weight.mul_(0.9)  # in place: the same graphs
    torch.manual_seed(7)
    with autocast(EngineConfig(precision=precision), torch.device("cuda")):
        expected = plain(larger, mask).boxes_KBQ4
        torch.manual_seed(7)
        found = recorded(images, padding).boxes_KBQ4
    assert (found - expected).abs().max() < rel and len(record.recorded) == 3
    with torch.no_grad():
        recorded.eval()(images, padding)  # not by a graph
        plain.eval()
    for weight in recorded.parameters():
        weight.data = weight.data.clone()
    recorded.train()(images, padding)
    assert len(record.recorded) == 1


@gpu
@needs_gpu
def test_the_sizes_met_last_are_kept_and_their_memory_is_shared(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    detector = tiny_detector().cuda().train()
    record, taken = Graphs(detector), []
    for side in (512, 128, 256, 320, 384, 448, 512):
        detector(torch.rand(2, 3, side, side, device="cuda")).logits_KBQC.sum().backward()
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_reserved())
    assert [key[0][-1] for key in record.recorded] == [448, 512]
    assert taken[-1] < 2 * taken[0]


@gpu
@needs_gpu
@pytest.mark.parametrize("compile_layers", [False, True], ids=["", "compiled"])
def test_dropout_draws_anew_by_the_seed_in_every_replay(compile_layers: bool):
    torch._dynamo.reset()
    detector = build_detector(MODELS["deformable"]).cuda().train()
    Graphs(detector, compile_layers=compile_layers)
    images = torch.rand(2, 3, 64, 128, device="cuda")

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return detector(images).logits_KBQC.detach()

    first = logits(0)
    next_one = detector(images).logits_KBQC.detach()  # without a seed of its own
    assert logits(0).equal(first) and not logits(1).equal(first) and not next_one.equal(first)
