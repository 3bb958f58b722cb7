"""Slurm on one node, for as long as a test lasts: no installation, no daemon of the system is touched.

Its programs come from Debian's packages slurmctld, slurmd and slurm-client, installed, or unpacked into a folder that
``GFFMERGE_SLURM`` names::

    apt-get download slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15 libmunge2 liblua5.1-0 munge
    for package in *.deb; do dpkg -x "$package" slurm; done
    GFFMERGE_SLURM=$PWD/slurm pytest tests/engines/ase/test_slurm.py -m ''
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("GFFMERGE_SLURM", "/"))
LIBRARIES = ROOT / "usr" / "lib" / "x86_64-linux-gnu"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000
PartitionName=short Nodes=ALL Default=YES MaxTime=INFINITE
"""


def program(name: str) -> str:
    """Path of one of Slurm's programs; the test is skipped where there is none."""
    path = os.pathsep.join([str(ROOT / "usr" / "sbin"), str(ROOT / "usr" / "bin")])
    found = shutil.which(name, path=path) or shutil.which(f"{name}-wlm", path=path)
    if found is None:
        pytest.skip(f"there is no {name}, see {__name__}")
    return found


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def one_node(folder: Path) -> Iterator[dict[str, str]]:
    """Environment of commands that use a Slurm whose files are in ``folder``."""
    controller, node, step = (program(name) for name in ("slurmctld", "slurmd", "slurmstepd"))
    if os.geteuid() != 0:
        pytest.skip("a node of Slurm belongs to root")
    host = socket.gethostname().split(".")[0]
    plugins = LIBRARIES / "slurm-wlm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    settings = {"host": host, "ports": free_ports(2), "plugins": plugins, "folder": folder}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(**settings))
    environment = os.environ | {
        "SLURM_CONF": str(configuration),
        "PATH": os.pathsep.join([str(ROOT / "usr" / "bin"), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, (LIBRARIES, plugins))),
    }
    commands = ([controller, "-D"], [node, "-D", "-N", host, "-d", step])
    daemons = []
    try:
        for command in commands:
            with (folder / f"{Path(command[0]).name}.log").open("w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + 60
        while "idle" not in output(["sinfo", "-h", "-o", "%t"], environment):
            assert time.monotonic() < deadline, f"the node is not ready, see {folder}"
            time.sleep(0.2)
        yield environment
        output(["scancel", "--user=root"], environment)
        deadline = time.monotonic() + 30
        while jobs(environment) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def output(command: list[str], environment: dict[str, str]) -> str:
    """What a command of Slurm says."""
    return subprocess.run(
        [program(command[0]), *command[1:]], env=environment, capture_output=True, text=True
    ).stdout


def jobs(environment: dict[str, str]) -> set[str]:
    """Numbers of the jobs that run or wait."""
    return set(output(["squeue", "-h", "-o", "%i"], environment).split())
