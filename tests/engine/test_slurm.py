"""The environment of a rank from SLURM's variables, as recorded on a real one (SLURM 22.05, two nodes of two GPUs)."""

import pytest

from framework.engine.slurm import (
    FIRST_PORT,
    PORTS,
    distributed_environment,
    first_node,
    launched_by_slurm,
    tasks_per_node,
)
from framework.errors import UsageError

TASK = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_GPUS_ON_NODE": "2",
    "SLURMD_NODENAME": "n2", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}  # fmt: skip
BATCH = {
    "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GTIDS": "0",
}  # fmt: skip


def test_a_task_of_srun():
    assert distributed_environment(TASK) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
        "MASTER_PORT": "20001",
    }  # fmt: skip


def test_what_else_is_no_task_of_srun():
    assert launched_by_slurm(TASK)
    assert not launched_by_slurm(BATCH)  # a batch script, whose one process is no rank of four
    assert not launched_by_slurm({**TASK, "RANK": "0"})  # deepspeed's launcher or torchrun inside an allocation
    assert not launched_by_slurm({})


def test_other_numbers_of_tasks_on_each_node():
    odd = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "4,2(x2),1", "SLURM_STEP_NUM_TASKS": "9", "SLURM_NODEID": "3",
           "SLURM_PROCID": "8", "SLURM_LOCALID": "0"}  # fmt: skip
    assert distributed_environment(odd)["LOCAL_WORLD_SIZE"] == "1"
    assert tasks_per_node("4,2(x2),1") == [4, 2, 2, 1]


@pytest.mark.parametrize(("nodes", "first"), [
    ("n1", "n1"), ("n[1-8]", "n1"), ("n[3,5-7]", "n3"), ("gpu[007-009,012]", "gpu007"), ("login,n[1-2]", "login"),
    ("rack[2-4]-gpu[01,03],other[1-9]", "rack2-gpu01"), ("a-b.c.example", "a-b.c.example"),
    ("10.0.0.[1-4]", "10.0.0.1"),
])  # fmt: skip
def test_the_first_node(nodes, first):
    assert first_node(nodes) == first


def test_a_restart_and_another_step_meet_at_another_port():
    variants = [{}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "2"}, {"SLURM_STEP_ID": "1"},
                {"SLURM_JOB_ID": "2000000000"}]  # fmt: skip
    ports = [int(distributed_environment({**TASK, **one})["MASTER_PORT"]) for one in variants]
    assert len(set(ports)) == len(ports)
    assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)


def test_where_to_meet_can_be_said():
    where = {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29500"}
    found = distributed_environment({**TASK, **where})
    assert {name: found[name] for name in where} == where


@pytest.mark.parametrize(("change", "told"), [
    ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "'two' does not count tasks"),
    ({"SLURM_PROCID": "x"}, "SLURM's variables cannot be read"),
    ({"SLURM_NODEID": "7"}, "SLURM's variables cannot be read"),
    ({"SLURM_STEP_NODELIST": ""}, "'' is not a list of nodes"),
])  # fmt: skip
def test_what_slurm_does_not_write_is_told(change, told):
    with pytest.raises(UsageError, match=told):
        distributed_environment({**TASK, **change})


def test_a_missing_variable_is_named():
    with pytest.raises(UsageError, match="SLURM_LOCALID: not set"):
        distributed_environment({name: value for name, value in TASK.items() if name != "SLURM_LOCALID"})
