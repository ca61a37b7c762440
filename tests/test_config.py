import sys
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from framework import config as configuration
from framework import train
from framework.config import Config, flatten
from framework.errors import UsageError
from tests.data.shards import make_sample, write_shards
from tests.paths import REPOSITORY
from tests.runs import TINY
from tests.test_train import arguments

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
TRAINABLE = "model.backbone.norm=group"


def load(*overrides, path=None):
    return configuration.load(path, [TRAINABLE, *overrides])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_says_how_it_is_run(path):
    config = configuration.load(path, [])
    assert config.train.run_dir == f"runs/{path.stem}"
    head = path.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"configs/{path.name}" in head and "Hardware:" in head and "Expected" in head


def test_the_configs_that_are_promised_exist():
    names = {"", "_box_refine", "_two_stage", "_single_scale", "_single_scale_dc5"}
    promised = {f"coco_r50_deformable{n}" for n in names} | {
        "coco_r50_detr",
        "coco_r50_detr_dc5",
        "quickstart",
        "convergence_cpu",
        "convergence_gpu",
    }
    assert promised <= {p.stem for p in CONFIGS}


def test_defaults_are_the_published_recipe():
    c = load()
    assert (c.train.global_batch, c.train.epochs, c.train.lr_drop_epochs) == (32, 50, [40])
    assert (c.optim.lr, c.optim.weight_decay, c.optim.clip_norm) == (2e-4, 1e-4, 0.1)
    assert (c.model.num_queries, c.model.ffn_width, c.model.dropout) == (300, 1024, 0.1)
    assert (c.loss.class_weight, c.loss.box_weight, c.loss.giou_weight) == (2.0, 5.0, 2.0)
    assert (c.data.sizes, c.data.max_size) == (list(range(480, 801, 32)), 1333)


def test_precedence(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochs: 7, seed: 1}\nmodel: {backbone: {norm: group, name: resnet18}}\n")
    config = configuration.load(path, ["train.epochs=9", "data.sizes=[64,96]"])
    assert (config.train.epochs, config.train.seed, config.train.run_dir) == (9, 1, "runs/mine")
    assert config.model.backbone.name == "resnet18" and config.data.sizes == [64, 96]


def test_what_is_saved_is_loaded(tmp_path):
    config = load("train.epochs=9", "model.num_classes=4")
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml", []) == config


def test_loaded_configs_are_frozen():
    with pytest.raises(AttributeError):
        load().train.epochs = 3


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.num_querys=3", "unknown key 'model.num_querys'; did you mean 'model.num_queries'?"),
        ("epochs=3", "unknown key 'epochs'; did you mean 'train.epochs'?"),
        ("model.attention=sparse", "model.attention"),
        ("train.epochs=many", "train.epochs"),
        ("model=3", "'model' is a section: set its keys, such as model.attention"),
        ("model.backbone=null", "'model.backbone' is a section"),
        ("data.sizes=4", "data.sizes: found 4, expected a list, as in [4]"),
        ("train.run_dir=", "'train.run_dir=': found no value; none is train.run_dir=null"),
        ("model.num_points=200", "model.num_points, model.num_feature_levels: found 200, 4"),
        ("train.epochs", "expected key=value"),
        ("data.sizes=[4,", "not YAML"),
        ("train.global_batch=5", "train.global_batch, train.micro_batch: found 5 and 2"),
        ("model.queries=proposals", "model.queries, model.refine_boxes"),
        ("data.labels=category_id", "data.labels, model.num_classes"),
        ("model.backbone.norm=frozen", "model.backbone.norm, model.backbone.weights"),
        ("train.max_steps=0", "train.max_steps: found 0"),
        ("optim.lr=0", "optim.lr: found 0.0, expected above 0"),
        ("loss.box_weight=-1", "loss.box_weight: found -1.0"),
        ("data.tail=keep", "data.tail"),
        ("eval.every=-1", "eval.every"),
        ("tracking.log_every=0", "tracking.log_every"),
        ("train.seed=${x}", "train.seed: Interpolation key 'x' not found"),
        ("train.seed=???", "train.seed: Missing mandatory value"),
        ("data.sizes=['???']", "data.sizes[0]: Missing mandatory value"),
        ("train.lr_drop_epochs=[40,-3]", "train.lr_drop_epochs: found [40, -3]"),
    ],
)
def test_refused(override, message):
    with pytest.raises(UsageError) as error:
        load(override)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", [name for name, value in flatten(load()).items() if isinstance(value, float)])
def test_what_is_no_number_is_refused(key):
    with pytest.raises(UsageError, match=f"^{key}: found nan"):
        load(f"{key}=nan")


def test_files_that_are_not_configs(tmp_path):
    for content, message in (
        (b"a: [", "not YAML"),
        (b"- 1\n- 2\n", "found a list"),
        (b"modell: 3", "unknown key 'modell'"),
        (b"train: {seed: '???'}", "train.seed: Missing mandatory value"),
        (b"\x80\x02}q\x00.", "not YAML: 'utf-8' codec can't decode"),
    ):
        (tmp_path / "c.yaml").write_bytes(content)
        with pytest.raises(UsageError, match=message) as error:
            load(path=tmp_path / "c.yaml")
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="No such file"):
        load(path=tmp_path / "absent.yaml")


def test_every_field_is_read_by_training(tmp_path, monkeypatch):
    """By a run of each loss, one of them resumed; what checks, copies or saves whole sections does not count."""
    read = set()

    def recording(section, name):
        code = sys._getframe(1).f_code
        if code.co_filename.startswith(str(REPOSITORY / "framework")) and "__post_init__" not in code.co_qualname:
            read.add((type(section), name))
        return object.__getattribute__(section, name)

    leaves = dict(leaf_fields(Config))
    for cls in {cls for cls, _ in leaves.values()}:
        monkeypatch.setattr(cls, "__getattribute__", recording)
    (tmp_path / "tiny.yaml").write_text(TINY)
    write_shards(tmp_path / "train", [make_sample(n) for n in range(3)])
    write_shards(tmp_path / "val", [make_sample(9)])
    settings = ["model.queries=learned", "data.workers=0", "train.global_batch=1", "train.micro_batch=1",
                "train.checkpoint_every=0"]  # fmt: skip
    for kind, steps in (("softmax", 1), ("softmax", 3), ("focal", 1)):
        changes = [f"model.classification={kind}", f"train.max_steps={steps}"]
        train.main(arguments(tmp_path, tmp_path / kind, *settings, *changes))
    # Read where a set is behind a URL (tests/data/test_remote.py), where a step is skipped (engine/test_guard.py), with
    # CUDA graphs (engine/test_graphs.py), and where a configuration is refused (engine/test_optimizer.py).
    elsewhere = ["data.cache", "data.cache_gib", "engine.compile_layers", "engine.keep_products",
                 "engine.quantized_weights", "engine.quantized_gradients", "guard.max_skipped"]  # fmt: skip
    assert [name for name, leaf in leaves.items() if leaf not in read] == elsewhere


def leaf_fields(cls, prefix=""):
    """Full key -> the dataclass that has it, its name there."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            yield from leaf_fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", (cls, f.name)


def test_apex_does_not_update_in_host_memory():
    with pytest.raises(UsageError, match="optim.impl, engine.offload_optimizer: found apex and true"):
        load("optim.impl=apex", "engine.offload_optimizer=true")


def test_boxes_are_not_refined_by_heads_that_nothing_trains():
    with pytest.raises(UsageError, match="model.refine_boxes, loss.auxiliary"):
        load("loss.auxiliary=false", "model.refine_boxes=true")
