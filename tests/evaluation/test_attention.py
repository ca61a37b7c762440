"""Whose attention is shown, and which token of the encoder looks for it."""

import pytest
import torch
from PIL import Image

from data_tools.sample import Category
from framework.config import load
from framework.evaluation.attention import look_inside, strides
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig, build_detector
from tests.models.test_build import randomise_zeros

TINY = ["model.width=32", "model.num_heads=2", "model.encoder_layers=1", "model.decoder_layers=2",
        "model.ffn_width=32", "model.num_queries=6", "model.num_classes=2", "model.backbone.norm=group",
        "model.backbone.name=resnet18", "data.sizes=[64]", "data.max_size=128", "engine.precision=fp32"]  # fmt: skip
DETR = ["model.attention=dense", "model.classification=softmax", "model.num_feature_levels=1"]
CLASSES = [Category("disc", 3), Category("ring", 7)]
IMAGE = Image.effect_noise((120, 80), 90).convert("RGB")  # resized to 96 x 64


def made(*overrides):
    config = load(None, [*TINY, *overrides])
    torch.manual_seed(3)
    model = build_detector(config.model).eval()
    randomise_zeros(model)
    return model, config


@pytest.mark.parametrize("overrides", [[], DETR])
def test_the_most_certain_query_is_chosen(overrides):
    model, config = made(*overrides)
    everyone = look_inside(model, IMAGE, config, CLASSES, queries=range(6))
    assert [one.query for one in everyone] == list(range(6)) and {one.category_id for one in everyone} <= {3, 7}
    (best,) = look_inside(model, IMAGE, config, CLASSES)
    assert (best.query, best.score) == max(((one.query, one.score) for one in everyone), key=lambda pair: pair[1])
    assert best.box_cxcywh == everyone[best.query].box_cxcywh
    assert look_inside(model, IMAGE, config, CLASSES, min_score=best.score + 1e-6) == []
    assert len(look_inside(model, IMAGE, config, CLASSES, min_score=best.score)) == 1


def test_labels_that_are_category_ids_name_the_category():
    model, config = made("data.labels=category_id", "model.num_classes=8")
    with torch.no_grad():
        model.decoder.class_heads[0].bias[5] = 9.0  # a number that no class has
    (best,) = look_inside(model, IMAGE, config, CLASSES)
    assert best.category_id in (3, 7) and best.score < 0.9


def test_the_token_in_the_middle_of_the_box_looks():
    model, config = made()
    for one in look_inside(model, IMAGE, config, CLASSES, queries=range(6)):
        encoder, decoder = one.looks
        assert (encoder.part, decoder.part) == ("encoder", "decoder") and one.strides == [8, 16, 32, 64]
        assert encoder.shapes_hw == decoder.shapes_hw == [(8, 12), (4, 6), (2, 3), (1, 2)]
        x, y = encoder.reference_n.tolist()
        assert abs(x - one.box_cxcywh[0]) <= 0.5 / 12 + 1e-6 and abs(y - one.box_cxcywh[1]) <= 0.5 / 8 + 1e-6
    looks = [one.looks[1] for one in look_inside(model, IMAGE, config, CLASSES, queries=[1, 4])]
    assert not torch.equal(looks[0].reference_n, looks[1].reference_n)  # the point each query was learnt with


def test_a_query_without_numbers_is_left_out():
    model, config = made()
    with torch.no_grad():
        model.decoder.box_heads[0].layers[-1].bias.fill_(float("nan"))
    assert look_inside(model, IMAGE, config, CLASSES) == []
    assert look_inside(*made()[:1], IMAGE, config, CLASSES, queries=[6, 2])[0].query == 2


@pytest.mark.parametrize("changes, expected", [
    (dict(num_feature_levels=5), [8, 16, 32, 64, 128]),
    (dict(num_feature_levels=1), [32]),
    (dict(num_feature_levels=1, backbone=BackboneConfig("resnet18", dilation=True)), [16]),
    (dict(num_feature_levels=4, backbone=BackboneConfig("resnet18", dilation=True)), [8, 16, 16, 32]),
])  # fmt: skip
def test_strides(changes, expected):
    with torch.device("meta"):
        model = build_detector(ModelConfig(num_classes=1, **changes))
    assert strides(model, changes["num_feature_levels"]) == expected
