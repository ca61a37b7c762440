"""Weights in and out: every kind of file that is read, and those that are refused."""

import argparse
import os
import pickle
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from framework import config as configuration
from framework.errors import InputError
from framework.files import sha256_of
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig, build_detector
from framework.models.weights import WEIGHTS_FILE, load_published, to_published
from tests.paths import REPOSITORY

TINY = dict(width=32, num_heads=2, encoder_layers=1, decoder_layers=2, ffn_width=32, num_queries=5, num_classes=3,
            num_feature_levels=2, backbone=BackboneConfig("resnet18"))  # fmt: skip
KINDS = {
    "base": {},
    "box_refine": dict(refine_boxes=True),
    "two_stage": dict(refine_boxes=True, queries="proposals"),
    "single_scale": dict(num_feature_levels=1),
    "detr": dict(num_feature_levels=1, attention="dense", classification="softmax"),
}

save_old = partial(torch.save, _use_new_zipfile_serialization=False)  # as before torch 1.6


def tiny(kind="base", seed=0, **changes):
    """A model of which no two tensors are alike, buffers included."""
    model = build_detector(ModelConfig(**TINY | KINDS[kind] | changes))
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_()
    return model


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(a, b):
    """The names whose tensors are not bit for bit the same."""
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_published_names_there_and_back(kind):
    source, target = tiny(kind), tiny(kind, seed=1)
    published = to_published(source)
    assert all(name.startswith(("backbone.0.body", "transformer.", "input_proj", "query_embed", "class_embed",
                                "bbox_embed")) for name in published)  # fmt: skip
    report = load_published(target, published)
    assert report.exact and set(report.loaded) == set(published)
    assert not differing(source.state_dict(), target.state_dict())


def test_a_published_file(tmp_path):
    source, target = tiny(), tiny(seed=1)
    content = {"model": to_published(source), "args": argparse.Namespace(lr=2e-4, masks=False), "epoch": 49}
    torch.save(content, tmp_path / "r50.pth")
    report = load_published(target, tmp_path / "r50.pth", expected="detector")
    assert report.exact and report.sha256 == sha256_of(tmp_path / "r50.pth")
    assert report.lines() == [f"{len(report.loaded)} tensors fit"]
    assert not differing(source.state_dict(), target.state_dict())


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path),)


def pickled(content, path, protocol):
    path.write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("save", [torch.save, save_old, *(partial(pickled, protocol=p) for p in (0, 2, 4, 5))])
def test_code_in_a_file_does_not_run_and_is_named(save, tmp_path, recwarn):
    file, trace = tmp_path / "evil.pth", tmp_path / "it ran"
    save({"model": {"weight": 0.5}, "args": Code(trace)}, file)
    refused(file, "cannot be loaded safely, or is damaged: it holds a pickle that wants os.makedirs")
    assert not trace.exists() and not recwarn
    pickle.loads(pickle.dumps(Code(trace)))
    assert trace.exists()  # so it could have


@pytest.mark.parametrize("name, save, share", [
    ("cut.safetensors", save_file, 0),
    ("cut.safetensors", save_file, 0.9),
    ("cut.pth", torch.save, 0),
    ("cut.pth", torch.save, 0.9),
    ("old.pth", save_old, 0.9),
    ("old.pth", save_old, 0.06),
])  # fmt: skip
def test_truncated_files(name, save, share, tmp_path):
    path = tmp_path / name
    save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "cannot be loaded safely, or is damaged")


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 a zip", bytes(range(256))])
@pytest.mark.parametrize("suffix, writer", [("pth", "torch.save"), ("safetensors", "safetensors")])
def test_files_of_another_kind(content, suffix, writer, tmp_path):
    (tmp_path / f"x.{suffix}").write_bytes(content)
    refused(tmp_path / f"x.{suffix}", f"not a file that {writer} wrote, or cut short")


def test_files_without_a_state_dict(tmp_path):
    torch.save({1: torch.zeros(1)}, tmp_path / "number.pth")
    refused(tmp_path / "number.pth", "holds no state dict; found the keys 1")
    refused(tmp_path / "absent.pth", "no such file")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "holds no state dict; found list")
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "holds no state dict; found the keys state_dict, epoch, expected")


def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        load_published(tiny(), path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_other_classes_fit_but_for_the_class_heads():
    source, target = tiny(num_classes=7), tiny(seed=1)
    before = copied(target)
    report = load_published(target, to_published(source), strict=False)
    kept = {name for name in before if "class_heads" in name}
    assert report.misshapen == [
        f"class_embed.{layer}.{leaf}: found {[7, *rest]}, expected {[3, *rest]}"
        for layer in (0, 1)
        for leaf, rest in (("weight", [32]), ("bias", []))
    ]
    assert not report.missing and not report.unexpected
    assert differing(source.state_dict() | {name: before[name] for name in kept}, target.state_dict()) == set()
    assert report.lines() == [
        f"{len(report.loaded)} tensors fit",
        "model.num_classes, as class logits: 7 in the file, 3 in the model",
        "4 misshapen: class_embed.*.weight: found [7, 32], expected [3, 32] (2), "
        "class_embed.*.bias: found [7], expected [3] (2)",
    ]


def test_what_does_not_fit_exactly_is_refused_and_changes_nothing():
    good = to_published(tiny(seed=1))
    for tensors, message in (
        (to_published(tiny(seed=1, num_classes=7)), "4 misshapen"),
        ({name: t for name, t in good.items() if name != "input_proj.0.0.weight"}, "1 missing: projections.0.0.weight"),
        (good | {"query_embed.bias": torch.zeros(5)}, "1 unexpected: query_embed.bias"),
        (good | {"class_embed.0.bias": torch.zeros(3)},
         "1 conflicting: class_embed.0.bias: not the same in all layers, one tensor in the model; the last one counts"),
        (good | {"class_embed.0.bias": torch.zeros(3, dtype=torch.int32)},
         "1 misshapen: class_embed.0.bias: found int32 [3], expected [3]"),
        (good | {"class_embed.0.bias": torch.zeros(3, dtype=torch.complex64)},
         "1 misshapen: class_embed.0.bias: found complex64 [3], expected [3]"),
        (good | {"class_embed.0.bias": torch.zeros(3).to_sparse()},
         "1 misshapen: class_embed.0.bias: found sparse_coo [3], expected [3]"),
    ):  # fmt: skip
        model = tiny()
        before = copied(model)
        with pytest.raises(InputError, match=f"the state dict does not fit the model: .*{re.escape(message)}"):
            load_published(model, tensors)
        assert not differing(before, model.state_dict())


def test_nothing_that_fits_is_refused_even_when_not_strict():
    with pytest.raises(
        InputError, match="the state dict does not fit the model: 0 tensors fit; .*1 unexpected: weight"
    ):
        load_published(tiny(), {"weight": torch.zeros(1)}, strict=False)


def test_a_torchvision_resnet_fills_the_backbone_only(tmp_path):
    source, target = tiny(), tiny(seed=1)
    before, backbone = copied(target), source.backbone.state_dict()
    tracked = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(1)
               for name in backbone if name.endswith("running_mean")}  # fmt: skip
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(backbone | tracked | classifier, tmp_path / "resnet18.pth")
    assert load_published(target, tmp_path / "resnet18.pth", expected="backbone").exact
    assert not differing(source.backbone.state_dict(), target.backbone.state_dict())
    assert differing(before, target.state_dict()) == {f"backbone.{name}" for name in backbone}


def test_an_own_checkpoint_of_tied_heads(tmp_path):
    source = tiny()
    tensors = dict(source.named_parameters()) | dict(source.named_buffers())  # tied ones once
    assert len(tensors) < len(source.state_dict())
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE)
    for path in (tmp_path, tmp_path / WEIGHTS_FILE):
        target = tiny(seed=1)
        report = load_published(target, path)
        assert report.exact and set(report.loaded) == set(tensors)
        assert not differing(source.state_dict(), target.state_dict())


def changed_settings(report):
    return [line.split(":")[0] for line in report.settings]


@pytest.mark.parametrize(
    "changes, keys",
    [
        (dict(num_queries=7), ["model.num_queries"]),
        (dict(num_feature_levels=3), ["model.num_feature_levels"]),
        (dict(ffn_width=64), ["model.ffn_width"]),
        (dict(num_points=3), ["model.num_heads x model.num_points"]),
        (dict(num_heads=4), ["model.num_heads x model.num_points"]),
        (dict(width=64), ["model.width"]),
        (dict(encoder_layers=2), ["model.encoder_layers"]),
        (dict(decoder_layers=1), ["model.decoder_layers"]),
        (dict(refine_boxes=True), ["model.refine_boxes"]),
        (dict(refine_boxes=True, queries="proposals"), ["model.queries", "model.refine_boxes"]),
        (dict(backbone=BackboneConfig("resnet34")), ["model.backbone.name"]),
        (dict(backbone=BackboneConfig("resnet50")), ["model.backbone.name"]),
        (dict(backbone=BackboneConfig("resnet18", norm="group")), ["model.backbone.norm"]),
        (KINDS["detr"], ["model.attention", "model.num_feature_levels", "model.num_classes, as class logits"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("own", [False, True])
def test_the_report_names_the_settings_to_change(changes, keys, own):
    source = tiny(**changes)
    tensors = dict(source.named_parameters()) | dict(source.named_buffers()) if own else to_published(source)
    report = load_published(tiny(seed=1), tensors, strict=False)
    assert changed_settings(report) == keys and not report.exact


def test_one_kind_of_file_is_not_taken_for_the_other(tmp_path):
    model = tiny()
    before = copied(model)
    torch.save(tiny(seed=1).backbone.state_dict(), tmp_path / "resnet18.pth")
    torch.save({"model": to_published(tiny(seed=1))}, tmp_path / "detector.pth")
    with pytest.raises(InputError, match=r"resnet18.pth: found a ResNet alone, expected .* model.backbone.weights"):
        load_published(model, tmp_path / "resnet18.pth", strict=False, expected="detector")
    with pytest.raises(InputError, match=r"detector.pth: found no torchvision ResNet .* belongs in model.init"):
        load_published(model, tmp_path / "detector.pth", strict=False, expected="backbone")
    assert not differing(before, model.state_dict())


def test_another_resnet_is_named():
    with pytest.raises(InputError, match="model.backbone.name: resnet34 in the file, resnet18 in the model; .* unexp"):
        load_published(tiny(), tiny(backbone=BackboneConfig("resnet34")).backbone.state_dict(), expected="backbone")


def test_heads_that_a_file_does_not_tie_end_as_the_last_layer_s():
    source, target = tiny(refine_boxes=True), tiny(seed=1)
    report = load_published(target, to_published(source), strict=False)
    assert [line.split(":")[0] for line in report.conflicting][:2] == ["class_embed.0.weight", "class_embed.0.bias"]
    assert torch.equal(target.decoder.class_heads[0].weight, source.decoder.class_heads[1].weight)


def test_the_fine_tuning_config_takes_what_was_trained_on_coco(tmp_path):
    """The published two-stage model has 91 logits; everything but the class heads fits a set with 7 classes."""
    config = configuration.load(REPOSITORY / "configs/finetune_r50_two_stage.yaml", ["model.num_classes=7"]).model
    published = to_published(build_detector(replace(config, num_classes=91)))
    torch.save({"model": published, "args": argparse.Namespace(two_stage=True)}, tmp_path / "published.pth")
    report = load_published(build_detector(config), tmp_path / "published.pth", strict=False)
    assert report.lines()[1:] == [
        "model.num_classes, as class logits: 91 in the file, 7 in the model",
        "28 misshapen: class_embed.*.weight: found [91, 256], expected [7, 256] (7), "
        "transformer.decoder.class_embed.*.weight: found [91, 256], expected [7, 256] (7), "
        "class_embed.*.bias: found [91], expected [7] (7), and 1 more",
    ]


def test_weights_that_are_no_numbers_are_refused():
    model = tiny()
    before = copied(model)
    broken = to_published(tiny(seed=1)) | {"query_embed.weight": torch.full((5, 64), float("nan"))}
    with pytest.raises(InputError, match="1 tensors hold NaN or infinity: query_embed.weight; expected"):
        load_published(model, broken, strict=False)
    assert not differing(before, model.state_dict())


def test_names_that_were_saved_inside_a_wrapper(tmp_path):
    source, target = tiny(), tiny(seed=1)
    torch.save({f"module.{name}": tensor for name, tensor in to_published(source).items()}, tmp_path / "ddp.pth")
    assert load_published(target, tmp_path / "ddp.pth").exact
    assert not differing(source.state_dict(), target.state_dict())
