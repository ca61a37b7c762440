"""Forward, loss and backward never wait for the device: the processor stays ahead.

On a GPU torch's own check holds it. On a CPU operators are looked at: of those that would wait there most are known.
DeepSpeed's engine is not to wait for all that the device has been given either.
"""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from framework.data.batch import blank_batch
from framework.engine.ranks import Ranks
from framework.engine.step import boxes_per_micro_batch
from framework.losses import matcher
from framework.losses.criterion import Criterion
from framework.losses.matcher import LossConfig
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig, build_detector
from tests.distributed import run_ranks
from tests.engine.test_zero_1 import ACCUMULATION, backward, engine_of

SMALL = dict(num_classes=3, num_queries=5, width=32, num_heads=2, encoder_layers=1, decoder_layers=2, ffn_width=32,
             backbone=BackboneConfig("resnet18"))  # fmt: skip
MODELS = {
    "deformable": ModelConfig(**SMALL),
    "two-stage": ModelConfig(**SMALL, refine_boxes=True, queries="proposals"),
    "DETR": ModelConfig(**SMALL, attention="dense", classification="softmax", num_feature_levels=1),
}
SIZES_HW = {"padded": [(64, 96), (96, 64)], "alike": [(64, 96), (64, 96)]}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


class NoWaits(TorchDispatchMode):
    """Refuses what brings numbers, or shapes that depend on them, to the processor."""

    REFUSED = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::allclose",
               "aten::unique", "aten::_unique", "aten::bincount", "aten::repeat_interleave.Tensor")  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = function.name().startswith(self.REFUSED)
        if function.name().startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
            waits |= "put" in function.name() and args[2].ndim == 0  # a number of the processor's, to be copied
        assert not waits, f"{function.name()} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes_hw", SIZES_HW.values(), ids=SIZES_HW)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_nothing_is_waited_for(config, sizes_hw, device, monkeypatch):
    torch.manual_seed(0)
    detector = build_detector(config).to(device).train()
    criterion = Criterion(LossConfig(), config.classification)
    batch = blank_batch(sizes_hw, boxes=2)
    if device == "cuda":
        batch = batch.pin_memory()

    def step():
        num_boxes = boxes_per_micro_batch([batch], Ranks(0, 1, 0, torch.device(device)))
        predictions = detector(*batch.inputs(device))
        losses = criterion(predictions, batch.targets.to(device), num_boxes)
        criterion.total(losses).backward()

    step()  # the first one makes what is kept

    def numbers(*arguments, **named):
        raise AssertionError("numbers from the device, or to it: the processor waits")

    refused = [(torch, "tensor"), (torch.Tensor, "new_tensor"), (torch.Tensor, "tolist")]
    if device == "cpu":  # where matching is scipy's
        monkeypatch.setattr(matcher, "assign", lambda cost_KNQ, *_: torch.arange(2).expand(cost_KNQ.shape[:2]))
        refused += [(torch.Tensor, "cpu"), (torch.Tensor, "numpy")]
    for owner, name in refused:
        monkeypatch.setattr(owner, name, numbers)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWaits():
            step()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for waits in (torch.Tensor.item, lambda one: one[one > 0], lambda one: one.__setitem__(one.long() - 1, 2.0)):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaits():
            waits(torch.ones(1, device=device))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_never_waits_for_the_whole_device(stage):
    run_ranks(1, engine_steps, stage)


def engine_steps(ranks: Ranks, stage: int) -> None:
    from deepspeed.accelerator import get_accelerator

    engine = engine_of(ranks, zero_stage=stage)
    waits = AssertionError("the engine waits for the device")
    with mock.patch.object(type(get_accelerator()), "synchronize", side_effect=waits):
        for step in range(4):  # DeepSpeed's timer of throughput begins after the second
            for _ in range(ACCUMULATION):
                backward(engine, step)
                engine.step()
