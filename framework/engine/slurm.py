"""What SLURM tells a task of `srun`, in the variables that torch reads: a pure function of the environment."""

import re
from collections.abc import Mapping

from framework.errors import UsageError

# Below what Linux gives to outgoing connections (32768), above what services use.
FIRST_PORT, PORTS = 20000, 12000
RESTARTS_APART = 4999  # between the ports of two incarnations: the last one's may still be held


def launched_by_slurm(env: Mapping[str, str]) -> bool:
    """A task of `srun` that no other launcher stands between; a batch script itself is none."""
    return "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env


def distributed_environment(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT of this task.

    The first node of the step is met at, on a port that follows from job, step and restart; MASTER_ADDR and
    MASTER_PORT win where they are set. Raises UsageError: a variable is missing, or not what SLURM writes.
    """
    try:
        tasks = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        job, restart = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_RESTART_COUNT") or 0)
        port = FIRST_PORT + (job + RESTARTS_APART * restart + int(env.get("SLURM_STEP_ID") or 0)) % PORTS
        return {
            "RANK": str(int(env["SLURM_PROCID"])),
            "WORLD_SIZE": str(int(env["SLURM_STEP_NUM_TASKS"])),
            "LOCAL_RANK": str(int(env["SLURM_LOCALID"])),
            "LOCAL_WORLD_SIZE": str(tasks[int(env["SLURM_NODEID"])]),
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_node(env["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": env.get("MASTER_PORT") or str(port),
        }
    except KeyError as error:
        raise UsageError(f"{error.args[0]}: not set, though this is a task of srun; start with srun, or set RANK, "
                         "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT") from error  # fmt: skip
    except (ValueError, IndexError) as error:
        said = {key: value for key, value in env.items() if key.startswith("SLURM_") and key in str(READ)}
        raise UsageError(f"SLURM's variables cannot be read ({error}): {said}") from error


READ = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
        "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")  # fmt: skip


def tasks_per_node(text: str) -> list[int]:
    """'8(x2),4' -> [8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"{text!r} does not count tasks")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_node(nodes: str) -> str:
    """'rack[2-4]-gpu[007,009],login' -> 'rack2-gpu007'."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    name = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
    if not name or set(name) & set("[], "):
        raise ValueError(f"{nodes!r} is not a list of nodes")
    return name
