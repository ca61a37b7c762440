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
from framework.models.weights import load_published, to_published

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


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_feature_levels=2, num_points=3, num_heads=1, width=96),
        dict(num_feature_levels=6, num_points=1, num_heads=16, num_queries=1, num_classes=1),
        dict(encoder_layers=0, decoder_layers=1, queries="proposals", refine_boxes=True, num_queries=2),
        dict(encoder_layers=1, decoder_layers=4, ffn_width=7, backbone=BackboneConfig("resnet34", norm="group")),
        dict(KINDS["detr"], num_heads=1, width=96, encoder_layers=0, num_queries=1),
        dict(backbone=BackboneConfig("resnet101", dilation=True)),
    ],
    ids=str,
)
def test_any_sizes(changes, images):
    sizes = SMALL | changes
    torch.manual_seed(0)
    model = build_detector(ModelConfig(**sizes)).eval()
    with torch.no_grad():
        out = model(images, torch.zeros(2, 96, 128, dtype=torch.bool))
    logits = sizes["num_classes"] + (sizes.get("classification") == "softmax")
    assert out.logits_KBQC.shape == (sizes["decoder_layers"], 2, sizes["num_queries"], logits)
    assert out.boxes_KBQ4.isfinite().all() and (out.proposals is None) == ("queries" not in sizes)
    assert load_published(build_detector(ModelConfig(**sizes)), to_published(model)).exact


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


@pytest.mark.parametrize("kind", ["refine", "two_stage"])
def test_refinement_detaches_between_layers(kind, images):
    """The loss of a layer's boxes reaches the box head of that layer only."""
    for layer in range(3):
        model = small(kind, decoder_layers=3)
        out = model(images, torch.zeros(2, 96, 128, dtype=torch.bool))
        out.boxes_KBQ4[layer].sum().backward()
        reached = [bool(head.layers[-1].bias.grad.any()) for head in model.decoder.box_heads]
        assert reached == [k == layer for k in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_tied_and_separate_heads(kind):
    """One pair of heads for all layers without refinement, one for each layer with it, one more for proposals."""
    model = small(kind, decoder_layers=3)
    separate = {"refine": 3, "two_stage": 3}.get(kind, 1)
    for heads in (model.decoder.class_heads, model.decoder.box_heads):
        assert len(heads) == 3 and len(set(heads)) == separate
        assert len({p.data_ptr() for p in heads.parameters()}) == separate * len(list(heads[0].parameters()))
    of_proposals = {name for name, _ in model.queries.named_children() if name.endswith("_head")}
    assert of_proposals == ({"class_head", "box_head"} if kind == "two_stage" else set())
    assert not set(model.queries.children()) & {*model.decoder.class_heads, *model.decoder.box_heads}


@pytest.mark.parametrize("kind", ["refine", "two_stage"])
def test_separate_heads_start_as_copies(kind):
    """Published: all are cloned from one, and only then does the first of them get its bias."""
    model = small(kind, decoder_layers=3)
    class_heads, box_heads = [*model.decoder.class_heads], [*model.decoder.box_heads]
    if kind == "two_stage":
        class_heads.append(model.queries.class_head)
        box_heads.append(model.queries.box_head)
    for first, *others in (class_heads, box_heads):
        for other in others:
            differing = {n for (n, a), b in zip(first.named_parameters(), other.parameters(), strict=True)
                         if not torch.equal(a, b)}  # fmt: skip
            assert differing == ({"layers.2.bias"} if (kind, first) == ("refine", box_heads[0]) else set())


@pytest.mark.parametrize("kind, sizes", [
    ("base", [-2, -2, -2]), ("single_scale", [-2, -2, -2]), ("refine", [-2, 0, 0]), ("two_stage", [0, 0, 0, 0]),
])  # fmt: skip
def test_initial_heads(kind, sizes):
    """Boxes start at their references, at 0.12 of the sides without proposals; every class at 0.01."""
    model = small(kind, decoder_layers=3)
    last = [head.layers[-1] for head in model.decoder.box_heads]
    class_heads = [*model.decoder.class_heads]
    if kind == "two_stage":
        last.append(model.queries.box_head.layers[-1])
        class_heads.append(model.queries.class_head)
    assert [layer.bias.tolist() for layer in last] == [[0, 0, size, size] for size in sizes]
    assert not any(layer.weight.any() for layer in last)
    for head in class_heads:
        assert head.bias.tolist() == pytest.approx([-math.log(99)] * 3)


def test_initial_boxes(images):
    """Therefore all layers predict the same boxes at first, refined ones too."""
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    for kind, side in (("base", 1 / (1 + math.exp(2))), ("refine", 1 / (1 + math.exp(2))), ("two_stage", None)):
        boxes_KBQ4 = small(kind)(images, padding).boxes_KBQ4
        torch.testing.assert_close(boxes_KBQ4[0], boxes_KBQ4[1])
        assert side is None or boxes_KBQ4[..., 2:].flatten().tolist() == pytest.approx([side] * 72)


def test_initial_heads_of_detr_are_plain():
    model = small("detr")
    assert (model.decoder.class_heads[0].bias.abs() < 0.125).all()  # uniform within 1 / sqrt(64)
    last = model.decoder.box_heads[0].layers[-1]
    assert last.weight.any() and last.bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_initial_matrices(kind):
    """Xavier in the transformer; the codes of levels and queries are normal."""
    model = small(kind)
    matrices = [p for layer in (*model.encoder.layers, *model.decoder.layers) for name, p in layer.named_parameters()
                if p.dim() > 1 and "sampling_offsets" not in name and "attention_weights" not in name]  # fmt: skip
    if kind != "detr":
        matrices += [projection[0].weight for projection in model.projections]
        assert not any(projection[0].bias.any() for projection in model.projections)
        assert model.level_codes.weight.std().item() == pytest.approx(1, abs=0.25)
    if kind == "two_stage":
        matrices += [model.queries.token_projection.weight, model.queries.code_projection.weight]
    elif kind == "detr":
        assert model.queries.position.weight.std().item() == pytest.approx(1, abs=0.1)
    else:
        assert model.queries.embedding.weight.std().item() == pytest.approx(1, abs=0.1)
        matrices.append(model.queries.reference_points.weight)
        assert not model.queries.reference_points.bias.any()
    for matrix in matrices:
        bound = math.sqrt(6 / (matrix[0].numel() + matrix[:, 0].numel()))
        assert 0.9 * bound < matrix.abs().max() <= bound


def test_initial_sampling():
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


def test_a_thinner_backbone():
    backbone = ResNet("resnet50", num_maps=2, dilation=False, norm=group_norm, freeze_stem=False, width=32)
    with torch.no_grad():
        assert [m.shape[1] for m in backbone(torch.zeros(1, 3, 64, 64))] == backbone.channels == [512, 1024]
    assert backbone.conv1.out_channels == 32
    with pytest.raises(UsageError, match="model.backbone.width: found 48, expected 16 or a multiple of 32"):
        BackboneConfig(width=48)


def test_narrow_maps_are_normalised_in_groups_of_several_channels():
    """A channel alone would lose how strong it is: two maps that differ in strength only would be the same."""
    for channels in (16, 32, 48, 64, 128):
        norm = group_norm(channels)
        assert isinstance(norm, torch.nn.GroupNorm) and channels // norm.num_groups >= 2
    assert group_norm(64).num_groups == 32


def test_dense_attention_with_refinement_differs_from_deformable_attention_alone():
    """Everything else, parameter by parameter, is that of Deformable DETR with refinement on one level."""
    one_level = dict(SMALL, num_feature_levels=1, refine_boxes=True)
    shapes = {
        kind: {name: p.shape for name, p in build_detector(ModelConfig(**one_level, attention=kind)).named_parameters()
               if "attention.sample" not in name and "attention.attend" not in name}
        for kind in ("deformable", "dense")
    }  # fmt: skip
    assert shapes["dense"] == shapes["deformable"]
    torch.manual_seed(0)
    model = build_detector(ModelConfig(**one_level, attention="dense")).eval()
    images, padding = torch.randn(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.bool)
    for head in model.decoder.box_heads:  # so that every layer moves its boxes
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    boxes_KQ4 = model(images, padding).boxes_KBQ4[:, 0]
    assert not torch.allclose(boxes_KQ4[0], boxes_KQ4[1])
    for head in model.decoder.box_heads[1:]:  # a head that moves nothing leaves the boxes where the last layer put them
        torch.nn.init.zeros_(head.layers[-1].weight)
        torch.nn.init.zeros_(head.layers[-1].bias)
    boxes_KQ4 = model(images, padding).boxes_KBQ4[:, 0]
    assert torch.allclose(boxes_KQ4[0], boxes_KQ4[1], atol=1e-5)


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
            dict(attention="dense", num_feature_levels=1, refine_boxes=True, queries="proposals"),
            "model.attention, model.queries",
        ),
        (dict(width=100), "model.width, model.num_heads"),
        (dict(num_queries=0), "model.num_queries: found 0"),
    ],
)
def test_impossible_combinations_name_their_keys(changes, message):
    with pytest.raises(UsageError, match=message):
        ModelConfig(num_classes=3, **changes)


def test_maps_are_the_same_in_either_order_of_memory(images, monkeypatch):
    found = []
    for capability, last in (("AVX2", False), ("AVX512", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda said=capability: said)
        backbone = small("base", backbone=BackboneConfig("resnet10")).backbone.train()
        maps = backbone(images)
        assert all(x.is_contiguous(memory_format=torch.channels_last) == last for x in maps)
        sum(x.square().mean() for x in maps).backward()
        found.append([*maps, *(p.grad for p in backbone.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_maps_that_group_norms_normalise_are_as_they_were_on_every_cpu(images, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    grouped = small("base", backbone=BackboneConfig("resnet10", norm="group", width=32)).backbone.train()
    assert all(x.is_contiguous() for x in grouped(images))


def test_boxes_stay_float32_under_autocast():
    head = BoxHead(64)
    features = torch.randn(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = head(features)
    assert found.dtype == torch.float32
    assert torch.allclose(found, head(features.float()), atol=1e-6)


@pytest.mark.parametrize("kind", ["two_stage", "detr"])
def test_no_mask_is_a_mask_of_nothing(kind):
    model = small(kind).eval()
    images = torch.randn(2, 3, 96, 64)
    one, other = model(images), model(images, torch.zeros(2, 96, 64, dtype=torch.bool))
    torch.testing.assert_close(one.logits_KBQC, other.logits_KBQC)
    torch.testing.assert_close(one.boxes_KBQ4, other.boxes_KBQ4)
