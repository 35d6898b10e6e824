"""A real Slurm cluster on one machine, in namespaces, that nothing survives.

Every node has its own network, host name, /tmp, /dev/shm and processes: killing the first of them
is a power cut, taking its interface down is a partition. Nothing but munged runs in the machine's
own namespaces. Needs root, Slurm, munge and iproute2. Stopped by the pids it started.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
SUBNET = "10.213.9"
CPUS, GPUS = 16, 8  # what a node claims to have

_CONF = """\
ClusterName=mini
SlurmctldHost=ctl({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=900
UnkillableStepTimeout=20
AccountingStorageType=accounting_storage/none
GresTypes=gpu
PlugStackConfig={folder}/plugstack.conf
NodeName=node[1-{nodes}] NodeAddr={subnet}.[11-{last}] CPUs={cpus} Boards=1 SocketsPerBoard=1 \
CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=2-00:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF
PartitionName=paid Nodes=ALL MaxTime=2-00:00:00 AllowAccounts=science
"""


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    if os.geteuid() != 0:
        return "needs root (namespaces, device nodes)"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class MiniCluster:
    """Slurm on `nodes` hosts, below `folder`; `shared` are more folders that every node sees."""

    def __init__(self, folder: Path, nodes: int, shared: Sequence[Path], spank: str = "") -> None:
        """Write the configuration; `spank` is a line of plugstack.conf."""
        self.folder, self.nodes = folder.resolve(), nodes
        self._shared = [str(path.resolve()) for path in shared]
        self.tag = f"opcd{os.getpid() % 100000}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._is_abandoned = threading.Event()
        self._environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in ("munge", "state", "log", "dev"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        self.folder.chmod(0o755)
        self._write("hosts", self._hosts())
        self._write("plugstack.conf", f"required {spank}\n" if spank else "")
        self._write("gres.conf", f"Name=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n")
        conf = _CONF.format(
            subnet=SUBNET, folder=self.folder, nodes=nodes, last=10 + nodes, cpus=CPUS, gpus=GPUS
        )
        self._write("slurm.conf", conf)
        for number in range(GPUS):
            os.mknod(self.folder / f"dev/nvidia{number}", 0o600 | 0o020000, os.makedev(1, 3))

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _hosts(self) -> str:
        names = [(1, "ctl"), *((10 + n, f"node{n}") for n in range(1, self.nodes + 1))]
        lines = [f"{SUBNET}.{number} {name}\n" for number, name in names]
        return "127.0.0.1 localhost\n" + "".join(lines)

    def __enter__(self) -> MiniCluster:
        """Start everything and wait until every node is idle."""
        try:
            self._start_munge()
            self._wire()
            self._start("slurmctld", self._host("ctl", ["slurmctld", "-D", "-i"]))
            for number in range(1, self.nodes + 1):
                self.power_on(f"node{number}")
            idle = self._idle_command()
            self.wait_for(lambda: self.run(idle).stdout.split() == [str(self.nodes)], 60, "idle")
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what was started, and nothing else."""
        self._stop_all()

    def _idle_command(self) -> list[str]:
        return ["sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D"]

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        options = {
            "key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed",
            "log-file": "log",
        }  # fmt: skip
        flags = [f"--{name}={munge / file}" for name, file in options.items()]
        self._start("munged", ["munged", "--force", "--foreground", "--num-threads=2", *flags])
        self.wait_for((munge / "socket").exists, 10, "munge's socket")

    def _wire(self) -> None:
        """A namespace for the switch and one a host, joined by veth pairs."""
        switch = f"{self.tag}sw"
        _call("ip", "netns", "add", switch)
        _call("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "br0", "up")
        places = [("ctl", 1), *((f"node{n}", 10 + n) for n in range(1, self.nodes + 1))]
        for host, address in places:
            space = self.tag + host
            _call("ip", "netns", "add", space)
            _call("ip", "-n", space, "link", "set", "lo", "up")
            pair = ["type", "veth", "peer", "name", f"p{host}", "netns", switch]
            _call("ip", "-n", space, "link", "add", "eth0", *pair)
            _call("ip", "-n", switch, "link", "set", f"p{host}", "master", "br0", "up")
            _call("ip", "-n", space, "addr", "add", f"{SUBNET}.{address}/24", "dev", "eth0")
            _call("ip", "-n", space, "link", "set", "eth0", "up")

    def _host(self, host: str, command: Sequence[str]) -> list[str]:
        enter = ["nsenter", f"--net=/run/netns/{self.tag}{host}"]
        fresh = ["unshare", "--uts", "--mount", "--propagation", "private"]
        shell = [str(HERE / "node_shell.sh"), str(self.folder), host, *self._shared, "--"]
        return [*enter, *fresh, *shell, *command]

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"log/{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                cwd="/",
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def power_on(self, node: str) -> None:
        """Boot a node; its processes end with the first of them."""
        spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(node, self._host(node, [*spaces, "bash", "-c", f"slurmd -D -N {node} & wait"]))

    def power_off(self, node: str) -> None:
        """Kill everything on a node at once."""
        process = self._processes.pop(node)
        process.kill()  # of `unshare --kill-child`, whose child is the first process of the node
        process.wait()

    def unplug(self, node: str) -> None:
        """Cut a node off the network; its processes go on."""
        _call("ip", "-n", self.tag + node, "link", "set", "eth0", "down")

    def plug_in(self, node: str) -> None:
        """Put the cable back."""
        _call("ip", "-n", self.tag + node, "link", "set", "eth0", "up")

    def make_read_only(self, node: str, path: Path, *, read_only: bool = True) -> None:
        """Change how a node sees a folder below a shared one."""
        how = "bind,ro" if read_only else "bind,rw"
        (slurmd,) = self.pids_of(node, "slurmd")
        enter = ["nsenter", "-t", str(slurmd), "-m", "-p"]
        if read_only:
            _call(*enter, "mount", "--bind", str(path), str(path))
            _call(*enter, "mount", "-o", f"remount,{how}", str(path))
        else:
            _call(*enter, "umount", "-l", str(path))

    def pids_of(self, node: str, *names: str) -> list[int]:
        """The processes on a node, as the machine numbers them; of these names, or all."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.tag + node], capture_output=True, text=True, check=True
        )
        pids = [int(pid) for pid in listed.stdout.split()]
        return [pid for pid in pids if not names or _name_of(pid) in names]

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as on the login node."""
        return subprocess.run(
            self._host("ctl", command),
            cwd=cwd or self.folder,
            env=self._environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol` knows of a job; on a busy machine it does not always answer."""
        shown = ""
        while "JobState=" not in shown and not self._is_abandoned.is_set():
            shown = self.run(["scontrol", "show", "job", job, "-o"]).stdout
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Poll until a condition holds.

        Raises:
            TimeoutError: it does not; the last lines of the controller go to the message.
            RuntimeError: the cluster is abandoned.
        """
        end = time.monotonic() + seconds
        while not condition():
            if self._is_abandoned.is_set():
                raise RuntimeError(f"nobody waits for {what} any more")
            if time.monotonic() > end:
                raise TimeoutError(f"no {what} in {seconds} s\n{self._tails()}")
            time.sleep(0.2)

    def abandon(self) -> None:
        """Let every thread that waits give up."""
        self._is_abandoned.set()

    def _tails(self) -> str:
        """What the controller did last; what nodes said is in the same folder while it is there."""
        log = self.folder / "log/slurmctld.out"
        return "\n".join(log.read_text(errors="replace").splitlines()[-12:])

    def _stop_all(self) -> None:
        for name in [one for one in self._processes if one.startswith("node")]:
            self.power_off(name)
        for process in self._processes.values():  # slurmctld and munged
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True)
        for line in spaces.stdout.splitlines():
            space = line.split()[0]
            if space.startswith(self.tag):
                for pid in self.pids_of(space.removeprefix(self.tag)):
                    os.kill(pid, signal.SIGKILL)
                _call("ip", "netns", "del", space)


def _call(*command: str) -> None:
    subprocess.run(command, check=True)


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has ended
        return ""
