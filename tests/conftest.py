import logging
import os

import pytest

# Of files, most expensive first; the others follow as they are named. What is long and starts last ends last, alone.
LONG = (
    "launch/test_local_cluster.py",
    "test_train.py",
    "benchmarks/test_convergence.py",
    "ops/test_cuda.py",
    "engine/test_checkpoint.py",
)
MOST_WORKERS = 8  # each needs about 1 GB

# `pytest -n` starts several processes: each has cores of its own, as threads that share one wait for each other. Here,
# as torch counts them when it is first imported, and so do the processes that a test starts.
if worker := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"):
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker) :: workers] or {cores[int(worker) % len(cores)]})


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """`pytest -n auto`: one for each core that this process may use, none (0) where there is only one."""
    cores = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    return cores if cores > 1 else 0


def pytest_collection_modifyitems(items):
    def place(item):
        return next((i for i, name in enumerate(LONG) if item.path.match(f"tests/{name}")), len(LONG))

    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=place)


@pytest.fixture(autouse=True)
def clean_logger():
    """After every test the logger "tenfold" is what it was before."""
    logger = logging.getLogger("tenfold")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:], logger.propagate, logger.level = handlers, propagate, level
