"""Weights in and out: every kind of file that is read, and those that are refused."""

import argparse
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from framework.errors import InputError
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig, build_detector
from framework.models.weights import WEIGHTS_FILE, load_published, to_published

TINY = dict(width=32, num_heads=2, encoder_layers=1, decoder_layers=2, ffn_width=32, num_queries=5, num_classes=3,
            num_feature_levels=2, backbone=BackboneConfig("resnet18"))  # fmt: skip
KINDS = {
    "base": {},
    "two_stage": dict(refine_boxes=True, queries="proposals"),
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
    assert load_published(target, tmp_path / "r50.pth").exact
    assert not differing(source.state_dict(), target.state_dict())


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, save_old])
def test_code_in_a_file_does_not_run(save, tmp_path):
    file, trace = tmp_path / "evil.pth", tmp_path / "it ran"
    save({"model": {"weight": torch.zeros(1)}, "args": Code(trace)}, file)
    refused(file, "cannot be loaded safely, or is damaged")
    assert not trace.exists()
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


def test_files_without_a_state_dict(tmp_path):
    refused(tmp_path / "absent.pth", "no such file")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "holds no state dict")


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
    assert "4 misshapen (class_embed.0.weight: found [7, 32], expected [3, 32]" in str(report)


def test_what_does_not_fit_exactly_is_refused_and_changes_nothing():
    good = to_published(tiny(seed=1))
    for tensors, message in (
        (to_published(tiny(seed=1, num_classes=7)), "4 misshapen"),
        ({name: t for name, t in good.items() if name != "input_proj.0.0.weight"}, "1 missing .projections.0.0.weight"),
        (good | {"query_embed.bias": torch.zeros(5)}, "1 unexpected .query_embed.bias"),
    ):
        model = tiny()
        before = copied(model)
        with pytest.raises(InputError, match=f"the state dict does not fit the model: .*{message}"):
            load_published(model, tensors)
        assert not differing(before, model.state_dict())


def test_nothing_that_fits_is_refused_even_when_not_strict():
    with pytest.raises(InputError, match="0 tensors loaded"):
        load_published(tiny(), {"weight": torch.zeros(1)}, strict=False)


def test_a_torchvision_resnet_fills_the_backbone_only(tmp_path):
    source, target = tiny(), tiny(seed=1)
    before, backbone = copied(target), source.backbone.state_dict()
    tracked = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(1)
               for name in backbone if name.endswith("running_mean")}  # fmt: skip
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(backbone | tracked | classifier, tmp_path / "resnet18.pth")
    assert load_published(target, tmp_path / "resnet18.pth").exact
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
