"""A real SLURM on this machine: munge, slurmctld and as many slurmd as asked, each with dummy GPUs.

For trying batch scripts before they burn GPU hours. Debian: apt-get install slurmctld slurmd slurm-client munge; root.

    python -m launch.local_cluster up [--nodes 8] [--gpus 8]
    eval "$(python -m launch.local_cluster env)"        # sbatch, squeue, ... then speak with it
    sbatch launch/coco_64gpu.sh --config configs/quickstart.yaml data.train=...
    python -m launch.local_cluster status
    python -m launch.local_cluster down
"""

import argparse
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(f"/tmp/tenfold-slurm-{os.getuid()}")
DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "scontrol", "sinfo", "scancel", "squeue")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
# The nodes' names are not those of hosts, and the GPUs are dummies.
FOR_RANKS = "MASTER_ADDR=127.0.0.1 DS_ACCELERATOR=cpu"
UP_S = 60.0  # for all daemons to answer

# Times are short: a node that does not answer is down after 10 s, a requeued job may start after 5 (its credentials
# have to expire first), instead of minutes.
SLURM_CONF = """\
ClusterName=local
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait={kill_wait}
InactiveLimit=0
MessageTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{nodes}
PartitionName=main Nodes={all} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes={all} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    folder = args.dir.resolve()
    try:
        if args.command == "env":
            print(f"export SLURM_CONF={folder}/slurm.conf {FOR_RANKS}")
            return 0
        with locked(folder):
            if args.command == "up":
                return up(folder, args.nodes, args.gpus)
            return down(folder) if args.command == "down" else status(folder)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.local_cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("up", "down", "status", "env"))
    parser.add_argument("--nodes", type=int, default=8, metavar="N", help="each a slurmd (8)")
    parser.add_argument("--gpus", type=int, default=8, metavar="G", help="dummies of each node (8)")
    parser.add_argument("--dir", type=Path, default=FOLDER, help=f"of its files ({FOLDER})")
    args = parser.parse_args(argv)
    if args.nodes < 1 or args.gpus < 0:
        parser.error("--nodes, --gpus: expected at least 1, and 0")
    return args


def up(folder: Path, nodes: int, gpus: int) -> int:
    wanted = f"{nodes} nodes, {gpus} GPUs each"
    running = daemons(folder)
    if running:
        if (folder / "size").read_text() == wanted and len(running) == nodes + 2:
            print(f"already up: {wanted}, in {folder}")
            return 0
        raise RuntimeError(f"another or a broken cluster is up in {folder}; end it first: "
                           "python -m launch.local_cluster down")  # fmt: skip
    if folder.exists() and any(folder.iterdir()) and not (folder / "size").exists():
        raise RuntimeError(f"--dir: {folder} holds other things; expected a folder that is empty, or not there")
    missing = [name for name in (*DAEMONS, *CLIENTS) if not shutil.which(name, path=search_path())]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}; on Debian, as root: {PACKAGES}")
    if os.getuid():
        raise RuntimeError("slurmd starts tasks as their users, and needs root; expected to be run by root")
    write_configuration(folder, nodes, gpus)
    (folder / "size").write_text(wanted)
    try:
        start(["munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
               f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
               "--num-threads=4"], folder)  # fmt: skip
        start(["slurmctld", "-c", "-f", f"{folder}/slurm.conf"], folder)
        for node in names(nodes):
            start(["slurmd", "-N", node, "-f", f"{folder}/slurm.conf"], folder)
        wait_until_idle(folder, nodes)
    except (OSError, RuntimeError):
        end(folder)
        raise
    print(f'up: {wanted}, in {folder}\nspeak with it:  eval "$(python -m launch.local_cluster env{named(folder)})"')
    return 0


def down(folder: Path) -> int:
    ended = end(folder)
    if (folder / "size").exists():  # nothing of a folder that is not a cluster's
        shutil.rmtree(folder)
    print(f"ended {ended} processes" if ended else "not up")
    return 0


def status(folder: Path) -> int:
    """0 where all that was started runs, else 1."""
    if not daemons(folder):
        print("not up")
        return 1
    print((folder / "size").read_text(), f"in {folder}")
    for name, pid in sorted(daemons(folder).items()):
        print(f"  {name}: process {pid}")
    asked = subprocess.run(["sinfo", "--long", "--Node"], env=environment(folder), capture_output=True, text=True)
    print(asked.stdout or asked.stderr, end="")
    return asked.returncode


def write_configuration(folder: Path, nodes: int, gpus: int) -> None:
    for name in ("state", "spool", "gpus"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in names(nodes):
        (folder / "spool" / name).mkdir(exist_ok=True)
    for gpu in range(gpus):
        (folder / f"gpus/gpu{gpu}").touch()
    with open(folder / "munge.key", "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as key:
        key.write(secrets.token_bytes(128))
    ports = free_ports(nodes + 1)
    with_gpus = f"Gres=gpu:{gpus} " if gpus else ""
    each = f"NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs={8 * max(1, gpus)} {with_gpus}State=UNKNOWN"
    lines = [f"NodeName={name} Port={port} {each}" for name, port in zip(names(nodes), ports, strict=False)]
    text = SLURM_CONF.format(
        host=f"{socket.gethostname()}(127.0.0.1)", user="root", folder=folder, controller_port=ports[-1],
        nodes="\n".join(lines), all=",".join(names(nodes)), kill_wait=10,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(
        f"NodeName={','.join(names(nodes))} Name=gpu File={folder}/gpus/gpu[0-{gpus - 1}]\n" if gpus else ""
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")


def names(nodes: int) -> list[str]:
    return [f"n{i}" for i in range(1, nodes + 1)]


def named(folder: Path) -> str:
    return "" if folder == FOLDER else f" --dir {folder}"


def start(command: list[str], folder: Path) -> None:
    """A daemon, which puts itself into the background. Raises RuntimeError with what it said."""
    program = shutil.which(command[0], path=search_path())
    done = subprocess.run([str(program), *command[1:]], env=environment(folder), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} did not start: {(done.stderr or done.stdout).strip()} ({folder}/*.log)")


def wait_until_idle(folder: Path, nodes: int) -> None:
    deadline, found = time.monotonic() + UP_S, ""
    while time.monotonic() < deadline:
        asked = subprocess.run(["sinfo", "-h", "-p", "main", "-o", "%D %T"], env=environment(folder),
                               capture_output=True, text=True)  # fmt: skip
        found = (asked.stdout or asked.stderr).strip()
        if found == f"{nodes} idle":
            return
        time.sleep(0.2)
    raise RuntimeError(f"after {UP_S:.0f} s the nodes are not idle: {found} ({folder}/*.log)")


def end(folder: Path) -> int:
    """Jobs, then daemons, then what is left of both; how many processes it ended."""
    if "slurmctld" in daemons(folder):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=environment(folder),
                           capture_output=True, timeout=30)  # fmt: skip
    started = daemons(folder)  # whose files of process ids go before they themselves do
    for number in (signal.SIGTERM, signal.SIGKILL):
        waited = time.monotonic() + 10
        while (left := [*(p for p in started.values() if is_of(folder, p)), *tasks(folder)]) and (
            time.monotonic() < waited
        ):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.2)
    return len(started)


def daemons(folder: Path) -> dict[str, int]:
    """Name (slurmd-n1) to process id, of those that this cluster started and that run."""
    found = {}
    for file in folder.glob("*.pid"):
        with contextlib.suppress(OSError, ValueError):
            if is_of(folder, pid := int(file.read_text())):
                found[file.stem] = pid
    return found


def is_of(folder: Path, pid: int) -> bool:
    """A daemon of this cluster, and not somebody else's process by now."""
    with contextlib.suppress(OSError):
        return str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def tasks(folder: Path) -> Iterator[int]:
    """Of its jobs: the only ones to have its configuration in their environment, and a job's number."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = process.joinpath("environ").read_bytes()
            if f"SLURM_CONF={folder}/".encode() in variables and b"SLURM_JOB_ID=" in variables:
                yield int(process.name)


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": search_path()}


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    """That nothing listens on now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two that start at the same time come one after the other."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
