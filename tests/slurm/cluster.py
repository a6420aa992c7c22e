"""A Slurm of one's own on one machine: every daemon, key, socket and log in one folder.

Nothing of the system's Slurm is read or changed; needs neither systemd nor slurmdbd. The nodes
claim more cores, memory and GPUs than the machine has: Slurm schedules by these numbers alone.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2", "n3")
CONFIG = """
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job of a lost node starts again when its credential has expired: 20 s here, 120 elsewhere.
AuthInfo=socket={root}/munge/socket,cred_expire=20
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
# Kills what uses more memory than it asked for, as clusters do by cgroups.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
MinJobAge=3600
JobRequeue=0
KillWait=5
ReturnToService=2
GresTypes=gpu
NodeName=DEFAULT CPUs=16 RealMemory=200000 Gres=gpu:2
{nodes}
# Jobs go to the least loaded node; those of `urgent` push those of `gpu` off it, after a warning.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT LLN=YES
PartitionName=cpu Nodes=ALL Default=YES MaxTime=1440 PreemptMode=OFF
PartitionName=gpu Nodes=ALL MaxTime=1440 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=1440 PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed here."""
    return [name for name in DAEMONS if not shutil.which(name, path=search_path())]


def search_path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/local/sbin", "/usr/sbin", "/sbin"])


class Cluster:
    """Use as a context manager: started inside, and stopped by the pids of its daemons.

    Args:
        root: An empty folder with a short path (sockets).
    """

    def __init__(self, root: Path):
        self.root = root
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{root}/bin{os.pathsep}{search_path()}",
        }

    def __enter__(self):
        host = socket.gethostname().split(".")[0]
        ports = free_ports(1 + len(NODES))
        for folder in ("munge", "state", "bin", *(f"spool.{node}" for node in NODES)):
            (self.root / folder).mkdir(mode=0o755)
        (self.root / "munge/key").write_bytes(os.urandom(128))
        (self.root / "munge/key").chmod(0o400)
        (self.root / "slurm.conf").write_text(
            CONFIG.format(
                host=host,
                user=getpass.getuser(),
                root=self.root,
                controller_port=ports[0],
                nodes="\n".join(
                    f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
                    for node, port in zip(NODES, ports[1:], strict=True)
                ),
            )
        )
        for gpu in ("gpu0", "gpu1"):
            (self.root / gpu).touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-1]\n")
        # The jobstep executor of Snakemake drops SLURM_CONF before it calls srun.
        srun = self.root / "bin/srun"
        real = shutil.which("srun", path=search_path())
        srun.write_text(f'#!/bin/sh\nexport SLURM_CONF={self.root}/slurm.conf\nexec {real} "$@"\n')
        srun.chmod(0o755)
        self.stack = ExitStack()
        with ExitStack() as stack:
            stack.callback(self._stop)
            munge = self.root / "munge"
            self.run(
                "munged", "--force", "--key-file", munge / "key", "--socket", munge / "socket",
                "--pid-file", self.root / "munged.pid", "--log-file", munge / "log",
                "--seed-file", munge / "seed",
            )  # fmt: skip
            self.run("slurmctld", "-c", "-f", self.root / "slurm.conf")
            for node in NODES:
                self.run("slurmd", "-N", node, "-f", self.root / "slurm.conf")
            self.wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), "idle nodes")
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_exc):
        self.stack.close()

    def run(self, *command) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _stop(self) -> None:
        """Jobs first: a slurmd leaves those that run behind it."""
        try:
            if (self.root / "slurmctld.pid").is_file():
                self.cancel_all()
        finally:
            pids = [int(path.read_text()) for path in self.root.glob("*.pid")]
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            self.wait_for(lambda: not any(map(alive, pids)), "the end of the daemons")

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
            time.sleep(0.05)

    def cancel_all(self) -> None:
        self.run("scancel", "--user", getpass.getuser())
        self.wait_for(lambda: not self.run("squeue", "--noheader").strip(), "jobs to end")

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines)

    def set_node(self, node: str, state: str) -> None:
        self.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")

    def jobs(self, comment: str = "") -> list[dict[str, str]]:
        """What Slurm knows of Snakemake's jobs, in the order of submission: of all, or of those
        with a comment, `rule_<rule>_wildcards_<wildcards>`."""
        records = []
        for line in self.run("scontrol", "--oneliner", "show", "jobs").splitlines():
            fields = (part.partition("=") for part in line.split(" ") if "=" in part)
            records.append({key: value for key, _, value in fields})
        records = [r for r in records if "Comment" in r and comment in ("", r["Comment"])]
        return sorted(records, key=lambda record: int(record["JobId"]))

    def states(self, name: str) -> list[str]:
        return [job["JobState"] for job in self.jobs(name)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for open_socket in sockets:
            open_socket.bind(("127.0.0.1", 0))
        return [open_socket.getsockname()[1] for open_socket in sockets]
