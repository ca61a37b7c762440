"""framework.evaluate: a perfect detector scores 1 through the whole command, and misuse is one line."""

import argparse
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from data_tools.sample import FINISHED_SET, Sample
from framework import config as configuration
from framework import evaluate
from framework.engine import checkpoint
from framework.engine.ranks import Ranks
from framework.errors import InputError, UsageError
from framework.evaluation.coco import METRICS
from framework.models.build import build_detector
from framework.models.weights import to_published
from framework.trained import Trained
from tests.colours import FindsColours, painted
from tests.data.shards import CLASSES, make_sample, write_shards
from tests.paths import REPOSITORY, data_folder

TINY = ["model.backbone.name=resnet18", "model.backbone.norm=group", "model.width=32", "model.num_heads=2",
        "model.encoder_layers=1", "model.decoder_layers=2", "model.ffn_width=32", "model.num_queries=12",
        "model.num_classes=3", "data.sizes=[64]", "data.workers=0"]  # fmt: skip


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Five images of different sizes with a red starfish (label 1) and mostly a blue stingray (label 2)."""
    samples = []
    for n in range(5):
        size = (120 + 20 * n, 160 - 10 * n)
        red, blue = (10, 10 + n, 50 + n, 60), (60, 70, 110, 90 + 5 * n) if n else None
        file = io.BytesIO()
        painted(size, red, blue).save(file, "PNG")
        boxes = [(1, red)] + ([(2, blue)] if blue else [])
        samples.append((file.getvalue(), Sample(
            image_id=n, file_name=f"{n}.png", width=size[0], height=size[1],
            boxes_xyxy_px=[list(map(float, box)) for _, box in boxes], labels=[label for label, _ in boxes],
            category_ids=[CLASSES[label].category_id for label, _ in boxes],
            areas=[float((x2 - x1) * (y2 - y1)) for _, (x1, y1, x2, y2) in boxes],
            iscrowd=[0] * len(boxes), annotation_ids=list(range(len(boxes))), segmentation=[[]] * len(boxes),
        )))  # fmt: skip
    return write_shards(tmp_path_factory.mktemp("colours") / "set", samples)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    samples = [make_sample(1000 + n, boxes=n % 4, height=40 + 3 * n, width=60) for n in range(9)]
    return write_shards(tmp_path_factory.mktemp("noise") / "set", samples)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of an untrained small model, as framework/train.py leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = configuration.load(None, TINY)
    torch.manual_seed(0)
    weights = dict(build_detector(config.model).named_parameters())
    state = {"step": 7, "classes": [asdict(c) for c in CLASSES], "data": {}, "lr": {}}
    tensors = {f"weight/{name}": tensor.detach().contiguous() for name, tensor in weights.items()}
    checkpoint._write(folder / "checkpoints" / "step-00000007", tensors, {}, state)
    configuration.save(config, folder / "config.yaml")
    return folder


def alone(monkeypatch):
    monkeypatch.setattr(evaluate, "init_ranks", lambda: Ranks(0, 1, 0, torch.device("cpu")))


@pytest.mark.parametrize("labels", ["contiguous", "category_id"])
def test_a_perfect_detector(labels, colours, monkeypatch, tmp_path, capsys):
    number = [c.category_id if labels == "category_id" else place for place, c in enumerate(CLASSES)]
    num_classes = 91 if labels == "category_id" else 3
    settings = [
        *TINY,
        f"data.labels={labels}",
        f"model.num_classes={num_classes}",
        "data.sizes=[200]",
        "eval.batch=2",
    ]
    trained = Trained(
        FindsColours(num_classes, number[1], number[2]),
        configuration.load(None, settings),
        CLASSES,
        Path("weights"),
    )
    monkeypatch.setattr(evaluate, "load_trained", lambda *_: trained)
    alone(monkeypatch)
    assert evaluate.main(["--run", "unused", "--data", str(colours), "--out", str(tmp_path / "out.json")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    numbers = json.loads(last)
    assert numbers["AP50"] == numbers["AP75"] == pytest.approx(1.0)
    assert numbers["AP"] > 0.9 and numbers["images"] == 5 and numbers["data"] == str(colours)
    assert lines[1].startswith("AP50") and lines[1].endswith("= 1.000") and "size thresholds of COCO" in lines[12]
    assert json.loads((tmp_path / "out.json").read_text()) == numbers


def test_a_run_is_evaluated_and_repeats_itself(run_folder, shards, monkeypatch, capsys):
    alone(monkeypatch)
    arguments = ["--run", str(run_folder), "--data", str(shards), "--image-side", "128"]
    outputs = []
    for more in ([], ["data.workers=1"]):
        assert evaluate.main([*arguments, *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    numbers = json.loads(outputs[0].splitlines()[-1])
    assert set(METRICS) <= set(numbers) and numbers["image_side"] == 128
    assert numbers["source"].endswith("step-00000007") and numbers["detections"] == 9 * 12 * 3
    assert "scaled by (128 / 640)^2 to images of side 128 px" in outputs[0]


@pytest.mark.data
def test_detections_of_cocoapi(capsys):
    folder = data_folder("coco_open/eval_parity")
    results, truth = (
        folder / "instances_val2014_fakebbox100_results.json",
        folder / "instances_val2014_100.json",
    )
    assert evaluate.main(["--detections", str(results), "--annotations", str(truth)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    expected = json.loads((folder / "expected_bbox.json").read_text())
    for name, line in zip(METRICS, lines, strict=False):
        assert line.split()[0] == name and line.split()[-1] == f"{expected['published'][name]:.3f}"
    numbers = json.loads(last)
    assert {name: numbers[name] for name in METRICS} == pytest.approx(expected["pycocotools_2_0_11"], abs=1e-9)


@pytest.mark.parametrize("arguments, message", [
    ([], "expected --run RUN, or --weights FILE with --config FILE, or --detections JSON"),
    (["--run", "r", "--weights", "w", "--config", "c"], "expected either --run RUN, or --weights FILE"),
    (["--weights", "w"], "expected either --run RUN, or --weights FILE with --config FILE"),
    (["--detections", "d"], "expected --detections and --annotations together"),
    (["--detections", "d", "--annotations", "a", "--run", "r"], "expected either a model .* not both"),
    (["--run", "r", "--image-side", "0"], "--image-side 0: expected pixels"),
    (["--run", "nowhere"], "--run nowhere: no config.yaml"),
    (["--weights", str(REPOSITORY), "--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
    (["--weights", "w", "--config", "nowhere.yaml"], "--weights w: no such file; expected a .pth"),
    (["--run", "r", "--out", str(REPOSITORY)], f"^--out: {REPOSITORY} is a folder; expected the name of a file"),
    (["--detections", "d", "--annotations", "a", "--out", f"{__file__}/new/x"], "^--out: .*_evaluate.py is a file; "
                                                                                "expected a folder"),
])  # fmt: skip
def test_misuse(arguments, message, monkeypatch):
    alone(monkeypatch)
    with pytest.raises(UsageError, match=message):
        evaluate.main(arguments)


def test_a_run_without_a_checkpoint(tmp_path):
    configuration.save(configuration.load(None, TINY), tmp_path / "config.yaml")
    (tmp_path / "checkpoints" / "step-00000003.tmp").mkdir(parents=True)
    with pytest.raises(UsageError, match="no whole checkpoint in .*checkpoints"):
        evaluate.main(["--run", str(tmp_path)])


def test_a_run_without_validation_data(run_folder):
    with pytest.raises(UsageError, match="--data: expected a shard folder"):
        evaluate.main(["--run", str(run_folder)])


def test_data_that_is_no_shard_set_is_named(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for data, found in ("nowhere", "is not there"), ("empty", "has no manifest.json"):
        folder = tmp_path / data
        message = f"{folder} {found}; {FINISHED_SET}"
        for name, said in (["--data", str(folder)], "--data"), ([f"data.val={folder}"], "data.val"):
            with pytest.raises(UsageError, match=f"^{said}: {message}$"):
                evaluate.main(["--run", str(run_folder), *name])


def test_other_classes_are_refused(run_folder, shards, tmp_path, monkeypatch):
    state = checkpoint.read_state(checkpoint.newest(run_folder))
    renamed = state | {"classes": [{"name": "crab", "category_id": 3}, *state["classes"][1:]]}
    monkeypatch.setattr(checkpoint, "read_state", lambda _: renamed)
    with pytest.raises(UsageError, match="its classes are .'fish', .*, the model's .'crab', "):
        evaluate.main(["--run", str(run_folder), "--data", str(shards)])


def test_the_number_of_classes_comes_from_the_checkpoint(run_folder, shards, tmp_path, monkeypatch, capsys):
    alone(monkeypatch)
    settings = configuration.load(None, TINY)
    unknown = replace(settings, model=replace(settings.model, num_classes=None))
    configuration.save(unknown, tmp_path / "tiny.yaml")
    weights = ["--weights", str(checkpoint.newest(run_folder)), "--config", str(tmp_path / "tiny.yaml")]
    outputs = []
    for model in (weights, ["--run", str(run_folder)]):
        assert evaluate.main([*model, "--data", str(shards)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_published_file_needs_no_other_backbone_weights(shards, tmp_path, monkeypatch, capsys):
    """model.backbone.norm=frozen asks for weights: these are them. Classes nobody named are numbered."""
    alone(monkeypatch)
    frozen = ["model.backbone.norm=frozen", "model.num_classes=91", "data.labels=category_id"]
    config = configuration.load(None, [*TINY, *frozen, "model.init=elsewhere"])
    weights = tmp_path / "it's = 1 file.pth"
    torch.save({"model": to_published(build_detector(config.model)), "args": argparse.Namespace(lr=1)}, weights)
    OmegaConf.save(OmegaConf.from_dotlist([*TINY, *frozen]), tmp_path / "frozen.yaml")
    arguments = ["--weights", str(weights), "--config", str(tmp_path / "frozen.yaml")]
    assert evaluate.main([*arguments, "--data", str(shards)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["source"] == str(weights)


def test_weights_of_another_model_and_of_another_number_of_classes(run_folder, shards):
    weights = str(checkpoint.newest(run_folder) / "weights.safetensors")
    common = ["--weights", weights, "--config", str(run_folder / "config.yaml"), "--data", str(shards)]
    with pytest.raises(InputError, match="does not fit the model: .* misshapen"):
        evaluate.main([*common, "model.num_queries=13"])
    with pytest.raises(InputError, match="does not fit the model: .* misshapen"):
        evaluate.main([*common, "model.num_classes=4"])


@pytest.mark.parametrize("content, message", [
    ('{"images": []}', "not a COCO annotation file"), ("no JSON", "not JSON"), (None, "no such file"),
])  # fmt: skip
def test_bad_files(content, message, tmp_path):
    truth = tmp_path / "truth.json"
    if content is not None:
        truth.write_text(content)
    with pytest.raises(InputError) as error:
        evaluate.main(["--detections", str(truth), "--annotations", str(truth)])
    assert str(error.value).startswith(f"{truth}: ") and message in str(error.value) and "\n" not in str(error.value)
