"""Parts of the detector: what depends on what, and how it starts."""

import math

import pytest
import torch
from torch import nn

from framework.errors import UsageError
from framework.models.backbone import BackboneConfig, FrozenBatchNorm2d, ResNet, group_norm
from framework.models.build import ModelConfig, build_detector
from framework.models.decoder import BoxHead
from framework.models.position import sine_position

SMALL = dict(width=64, num_heads=4, encoder_layers=2, decoder_layers=2, ffn_width=96, num_queries=9, num_classes=3,
             dropout=0.0, backbone=BackboneConfig("resnet18", norm="group"))  # fmt: skip
KINDS = {
    "base": {},
    "refine": dict(refine_boxes=True),
    "two_stage": dict(refine_boxes=True, queries="proposals"),
    "five_levels": dict(num_feature_levels=5),
    "single_scale": dict(num_feature_levels=1),
    "detr": dict(num_feature_levels=1, attention="dense", classification="softmax"),
}


def small(kind: str, **changes):
    torch.manual_seed(0)
    return build_detector(ModelConfig(**SMALL | KINDS[kind] | changes)).eval()


def randomise_zeros(model: nn.Module) -> None:
    """What starts at zero would hide what stands before it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_gradients_reach_every_parameter(kind, images):
    model = small(kind)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[1, :, 100:] = True
    out = model(images, padding)
    classes = 4 if kind == "detr" else 3
    assert out.logits_KBQC.shape == (2, 2, 9, classes) and out.boxes_KBQ4.shape == (2, 2, 9, 4)
    assert out.logits_KBQC.dtype == out.boxes_KBQ4.dtype == torch.float32
    assert (out.boxes_KBQ4 > 0).all() and (out.boxes_KBQ4 < 1).all()
    randomise_zeros(model)
    out = model(images, padding)
    parts = [out] + ([out.proposals] if out.proposals else [])
    # A squared distance to something no output equals, so that no gradient is zero by symmetry.
    loss = sum((p.logits_KBQC - 3.3).square().sum() + (p.boxes_KBQ4 - 0.77).square().sum() for p in parts)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "two_stage"])  # whose ranking may swap queries
def test_what_lies_under_the_mask_does_not_matter(kind, monkeypatch):
    """Two images, each padded with noise, give what each gives alone. From the maps on: these do see the padding."""
    model = small(kind)
    randomise_zeros(model)
    strides = [8, 16, 32, 64, 128][: len(model.projections)] if len(model.projections) > 1 else [32]
    sizes_hw, padded_hw = [(128, 256), (256, 128)], (256, 384)

    def predict(maps, padding):
        monkeypatch.setattr(model, "_maps", lambda _: maps)
        with torch.no_grad():
            return model(torch.empty(0), padding)

    maps = [torch.randn(2, 64, padded_hw[0] // stride, padded_hw[1] // stride) for stride in strides]
    padding, alone = torch.ones(2, *padded_hw, dtype=torch.bool), []
    for i, (height, width) in enumerate(sizes_hw):
        padding[i, :height, :width] = False
        own = [x[[i], :, : height // stride, : width // stride] for x, stride in zip(maps, strides, strict=True)]
        alone.append(predict(own, padding[[i], :height, :width]))
    together = predict(maps, padding)
    for name in ("logits_KBQC", "boxes_KBQ4"):
        a, b = torch.cat([getattr(one, name) for one in alone], dim=1), getattr(together, name)
        assert (a - b).abs().max() < 1e-5
        assert (b[:, 0] - b[:, 1]).abs().max() > 1e-3  # as two images should


def test_refinement_detaches_between_layers(images):
    """With refinement, the loss of a later layer's box does not reach an earlier layer's box head."""
    model = small("refine")
    out = model(images, torch.zeros(2, 96, 128, dtype=torch.bool))
    out.boxes_KBQ4[1].sum().backward()
    first, second = (head.layers[-1].bias.grad for head in model.decoder.box_heads)
    assert first.abs().sum() == 0 and second.abs().sum() > 0


def test_tied_and_separate_heads():
    base, refined, two_stage = small("base"), small("refine"), small("two_stage")
    assert base.decoder.box_heads[0] is base.decoder.box_heads[1]
    assert refined.decoder.box_heads[0] is not refined.decoder.box_heads[1]
    assert two_stage.queries.box_head is not two_stage.decoder.box_heads[1]


def test_initial_values():
    for kind, size_bias in (("base", [-2.0]), ("refine", [-2.0, 0.0]), ("two_stage", [0.0, 0.0])):
        model = small(kind)
        heads = list(dict.fromkeys(model.decoder.box_heads))
        assert [head.layers[-1].bias[2:].tolist() for head in heads] == [[b, b] for b in size_bias], kind
        assert all(
            head.layers[-1].bias[:2].abs().sum() == 0 and head.layers[-1].weight.abs().sum() == 0 for head in heads
        )
        assert model.decoder.class_heads[0].bias.tolist() == pytest.approx([-math.log(99)] * 3)
    offsets = small("base").encoder.layers[0].attention.sample.sampling_offsets
    assert offsets.weight.abs().sum() == 0
    grid = offsets.bias.view(4, 4, 4, 2)  # heads, levels, points, xy: 4 heads look along the axes
    assert torch.equal(grid[:, 0, 0].round().abs().sum(-1), torch.ones(4))
    assert torch.equal(grid[:, :, 3], 4 * grid[:, :, 0])


def test_frozen_backbone_trains_the_last_three_stages():
    backbone = ResNet("resnet18", num_maps=3, dilation=False, norm=FrozenBatchNorm2d, freeze_stem=True)
    trains = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trains == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize("dilation", [False, True])
def test_backbone_maps(name, dilation):
    backbone = ResNet(name, num_maps=3, dilation=dilation, norm=group_norm, freeze_stem=False)
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 96, 64))
    assert [m.shape[1] for m in maps] == backbone.channels
    assert [96 // m.shape[2] for m in maps] == backbone.strides == [8, 16, 16 if dilation else 32]


def test_sine_position_is_that_of_the_unpadded_part():
    padding = torch.ones(1, 6, 8, dtype=torch.bool)
    padding[:, :3, :4] = False
    whole = sine_position(torch.zeros(1, 3, 4, dtype=torch.bool), 16, offset=-0.5)
    assert torch.allclose(sine_position(padding, 16, offset=-0.5)[:, :3, :4], whole, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(queries="proposals"), "model.queries, model.refine_boxes"),
        (
            dict(queries="proposals", refine_boxes=True, classification="softmax"),
            "model.classification, model.queries",
        ),
        (dict(attention="dense"), "model.attention, model.num_feature_levels"),
        (
            dict(attention="dense", num_feature_levels=1, refine_boxes=True),
            "model.attention, model.refine_boxes",
        ),
        (dict(width=100), "model.width, model.num_heads"),
        (dict(num_queries=0), "model.num_queries: found 0"),
    ],
)
def test_impossible_combinations_name_their_keys(changes, message):
    with pytest.raises(UsageError, match=message):
        ModelConfig(num_classes=3, **changes)


def test_recomputed_activations_change_nothing(images):
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    gradients = []
    for recompute in (False, True):
        model = small("base").train()
        if recompute:
            model.recompute_activations()
        model(images, padding).logits_KBQC.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_boxes_stay_float32_under_autocast():
    head = BoxHead(64)
    features = torch.randn(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = head(features)
    assert found.dtype == torch.float32
    assert torch.allclose(found, head(features.float()), atol=1e-6)
