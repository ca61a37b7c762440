"""framework.plan: what it says is what training would do, and what cannot be trained is refused in one line."""

import json

import pytest

from framework import plan
from framework.data import order
from framework.errors import InputError, UsageError
from tests.data.shards import make_sample, write_shards
from tests.paths import REPOSITORY

SMALL = ["model.backbone.name=resnet10", "model.backbone.norm=group", "model.backbone.width=32", "model.width=64",
         "model.num_heads=4", "model.ffn_width=128", "model.encoder_layers=1", "model.decoder_layers=1",
         "model.num_queries=20"]  # fmt: skip
CLASSES = "model.num_classes=7"


@pytest.fixture
def run(capsys):
    """Exit code, text and JSON of the command for a small model on 2 x 4 GPUs."""

    def call(*arguments):
        code = plan.main(["--nodes", "2", "--gpus-per-node", "4", "--size", "64", "96", *arguments, *SMALL])
        text, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
        return code, text, json.loads(line)

    return call


def test_steps_and_rates_are_those_of_training(run, tmp_path):
    code, text, found = run(
        "--images", "1005", "--out", str(tmp_path / "plan.json"), CLASSES, "train.global_batch=64",
        "train.micro_batch=4", "train.epochs=10", "train.lr_drop_epochs=[6,20]", "optim.warmup_steps=5",
    )  # fmt: skip
    assert code == 0 and json.loads((tmp_path / "plan.json").read_text()) == found
    assert found["batch"] == {"world": 8, "global_batch": 64, "micro_batch": 4, "accumulation": 2}
    assert found["epochs"] == {"images": 1005, "steps_per_epoch": 15, "steps": 150, "tail": 45}
    assert [(row["step"], row["rest"]) for row in found["schedule"]] == [
        (0, pytest.approx(2e-4 / 5)), (4, 2e-4), (90, pytest.approx(2e-5))
    ]  # fmt: skip
    assert found["schedule"][1]["backbone"] == pytest.approx(2e-5)
    assert "the last 45 images of each epoch's order are dropped" in text
    assert "the recipe is for 32 images a step, not 64" in text
    assert "each of 960 images goes to one rank once, 45 are left out, 0 slots masked" in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("settings", [[], ["engine.activation_checkpointing=true", "engine.zero_stage=0"]])
def test_the_largest_micro_batch_fits_and_one_more_does_not(run, settings):
    _, text, found = run(CLASSES, *settings)
    largest = found["largest_micro_batch"]["16"]
    assert f"16 GB {largest}, " in text
    for images, fits in ((largest, True), (largest + 1, False)):
        sizes = [f"train.micro_batch={images}", f"train.global_batch={8 * images}"]
        [row] = [row for row in run(CLASSES, *settings, *sizes)[2]["stages"] if row["configured"]]
        assert (row["memory"]["total"] <= plan.COUNTED * 16e9) == fits


def test_the_recipe_s_batch_gets_no_warning_and_a_masked_tail_is_counted(run):
    _, text, found = run("--images", "70", CLASSES, "data.tail=mask")
    assert "the recipe is for" not in text and "train.lr_drop_epochs" not in text
    assert "the rate does not drop at 40" in run("--images", "70", CLASSES, "data.tail=mask", "train.epochs=40")[1]
    assert found["assignment"] == {
        "images": 70, "ranks": 8, "steps": 3, "once": 70, "left_out": 0, "masked": 26, "order": "full",
        "grouped_by_shape": False, "from_shards": False, "faults": [],
    }  # fmt: skip


@pytest.mark.parametrize("broken, fault", [
    (lambda share, rank: share if rank else share[:0], "do not all have the same number"),
    (lambda share, rank: share if rank else [one * 0 for one in share], "are taken more than once"),
])  # fmt: skip
def test_a_wrong_assignment_is_found(run, monkeypatch, broken, fault):
    monkeypatch.setattr(plan, "rank_share", lambda batches, rank, world, sizes: broken(
        order.rank_share(batches, rank, world, sizes), rank))  # fmt: skip
    code, text, found = run("--images", "64", CLASSES, "train.global_batch=16")
    assert code == 1 and fault in text and found["assignment"]["faults"]


def test_classes_order_and_sizes_come_from_the_shards(run, tmp_path):
    samples = [make_sample(n, boxes=1, height=40 + 3 * n) for n in range(37)]
    shards = write_shards(tmp_path / "set", samples)
    data = [f"data.train={shards}", "data.order=block", "data.group_by_shape=true", "train.global_batch=16"]
    code, _, found = run(*data)
    assert code == 0 and found["epochs"] == {"images": 37, "steps_per_epoch": 2, "steps": 100, "tail": 5}
    known = {"once": 32, "order": "block", "grouped_by_shape": True, "from_shards": True, "faults": []}
    assert known.items() <= found["assignment"].items()
    assert run(*data, "--images", "118287")[2]["epochs"]["steps_per_epoch"] == 7392


def test_without_shards_what_depends_on_them_is_left_out(run):
    code, text, found = run(CLASSES, "data.train=not/here")
    assert code == 0 and found["epochs"] is None and found["schedule"] is None and found["assignment"] is None
    assert "there are no shards at data.train=not/here; --images N plans for N" in text
    assert len(found["stages"]) == 4


def test_sharding_pays_for_a_large_backbone_only(run):
    small = run(CLASSES, "train.micro_batch=1", "train.global_batch=8", "--gpu-gib", "0.0001")
    large = run(CLASSES, "--backbone-parameters", "2e9", "--gpu-gib", "20", "model.backbone.norm=frozen",
                "model.backbone.weights=not/read")  # fmt: skip
    alone = run(CLASSES, "--nodes", "1", "--gpus-per-node", "1", "train.micro_batch=1", "train.global_batch=1")
    assert alone[2]["pays"]["least_state"] == 0 and "no stage takes less than stage 0" in alone[1]
    assert small[2]["pays"]["least_state"] == 1  # others have buckets that are larger than the model
    assert "no stage fits 0.0001 GiB: set a smaller train.micro_batch or data.max_size or engine.act" in small[1]
    pays = large[2]["pays"]
    assert pays["smallest_that_fits"] == 2 and pays["least_state"] > 0 and pays["saved_share"] > 0.4
    assert "ZeRO pays: stage" in large[1] and "the smallest stage that fits 20 GiB: 2" in large[1]
    assert large[2]["parameters"] - small[2]["parameters"] == large[2]["backbone_added"]
    totals = [row["memory"]["total"] for row in large[2]["stages"]]
    assert totals[0] > totals[1] > totals[2]


def test_cuda_graphs_need_the_padded_batch_s_activations_twice(run):
    """As much, by the plan, as a batch of the padded size needs, a second time, and two copies of the gradients."""
    plain, graphs = (run(CLASSES, *more) for more in ([], ["engine.cuda_graphs=true"]))
    padded = run("--size", "64", "128", "--", CLASSES)[2]
    assert plain[2]["size_hw"] == [64, 96] and graphs[2]["size_hw"] == [64, 128]
    assert "graphs" in graphs[1] and "graphs" not in plain[1]
    memory, of_padded = (one["stages"][1]["memory"] for one in (graphs[2], padded))
    assert memory["graphs"] == of_padded["activations"] + 2 * 4 * graphs[2]["trainable"]
    assert memory["total"] == of_padded["total"] + memory["graphs"] and of_padded["graphs"] == 0
    assert graphs[2]["largest_micro_batch"]["80"] < 0.55 * padded["largest_micro_batch"]["80"]


def test_precision_checkpointing_and_offload_reach_the_plan(run):
    _, text, plain = run(CLASSES, "engine.precision=fp32")
    assert [row["dtype"] for row in plain["stages"]] == ["fp32"] * 4
    assert [row["configured"] for row in plain["stages"]] == [False, True, False, False]
    changed = run(CLASSES, "engine.activation_checkpointing=true", "engine.offload_optimizer=true",
                  "engine.zero_stage=2")  # fmt: skip
    assert [row["dtype"] for row in changed[2]["stages"]] == ["fp32", "bf16", "bf16", "bf16"]
    memory = changed[2]["stages"][2]["memory"]
    assert memory["optimizer"] == 0 and memory["host"] == plain["stages"][2]["memory"]["optimizer"]
    assert memory["activations"] == changed[2]["activations"]["bf16 recomputed"]
    assert memory["activations"] < changed[2]["activations"]["bf16"]
    assert "lie in the host's memory" in changed[1] and "lie in the host's memory" not in text
    bf16, fp16 = (run(CLASSES, f"engine.precision={name}")[2] for name in ("bf16", "fp16"))
    assert [row["dtype"] for row in fp16["stages"]] == ["fp32", "fp16", "fp16", "fp16"]
    assert fp16["activations"]["fp16"] == bf16["activations"]["bf16"]


@pytest.mark.parametrize("arguments, message", [
    (["train.global_batch=36"], "found 36 and 2, which 8 GPUs cannot share in whole micro-batches; nearest that work: "
     "train.global_batch=32 or train.global_batch=48 or 6 GPUs"),
    (["train.global_batch=24"], "train.global_batch=16 or train.global_batch=32 or train.micro_batch=1 or 6 GPUs"),
    (["train.global_batch=8"], "nearest that work: train.global_batch=16 or train.micro_batch=1 or 4 GPUs"),
    (["model.num_classes=null", "data.train=not/here"], r"model.num_classes: found null, and no shards to count them "
     r"in \(data.train: not/here\); set model.num_classes=N, or data.train=SHARDS"),
    (["--images", "31"], "train.global_batch: found 32, more than the 31 images"),
    (["--images", "0"], "--images 0: expected at least 1"),
    (["--nodes", "0"], "--nodes 0: expected at least 1"),
    (["--gpus-per-node", "-1"], "--gpus-per-node -1: expected at least 1"),
    (["--size", "8", "96"], "--size 8 96: expected sides of at least 32 px"),
    (["--gpu-gib", "0"], "--gpu-gib 0: expected above 0"),
    (["--backbone-parameters", "inf"], "--backbone-parameters inf: expected at least 1"),
    (["--config", "not/here.yaml"], "not/here.yaml: No such file"),
    (["--out", "tests"], "--out: tests is a folder; expected the name of a file"),
    (["train.globalbatch=8"], "unknown key 'train.globalbatch'; did you mean 'train.global_batch'"),
])  # fmt: skip
def test_misuse(run, arguments, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(plan, "stages_of", None)  # nothing is computed before
    with pytest.raises(UsageError, match=message):
        run(CLASSES, *arguments)


def test_a_folder_that_is_no_shard_set(run, tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        run(CLASSES, f"data.train={tmp_path}")
