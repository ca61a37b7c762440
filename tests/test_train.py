"""The whole way with the real launcher: two DeepSpeed processes, shards, checkpoints, resume, evaluation."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framework import evaluate, train
from framework.config import TrainConfig
from framework.engine import checkpoint
from framework.engine.lifecycle import SAVED
from framework.errors import MISUSED, InputError, UsageError
from framework.evaluation.coco import METRICS
from framework.files import sha256_of
from framework.models.backbone import FrozenBatchNorm2d, ResNet
from framework.tracking.console import write_json
from framework.trained import best_checkpoint
from tests.data.shards import CLASSES, make_sample, overwrite, write_shards
from tests.distributed import free_port
from tests.paths import REPOSITORY
from tests.runs import TINY


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "train", [make_sample(n, boxes=n % 4) for n in range(27)])
    write_shards(folder / "val", [make_sample(100 + n, boxes=1 + n % 3) for n in range(5)])
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def arguments(data: Path, run: Path, *overrides: str) -> list[str]:
    return ["--config", str(data / "tiny.yaml"), f"data.train={data / 'train'}", f"data.val={data / 'val'}",
            f"train.run_dir={run}", *overrides]  # fmt: skip


def launch(data: Path, run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """As users do: the deepspeed launcher, two processes."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*runner, str(REPOSITORY / "framework/train.py"), *arguments(data, run, *overrides)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=data)


def lines(run: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in records if "loss/total" in r}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = launch(data, run, "tracking.attention=1")
    assert result.returncode == 0, result.stderr
    return run


def start_ranks(data: Path, run: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Two processes without the launcher, which costs two more."""
    command = [sys.executable, "-m", "framework.train", *arguments(data, run, *overrides)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
                                "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}  # fmt: skip
    return [
        subprocess.Popen(command, cwd=data, stderr=subprocess.PIPE, text=True,
                         env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """One of two ranks got a scheduler's signal while it started; then the same command again. Draws no attention."""
    run = tmp_path_factory.mktemp("runs") / "resumed"
    ranks = start_ranks(data, run)
    try:
        end = time.monotonic() + 60
        while not (run / "environment.json").exists():
            assert all(rank.poll() is None for rank in ranks) and time.monotonic() < end
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGUSR2)
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [SAVED, SAVED], said
        last = max(lines(run))
        assert last in (1, 2) and f"stopped by SIGUSR2 after step {last}, which is saved" in said[0]
        assert checkpoint.newest(run).name == f"step-{last:08d}"
        ranks = start_ranks(data, run)
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
    finally:
        for rank in ranks:
            rank.kill()
    return run


def test_a_run_leaves_what_it_promises(whole):
    assert list(lines(whole)) == [1, 2, 3, 4, 5, 6]  # 27 images, batches of 8: three steps an epoch
    step = lines(whole)[6]
    assert step["epoch"] == 2.0 and step["images_seen"] == 48 and step["lr/rest"] == pytest.approx(2e-5)
    assert {"loss/class", "loss/giou/layer0", "loss/box/proposals", "lr/backbone", "lr/sampling", "grad_norm",
            "throughput/images_per_s", "throughput/data_wait", "memory/peak_gib"} <= set(step)  # fmt: skip
    assert 0 <= step["throughput/data_wait"] <= 1 and step["grad_norm"] > 0
    events = EventAccumulator(str(whole / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"loss/total", "val/AP", "val/APs", "epoch", "images_seen"} <= set(tags["scalars"])
    assert [s.step for s in events.Scalars("val/AP")] == [3, 6]
    assert sorted(tags["images"]) == ["attention/0", "predictions/0", "predictions/1"]
    assert [s.step for s in events.Images("attention/0")] == [3, 6]
    numbers = json.loads((whole / "evaluation/step-00000006.json").read_text())
    assert set(METRICS) <= set(numbers)
    best = max(events.Scalars("val/AP"), key=lambda one: one.value).step
    kept = {"step-00000004", "step-00000006", f"step-{best:08d}"}
    assert {p.name for p in (whole / "checkpoints").iterdir()} == kept
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["world"] == 2 and environment["packages"]["deepspeed"] == "0.19.8"


def test_resuming_inside_an_epoch_changes_no_bit(whole, resumed):
    names = [name for name in lines(whole)[6] if name.startswith(("loss/", "grad_norm", "lr/"))]
    for step in range(1, 7):
        assert [lines(resumed)[step][n] for n in names] == [lines(whole)[step][n] for n in names], step
    a, b = (checkpoint.read_weights(checkpoint.newest(run)) for run in (whole, resumed))
    assert all((a[name] == b[name]).all() for name in a)


def test_the_log_compares_an_evaluation_with_those_before_it(whole):
    first, second = (line for line in (whole / "log.txt").read_text().splitlines() if ": AP " in line)
    assert "best AP before" not in first and second.endswith("at step 3") and "best AP before: " in second
    assert "train.lr_drop_epochs" not in (whole / "log.txt").read_text()  # it has one drop, which comes


def test_one_process_takes_the_same_steps(data, whole, tmp_path):
    """Who shares a batch, what is drawn and what the loss is divided by do not depend on the world."""
    assert train.main(arguments(data, tmp_path / "one", "eval.every=0", "train.lr_drop_epochs=[1,2]")) == 0
    assert "the rate does not drop at 2" in (tmp_path / "one/log.txt").read_text()
    a, b = lines(whole), lines(tmp_path / "one")
    assert [b[s]["loss/total"] for s in b] == pytest.approx([a[s]["loss/total"] for s in a], rel=2e-5)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optim.lr=0.1"], "another configuration: optim.lr: 0.0002 -> 0.1"),
        (["train.ema_decay=0.9"], "another configuration: train.ema_decay: 0.0 -> 0.9"),
        (["train.resume=false"], "train.resume, train.run_dir: found false"),
        (["data.train={other}"], "data.train: {other} has fingerprint"),
        (["data.val=null"], "data.val, eval.every: found null"),
        (["data.train={data}/nope"], "data.train: {data}/nope is not there; expected a finished shard set"),
        (["data.val={data}/nope"], "data.val: {data}/nope is not there; expected a finished shard set"),
        (["data.train={data}"], "data.train: {data} has no manifest.json; expected a finished shard set"),
        (["train.run_dir={data}/tiny.yaml"], "train.run_dir: {data}/tiny.yaml is a file; expected a folder"),
        (["train.run_dir={data}/tiny.yaml/run"], "train.run_dir: {data}/tiny.yaml is a file; expected a folder"),
        (["data.val={other}"], "do not have the same classes"),
        (["train.global_batch=7"], "train.global_batch, train.micro_batch: found 7 and 2"),
        (["model.num_queries=2"], "model.num_queries: found 2, but image 3 of"),
        (
            ["train.run_dir={other}/new", "model.backbone.weights=absent.pth"],
            "absent.pth is not there; the README says",
        ),
        (["model.num_classes=2"], "model.num_classes: found 2, but"),
        (["train.run_dir={other}/new", "model.init=absent.pth"], "model.init: absent.pth is not there"),
    ],
)
def test_what_is_refused_changes_nothing(data, whole, overrides, message, tmp_path):
    other = tmp_path / "other"
    samples = [make_sample(n, boxes=1) for n in range(30)]
    write_shards(other, samples, classes=CLASSES[:2] if "val" in overrides[0] else CLASSES)
    overrides = [o.format(data=data, other=other) for o in overrides]
    before = content_of(whole)
    with pytest.raises(UsageError) as error:
        train.main(arguments(data, whole, *overrides))
    assert message.format(data=data, other=other) in str(error.value) and "\n" not in str(error.value)
    assert content_of(whole) == before


def test_a_start_that_failed_does_not_stand_in_the_way(data, tmp_path):
    """No checkpoint, no run: a corrected configuration may use the folder."""
    run = tmp_path / "run"
    with pytest.raises(InputError, match="is not finite, and so in 4 steps in a row"):
        train.main(arguments(data, run, "optim.lr=1e30", "optim.clip_norm=1e30", "eval.every=0"))
    assert train.main(arguments(data, run, "train.max_steps=1", "eval.every=0")) == 0
    assert list(lines(run)) == [1]


def test_the_launcher_gives_one_line_and_the_exit_code(data, whole):
    result = launch(data, whole, "optim.lr=0.1")
    ours = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(ours) == 1 and "optim.lr: 0.0002 -> 0.1" in ours[0]
    assert "Traceback" not in result.stderr


def test_all_ranks_end_alike_where_a_folder_cannot_be_used(data, tmp_path):
    ranks = start_ranks(data, tmp_path / "run", f"data.val={data}")
    try:
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [MISUSED, MISUSED], said
    assert all(f"error: data.val: {data} has no manifest.json" in one for one in said)


def test_evaluate_gives_the_number_that_training_recorded(data, whole, capfd):
    assert evaluate.main(["--run", str(whole), "--data", str(data / "val")]) == 0
    printed = json.loads(capfd.readouterr().out.splitlines()[-1])
    recorded = json.loads((whole / "evaluation/step-00000006.json").read_text())
    assert [printed[name] for name in METRICS] == [recorded[name] for name in METRICS]  # two ranks, and one


def test_weights_that_no_rank_holds_whole_and_their_average(data, whole, tmp_path, capfd):
    """ZeRO 3 with an EMA: the same steps; what was evaluated on two ranks is what was saved."""
    run = tmp_path / "run"
    result = launch(data, run, "engine.zero_stage=3", "train.ema_decay=0.5", "train.epochs=1", "tracking.attention=1")
    assert result.returncode == 0, result.stderr
    a, b = lines(whole), lines(run)
    assert [b[s]["loss/total"] for s in b] == pytest.approx([a[s]["loss/total"] for s in b], rel=2e-5)
    capfd.readouterr()
    assert evaluate.main(["--run", str(run), "--data", str(data / "val")]) == 0
    printed = json.loads(capfd.readouterr().out.splitlines()[-1])
    recorded = json.loads((run / "evaluation/step-00000003.json").read_text())
    assert [printed[name] for name in METRICS] == [recorded[name] for name in METRICS]
    (tmp_path / "copy/evaluation").mkdir(parents=True)
    for step, ap in ((3, 0.5), (6, 0.4), (9, 0.5)):
        write_json(tmp_path / f"copy/evaluation/step-{step:08d}.json", {"step": step, "AP": ap})
    with pytest.raises(UsageError, match=r"--best: .*checkpoints/step-00000003, of AP 0.500, is not whole .*MANIFEST"):
        best_checkpoint(tmp_path / "copy")
    assert best_checkpoint(run) == checkpoint.newest(run)
    trained, averaged = (checkpoint.read_weights(checkpoint.newest(one)) for one in (whole, run))
    assert any((trained[name] != averaged[name]).any() for name in trained)


def test_sending_early_and_computing_again_change_no_step(data, whole, tmp_path):
    run = tmp_path / "run"
    settings = ("overlap_comm", "activation_checkpointing", "keep_products")
    result = launch(data, run, *(f"engine.{name}=true" for name in settings), "train.epochs=1")
    assert result.returncode == 0, result.stderr
    a, b = lines(whole), lines(run)
    assert [b[s]["loss/total"] for s in b] == pytest.approx([a[s]["loss/total"] for s in b], rel=2e-5)


def test_which_checkpoints_stay(tmp_path):
    for step, ap in ((10, 0.1), (30, 0.5), (60, 0.4)):
        write_json(tmp_path / f"evaluation/step-{step:08d}.json", {"step": step, "AP": ap})
    steps, settings = [65, 60, 50, 40, 30, 20, 10], TrainConfig(run_dir=str(tmp_path))
    assert train.kept_steps(settings, 10, steps) == {65, 60, 30}
    assert train.kept_steps(replace(settings, keep_best=False, keep_checkpoints=1), 10, steps) == {65}
    assert train.kept_steps(replace(settings, keep_best=False, keep_every_epochs=2), 10, steps) == {65, 60, 40, 20}


def test_bf16_resumes_too(data, tmp_path):
    both = ["engine.precision=bf16", "eval.every=0", "train.epochs=1", "train.global_batch=4", "train.max_steps=3"]
    assert train.main(arguments(data, tmp_path / "whole", *both)) == 0
    for limit in ("train.max_steps=2", "train.max_steps=3"):
        assert train.main(arguments(data, tmp_path / "halves", *both, limit)) == 0
    a, b = lines(tmp_path / "whole"), lines(tmp_path / "halves")
    assert [a[s]["loss/total"] for s in (1, 2, 3)] == [b[s]["loss/total"] for s in (1, 2, 3)]


def test_bad_samples_are_masked_counted_and_bounded(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    write_shards(tmp_path / "train", [make_sample(n, boxes=n % 4) for n in range(11)])
    overwrite(tmp_path / "train", 3, "image", b"no JPEG", fix_crc=False)
    both = [*arguments(tmp_path, tmp_path / "run"), "eval.every=0", "data.tail=mask", "train.checkpoint_every=1"]
    with pytest.raises(InputError, match=r"1 samples could not be used .* data.max_bad is 0; repair the shards"):
        train.main(both)
    assert train.main([*both, "data.max_bad=1"]) == 0  # the one sample, met in both epochs
    assert lines(tmp_path / "run")[4]["data/bad_samples"] == 1
    assert "a masked slot instead of image 3 in" in (tmp_path / "run/log.txt").read_text()


def test_what_is_recorded_at_an_evaluation(data, tmp_path):
    run = tmp_path / "run"
    assert train.main(arguments(data, run, "tracking.log_every=2", "train.epochs=1")) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [r for r in records if "val/AP" in r]
    assert (evaluation["step"], evaluation["images_seen"], evaluation["epoch"]) == (3, 24, 1.0)


def test_fine_tuning_records_what_it_started_from(data, whole, tmp_path):
    run, weights = tmp_path / "run", checkpoint.newest(whole) / "weights.safetensors"
    command = arguments(data, run, f"model.init={weights}", "model.ffn_width=64", "eval.every=0")
    for limit in ("train.max_steps=1", "train.max_steps=2"):  # the second one resumes: what it began with stays known
        assert train.main([*command, limit]) == 0
        start = json.loads((run / "environment.json").read_text())["start_weights"]
        assert start["file"] == str(weights) and start["sha256"] == sha256_of(weights)
        assert "model.ffn_width: 32 in the file, 64 in the model" in start["report"]
    log = (run / "log.txt").read_text()
    assert f"a fresh run in {run}, from {weights}:\n  {start['tensors']} tensors fit\n  model.ffn_width" in log
    assert lines(run)[1]["loss/total"] < lines(whole)[1]["loss/total"]


def test_start_weights_of_the_wrong_kind(data, whole, tmp_path):
    backbone = {name.removeprefix("backbone."): tensor
                for name, tensor in checkpoint.read_weights(checkpoint.newest(whole)).items()
                if name.startswith("backbone.")}  # fmt: skip
    torch.save(backbone, tmp_path / "resnet18.pth")
    other = tmp_path / "resnet34.pth"
    torch.save({"model": {f"backbone.0.body.{name}": tensor for name, tensor in
                          ResNet("resnet34", num_maps=3, dilation=False, norm=FrozenBatchNorm2d, freeze_stem=True,
                                 width=16)
                          .state_dict().items()}}, other)  # fmt: skip
    for overrides, message in (
        ([f"model.init={tmp_path / 'resnet18.pth'}"], "resnet18.pth: found a ResNet alone"),
        ([f"model.backbone.weights={checkpoint.newest(whole)}/weights.safetensors"], "found no torchvision ResNet"),
        ([f"model.init={checkpoint.newest(whole)}", "model.backbone.norm=frozen"],
         "is another one, .*model.backbone.norm: group in the file, frozen in the model"),
        ([f"model.init={other}", "model.backbone.norm=frozen"],
         "is another one, .*model.backbone.name: resnet34 in the file, resnet18 in the model"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            train.main(arguments(data, tmp_path / "run", *overrides))
        assert not (tmp_path / "run/config.yaml").exists()
