"""A real SLURM; skipped where it is not installed, or not run by root."""

import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.slurm import FAULT_STEP, Cluster, Lab, damage_newest, verify
from launch.local_cluster.__main__ import daemons, search_path
from tests.paths import REPOSITORY as ROOT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd has to be run by root"),
    pytest.mark.skipif(not shutil.which("slurmd", path=search_path()), reason="SLURM is not installed"),
]


def command(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "launch.local_cluster", *words], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | variables)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with Cluster(folder / "cluster", 2, 2) as cluster:
        yield Lab(folder, cluster)


def test_up_is_safe_to_run_twice_and_down_ends_only_what_it_started(lab, tmp_path):
    where = ["--dir", str(lab.cluster.folder)]
    before = daemons(lab.cluster.folder)
    again = command("up", "--nodes", "2", "--gpus", "2", *where)
    assert (again.returncode, again.stdout[:10]) == (0, "already up")
    assert daemons(lab.cluster.folder) == before
    other = command("up", "--nodes", "3", *where)
    assert other.returncode == 1
    assert "another or a broken cluster is up" in other.stderr
    second = ["--dir", str(tmp_path / "second")]
    assert command("up", "--nodes", "1", "--gpus", "1", *second).returncode == 0
    assert command("status", *second).returncode == 0
    assert "ended 3 processes" in command("down", *second).stdout
    assert not (tmp_path / "second").exists()
    assert command("down", *second).stdout == "not up\n"
    assert command("status", *second).returncode == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/slurm.conf").write_text("somebody's")
    mine = ["--dir", str(tmp_path / "mine")]
    assert "holds other things" in command("up", *mine).stderr
    assert command("down", *mine).stdout == "not up\n"
    assert (tmp_path / "mine/slurm.conf").exists()
    assert daemons(lab.cluster.folder) == before
    assert "idle" in command("status", *where).stdout


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    from launch.local_cluster import __main__ as local_cluster

    monkeypatch.setattr(local_cluster, "search_path", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="not installed: munged, slurmctld.*apt-get install"):
        local_cluster.up(tmp_path / "cluster", 1, 1)
    assert not (tmp_path / "cluster").exists()


def test_more_gpus_than_there_are_and_a_configuration_that_is_not_there_are_refused(lab):
    with pytest.raises(RuntimeError, match="Requested node configuration is not available"):
        lab.submit(options=("--gpus-per-node=9",))
    job = lab.submit("--config", "nowhere.yaml")
    job.wait_for_state("FAILED")
    assert job.shown()["ExitCode"] == "2:0"
    assert "error: --config nowhere.yaml: No such file" in job.console.read_text()


def test_a_job_that_is_cancelled_saves_and_stays_so(lab):
    job = lab.submit(tasks=1)  # a rank with all of a node: torch's threads, to which SLURM's signal goes too
    job.wait_for_step(2)
    lab.cluster.run("scancel", job.id)
    job.wait_for("its end", lambda: not lab.cluster.run("squeue", "--noheader", "--jobs", job.id, check=False))
    assert (job.state(), job.restarts()) == ("CANCELLED", 0)
    assert job.said("which is saved")


def test_a_job_that_is_warned_damaged_and_killed_ends_as_the_undisturbed_one(lab):
    undisturbed = lab.submit(tasks=1, pace_s=0)
    undisturbed.wait_for_state("COMPLETED", "FAILED")
    assert verify(undisturbed, undisturbed, 0)["faults"] == []

    job = lab.submit(tasks=1)
    job.wait_for_step(FAULT_STEP)
    lab.cluster.run("scancel", "--batch", "--signal=USR2", job.id)
    job.wait_for_requeue()
    damaged = damage_newest(job)
    job.wait_for_step(FAULT_STEP + 4, restart=1)
    job.kill_rank(1, restart=1)
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.said("stopped by SIGUSR2")
    assert job.said(f"{damaged} is not used")
    assert job.said("a rank was killed by signal 9")
    assert verify(job, undisturbed, 2)["faults"] == []
