"""The whole way with the real launcher: two DeepSpeed processes, shards, checkpoints, resume, evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framework import train
from framework.engine import checkpoint
from framework.errors import InputError, UsageError
from framework.evaluation.coco import METRICS
from tests.data.shards import make_sample, write_shards
from tests.distributed import free_port
from tests.paths import REPOSITORY

TINY = """
model:
  queries: proposals
  refine_boxes: true
  width: 32
  num_heads: 2
  encoder_layers: 1
  decoder_layers: 2
  ffn_width: 32
  num_queries: 12
  backbone: {name: resnet18, norm: group}
data: {workers: 1, sizes: [64], max_size: 100, crop_resize: [48], crop_sizes: [32, 48]}
train: {global_batch: 8, micro_batch: 2, epochs: 2, lr_drop_epochs: [1], checkpoint_every: 2}
engine: {precision: fp32}
tracking: {log_every: 1, pictures: 1}
eval: {batch: 3}
"""


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
    result = launch(data, run)
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """Stopped after 5 of 6 steps, in the middle of the second epoch, then taken up again."""
    run = tmp_path_factory.mktemp("runs") / "resumed"
    for limit in ("train.max_steps=5", "train.max_steps=null"):
        result = launch(data, run, limit)
        assert result.returncode == 0, result.stderr
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
    assert [s.step for s in events.Scalars("val/AP")] == [3, 6] and tags["images"] == ["predictions/0"]
    numbers = json.loads((whole / "evaluation/step-00000006.json").read_text())
    assert set(METRICS) <= set(numbers)
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"step-00000004", "step-00000006"}
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["world"] == 2 and environment["packages"]["deepspeed"] == "0.19.8"


def test_resuming_inside_an_epoch_changes_no_bit(whole, resumed):
    names = [name for name in lines(whole)[6] if name.startswith(("loss/", "grad_norm", "lr/"))]
    for step in range(1, 7):
        assert [lines(resumed)[step][n] for n in names] == [lines(whole)[step][n] for n in names], step
    a, b = (checkpoint.read_weights(checkpoint.newest(run)) for run in (whole, resumed))
    assert all((a[name] == b[name]).all() for name in a)


def test_one_process_takes_the_same_steps(data, whole, tmp_path):
    """Who shares a batch, what is drawn and what the loss is divided by do not depend on the world."""
    assert train.main(arguments(data, tmp_path / "one", "eval.every=0")) == 0
    a, b = lines(whole), lines(tmp_path / "one")
    assert [b[s]["loss/total"] for s in b] == pytest.approx([a[s]["loss/total"] for s in a], rel=2e-5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optim.lr=0.1"], "another configuration: optim.lr: 0.0002 -> 0.1"),
        (["train.resume=false"], "train.resume, train.run_dir: found false"),
        (["data.train={data}/val", "train.global_batch=8", "data.tail=mask"], "data.tail: drop -> mask"),
        (["data.train={other}"], "data.train: {other} has fingerprint"),
        (["data.val=null"], "data.val, eval.every: found null"),
        (["train.global_batch=7", "train.micro_batch=2"], "train.global_batch, train.micro_batch: found 7 and 2"),
    ],
)
def test_another_run_is_not_continued(data, whole, overrides, message, tmp_path):
    other = tmp_path / "other"
    write_shards(other, [make_sample(n, boxes=1) for n in range(30)])
    overrides = [o.format(data=data, other=other) for o in overrides]
    with pytest.raises(UsageError) as error:
        train.main(arguments(data, whole, *overrides))
    assert message.format(data=data, other=other) in str(error.value) and "\n" not in str(error.value)


def test_one_line_and_exit_code_two(data, whole):
    result = launch(data, whole, "optim.lr=0.1")
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if "error:" in line]
    assert ours and "optim.lr: 0.0002 -> 0.1" in ours[0] and "Traceback" not in result.stderr


def test_a_loss_that_is_no_number_ends_the_run(data, tmp_path):
    with pytest.raises(InputError, match="not finite in decoder layer|the loss is"):
        train.main(arguments(data, tmp_path / "run", "optim.lr=1e30", "optim.clip_norm=1e30", "eval.every=0"))


def test_too_many_boxes_for_the_queries(data, tmp_path):
    with pytest.raises(InputError, match="raise model.num_queries; image ids of the batch: "):
        train.main(arguments(data, tmp_path / "run", "model.num_queries=1", "eval.every=0"))
