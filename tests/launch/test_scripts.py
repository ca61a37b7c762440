"""What the batch scripts and launch/begin.py do without a SLURM."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import InputError, UsageError
from launch.begin import keep, main, newest_step, refuse_without_progress
from tests.paths import REPOSITORY as ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh") if "#SBATCH" in path.read_text())
SMALL = ["model.backbone.norm=group", "eval.every=0"]


def headers(script: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (ROOT / "launch" / script).read_text(), re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_task_a_gpu_that_is_warned_and_requeued(script):
    asked = headers(script)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"] == "B:USR2@300"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"


def test_the_batches_are_what_the_scripts_say():
    for script, world in (("coco_64gpu.sh", 64), ("coco_16x2.sh", 16)):
        asked, text = headers(script), (ROOT / "launch" / script).read_text()
        settings = dict(re.findall(r"train\.(global_batch|micro_batch)=(\d+)", text))
        assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == world
        assert int(settings["global_batch"]) == world * int(settings["micro_batch"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_slurm_a_line_says_what_to_type(script):
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(["bash", f"launch/{script}"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: this is a batch script of SLURM: sbatch launch/{script} .*\n", done.stderr)


@pytest.mark.parametrize("script", ["job.sh", "env.sh", "quickstart.sh", *SCRIPTS])
def test_bash_reads_them(script):
    subprocess.run(["bash", "-n", f"launch/{script}"], cwd=ROOT, check=True)


def test_a_second_quickstart_removes_its_first_pictures_alone(tmp_path):
    """framework.predict would refuse them."""
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch/quickstart.sh"
    script.write_text((ROOT / "launch/quickstart.sh").read_text())
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(f"""#!/bin/bash
case "$*" in
  -) echo 1 8 CPU 1 x ;;
  *framework.predict*) ls "${{@: -1}}" > '{seen}' ;;
esac""")
    python.chmod(0o755)
    predictions = tmp_path / "runs/quickstart/predictions"
    predictions.mkdir(parents=True)
    for name in ("00000_a.png", "detections.json", "mine.png"):
        (predictions / name).touch()
    env = {name: value for name, value in os.environ.items() if name not in ("DATA", "ARGS")}
    subprocess.run(["bash", script], env=env | {"PYTHON": str(python)}, check=True, stdout=subprocess.DEVNULL)
    assert seen.read_text() == "mine.png\n"


def test_shards_that_are_not_there_are_named_before_a_job_keeps_its_configuration(tmp_path):
    with pytest.raises(UsageError, match="^data.train: .*/nope is not there; expected a finished shard set"):
        main([str(tmp_path / "job"), *SMALL, f"train.run_dir={tmp_path}/run", f"data.train={tmp_path}/nope"])
    assert not (tmp_path / "job/config.yaml").exists()


def test_what_is_already_set_in_the_environment_stays():
    shown = "source launch/env.sh; echo $NCCL_DEBUG $OMP_NUM_THREADS"
    env = {"PATH": os.environ["PATH"], "NCCL_DEBUG": "INFO", "SLURM_CPUS_PER_TASK": "6"}
    done = subprocess.run(["bash", "-c", shown], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "INFO 6\n"


def test_what_was_submitted_is_kept(tmp_path, monkeypatch):
    folder, config = tmp_path / "job", tmp_path / "mine.yaml"
    config.write_text("train: {epochs: 3}\n")
    given = [str(folder), "--config", "configs/quickstart.yaml", "train.epochs=7", "--config", str(config), *SMALL,
             f"train.run_dir={tmp_path}/run"]  # fmt: skip
    assert main(given) == 0
    config.write_text("train: {epochs: 4}\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([str(folder)]) == 0
    assert "epochs: 7" in (folder / "config.yaml").read_text()
    assert (folder / "code/framework/train.py").read_bytes() == (ROOT / "framework/train.py").read_bytes()
    assert (folder / "code/COMMIT").read_text().strip()
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert starts == [{"restart": 0, "step": 0}, {"restart": 1, "step": 0}]


def test_the_code_that_was_kept_runs(tmp_path):
    keep(tmp_path / "job", None, [*SMALL, f"train.run_dir={tmp_path}/run"])
    command = [sys.executable, str(tmp_path / "job/code/framework/train.py"), "--help"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "job/code")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = [sys.executable, "-c", "import framework, ops; print(framework.__file__, ops.__file__)"]
    done = subprocess.run(imported, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert all(path.startswith(f"{tmp_path}/job/code/") for path in done.stdout.split())


def test_a_configuration_that_cannot_be_used_keeps_nothing(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'train.epochs'"):
        main([str(tmp_path / "job"), "train.epoch=3"])
    with pytest.raises(UsageError, match="nowhere.yaml: No such file"):
        main([str(tmp_path / "job"), "--config", "nowhere.yaml"])
    assert not (tmp_path / "job").exists()


def test_two_starts_that_saved_nothing_are_the_last(tmp_path):
    starts = tmp_path / "starts.jsonl"
    for step in (0, 4, 4):
        refuse_without_progress(starts, 0, step, Path("runs/r"))
    with pytest.raises(InputError, match=r"2 starts of this job in a row have saved nothing after step 4 of runs/r"):
        refuse_without_progress(starts, 1, 4, Path("runs/r"))
    refuse_without_progress(starts, 1, 6, Path("runs/r"))


def test_the_newest_step_is_that_of_a_checkpoint(tmp_path):
    assert newest_step(tmp_path) == 0
    for name in ("step-00000004", "step-00000012", "step-00000016.0a1b2c3d.tmp", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 12
