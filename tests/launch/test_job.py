"""launch/job.sh beside stand-ins for srun, scontrol and the ranks: what it does with each end of them."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

# srun: says what a real one says of the ranks, and leaves with the highest code. The record of the job is a file.
STANDINS = {
    "srun": """#!/bin/bash
echo "$*" >> "$FAKE/srun-calls"
case "$*" in
  *" copy "*) while [ "$1" != bash ]; do shift; done; exec "$@" ;;
esac
for one in "$@"; do case $one in --output=*) log=${one#--output=}; log=${log//%4t/0000} ;; esac; done
echo "ranks run" >> "$log"
[ -n "${FAKE_WARNED:-}" ] && { trap 'exit 85' USR2; kill -USR2 $PPID; sleep 20 >/dev/null & wait; }
printf '%b' "$FAKE_SRUN" >&2
exit "$FAKE_CODE"
""",
    "scontrol": """#!/bin/bash
echo "$*" >> "$FAKE/scontrol-calls"
case $1 in show) cat "$FAKE/record" ;; requeue) kill -9 $PPID ;; esac
""",
    "python": """#!/bin/bash
[ -f "$2/config.yaml" ] && exit
mkdir -p "$2/code/launch"; touch "$2/config.yaml"; cp "$FAKE/launch/"* "$2/code/launch"
printf 'data.train\\t%s/set\\tabc-set\\n' "$FAKE" > "$2/shards.tsv"
""",
}


def end_of(
    tmp_path: Path, code: int, said: str = "", state: str = "RUNNING", restarts: int = 0, **variables: str
) -> tuple[int, str, bool]:
    """Exit code, console, and whether the job was put back into the queue (which here ends the script by a KILL)."""
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    if not (tmp_path / "launch").exists():
        (tmp_path / "launch").mkdir()
        for name in ("job.sh", "env.sh", "single_node.sh"):
            (tmp_path / "launch" / name).write_text((REPOSITORY / "launch" / name).read_text())
    (tmp_path / "record").write_text(f"JobId=7 JobName=x JobState={state} Restarts={restarts} ExitCode=0:0\n")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "FAKE_SRUN": said, "FAKE_CODE": str(code),
           "TENFOLD_PYTHON": str(tmp_path / "python"), "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path),
           "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}  # fmt: skip
    (tmp_path / "scontrol-calls").unlink(missing_ok=True)
    done = subprocess.run(["bash", tmp_path / "launch/single_node.sh", "--config", "c.yaml"], env=env | variables,
                          text=True, capture_output=True, timeout=60)  # fmt: skip
    requeued = "requeue 7" in (tmp_path / "scontrol-calls").read_text().splitlines()
    return done.returncode, done.stdout + done.stderr, requeued


LEFT = "srun: error: n1: task 0: Exited with exit code {}\\n"
ENDED = "srun: error: n2: tasks 2-3: Terminated\\n"


@pytest.mark.parametrize(("code", "said", "expected", "told"), [
    (0, "", (0, False), "done"),
    (85, LEFT.format(85), (-9, True), "saved"),
    (86, LEFT.format(86), (-9, True), "hung"),
    (87, LEFT.format(87), (-9, True), "a rank or its node was lost"),
    (137, "srun: error: n2: task 3: Killed\\n" + LEFT.format(87), (-9, True), "a rank was killed by signal 9"),
    (2, LEFT.format(2), (2, False), "failed with exit code 2"),
    (143, LEFT.format(1) + ENDED, (1, False), "failed with exit code 1"),  # who left first is the cause
])  # fmt: skip
def test_each_end_of_the_ranks(tmp_path, code, said, expected, told):
    returned, console, requeued = end_of(tmp_path, code, said)
    assert ((returned, requeued), told in console) == (expected, True), console
    assert "ranks run" in console  # what rank 0 says


@pytest.mark.parametrize(("state", "restarts"), [("COMPLETING", 0), ("CANCELLED", 0)])
def test_a_job_that_slurm_ends_is_not_put_back(tmp_path, state, restarts):
    returned, console, requeued = end_of(tmp_path, 85, LEFT.format(85), state, restarts)
    assert (returned, requeued, "SLURM has ended the job" in console) == (85, False, True)


def test_a_script_that_slurm_lost_sight_of_does_not_put_back_the_next_start(tmp_path):
    script = STANDINS["srun"].replace('exit "$FAKE_CODE"', 'sed -i s/Restarts=0/Restarts=1/ "$FAKE/record"; exit 86')
    before, STANDINS["srun"] = STANDINS["srun"], script
    try:
        returned, console, requeued = end_of(tmp_path, 86, LEFT.format(86))
    finally:
        STANDINS["srun"] = before
    assert (returned, requeued, "SLURM has ended the job" in console) == (86, False, True)


def test_ranks_are_warned_through_srun(tmp_path):
    returned, console, requeued = end_of(tmp_path, 0, FAKE_WARNED="1")
    assert (returned, requeued, "time is nearly up" in console, "saved" in console) == (-9, True, True, True)


def test_how_many_tasks_run_does_not_come_from_an_older_size_of_the_job(tmp_path):
    end_of(tmp_path, 0, SLURM_NTASKS="64", SLURM_CPUS_PER_TASK="3", SLURM_STEP_ID="0")  # and sbatch in a srun's shell
    call = (tmp_path / "srun-calls").read_text()
    assert "--export=ALL --kill-on-bad-exit=1 --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=3" in call


def test_the_second_start_runs_what_was_kept(tmp_path):
    end_of(tmp_path, 85, LEFT.format(85))
    (tmp_path / "launch/env.sh").write_text("echo changed since")
    script = (tmp_path / "launch/job.sh").read_text()
    (tmp_path / "launch/job.sh").write_text(script.replace('tell "done"', 'tell "changed since"'))
    returned, console, _ = end_of(tmp_path, 0, restarts=1)
    assert (returned, "changed since" in console, "start 2" in console) == (0, False, True)
    returned, console, _ = end_of(tmp_path, 0)  # another job of the same number
    assert "changed since" in console


def test_shards_are_copied_once_and_whole(tmp_path):
    source, to = tmp_path / "set", tmp_path / "local"
    source.mkdir()
    (source / "0.tar").write_text("whole")
    (to / "abc-set.7").mkdir(parents=True)  # of a start that was killed while it copied
    (to / "abc-set.7/0.tar").write_text("wh")
    _, console, _ = end_of(tmp_path, 0, TENFOLD_COPY_TO=str(to))
    assert [path.name for path in to.iterdir()] == ["abc-set"]
    assert (to / "abc-set/0.tar").read_text() == "whole"
    assert f"data.train={to}/abc-set" in (tmp_path / "srun-calls").read_text().splitlines()[-1]
    (source / "0.tar").write_text("not copied again")
    end_of(tmp_path, 0, TENFOLD_COPY_TO=str(to))
    assert (to / "abc-set/0.tar").read_text() == "whole"


def test_shards_that_do_not_fit_are_read_where_they_are(tmp_path):
    (tmp_path / "set").mkdir()
    _, console, _ = end_of(tmp_path, 0, TENFOLD_COPY_TO="/proc/nowhere")
    assert f"not copied: {tmp_path}/set is read where it is" in console
    assert "data.train=" not in (tmp_path / "srun-calls").read_text().splitlines()[-1]
