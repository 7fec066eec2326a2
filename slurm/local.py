"""A real Slurm cluster of virtual nodes on one machine, to try `launcher submit` without a cluster.

    eval "$(python slurm/local.py up --nodes 2)"
    launcher submit digits --nodes 2 -n 2
    python slurm/local.py kill node2        # the power of a node fails
    python slurm/local.py start node2
    python slurm/local.py down

Needs Debian's packages slurmctld, slurmd, slurm-client and munge. As root, each node has namespaces
of its own: a host name, processes, /dev/shm. Otherwise all nodes are this machine by another name.
Everything is in one folder, and nothing listens beyond loopback where this machine's name allows.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import psutil

FOLDER = "LAUNCHER_LOCAL_SLURM"
"""Environment variable that names the cluster's folder."""

_PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
}
_NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
_SECONDS_TO_START = 30.0
_SECONDS_TO_END = 5.0
_PORTS = range(20_000, 32_000)
"""Below those that outgoing connections take."""


class ClusterError(click.ClickException):
    """The cluster cannot be started, or is not there."""


@dataclass(frozen=True)
class Daemon:
    """A process, told by when it began from another that has its number later."""

    pid: int
    began: float

    def process(self) -> psutil.Process | None:
        """Return it, if it is running."""
        try:
            found = psutil.Process(self.pid)
            runs = found.create_time() == self.began and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return found if runs else None


@dataclass
class Cluster:
    """A cluster in a folder, which remembers what was started."""

    folder: Path
    nodes: list[str]
    isolated: bool
    """Whether nodes have namespaces of their own."""

    daemons: dict[str, Daemon] = field(default_factory=dict)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """What this process has started of them."""

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """What Slurm's commands need to find it."""
        return {"SLURM_CONF": str(self.conf), FOLDER: str(self.folder)}

    def save(self) -> None:
        """Remember what is running."""
        daemons = {name: asdict(each) for name, each in self.daemons.items()}
        values = {
            "folder": str(self.folder),
            "nodes": self.nodes,
            "isolated": self.isolated,
            "daemons": daemons,
        }
        (self.folder / "cluster.json").write_text(json.dumps(values, indent=1))

    def start(self, names: Iterable[str]) -> None:
        """Start nodes, and wait until they take jobs.

        Raises:
            ClusterError: They do not, in time.
        """
        wanted = set(names)
        for name in wanted:
            if name not in self.daemons or self.daemons[name].process() is None:
                self._spawn(name, self._slurmd(name), LAUNCHER_LOCAL_NODE=f"{self.folder}:{name}")
        self._wait_for(lambda: wanted <= self._idle(), " and ".join(sorted(wanted)))

    def kill(self, names: Iterable[str]) -> None:
        """Take nodes away at once, with all that runs on them."""
        names = list(names)
        for name in names:
            end([self.daemons[name]], signal.SIGKILL)
        end(self._left(names), signal.SIGKILL)

    def bring_up(self) -> None:
        """Start everything.

        Raises:
            ClusterError: It does not come up.
        """
        socket_file = self.folder / "munge.sock"
        self._spawn(
            "munged",
            [
                *("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"),
                *(f"--socket={socket_file}", f"--pid-file={self.folder}/munged.pid"),
                *(f"--log-file={self.folder}/log/munged.log", f"--seed-file={self.folder}/seed"),
            ],
        )
        self._wait_for(socket_file.exists, "munged")
        self._spawn("slurmctld", ["slurmctld", "-D"])
        self.start(self.nodes)

    def bring_down(self) -> None:
        """End everything, and remove the folder."""
        self.kill(name for name in self.nodes if name in self.daemons)
        for name in ("slurmctld", "munged"):
            if name in self.daemons:
                end([self.daemons[name]], signal.SIGTERM)
        for child in self.children:
            child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _slurmd(self, name: str) -> list[str]:
        slurmd = ["slurmd", "-D", "-N", name]
        if not self.isolated:
            return slurmd
        # The shell stays: as the first process of the namespace it reaps what slurmd leaves.
        script = (
            'mount --bind "$1" /etc/hosts && mount -t tmpfs shm /dev/shm && hostname "$0" '
            '&& shift && { "$@" & wait $!; exit $?; }'
        )
        hosts = str(self.folder / f"hosts.{name}")
        return ["unshare", *_NAMESPACES, "sh", "-c", script, name, hosts, *slurmd]

    def _spawn(self, name: str, command: list[str], **env: str) -> None:
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        kept["PATH"] = f"{kept.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**kept, **self.env, **env},
            )
        self.children.append(process)
        self.daemons[name] = Daemon(process.pid, psutil.Process(process.pid).create_time())
        self.save()

    def _idle(self) -> set[str]:
        """Return the nodes that take jobs."""
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"],
            env=os.environ | self.env,
            text=True,
            capture_output=True,
            check=False,
        )
        lines = (line.split() for line in done.stdout.splitlines())
        return {name for name, state in lines if state in ("idle", "mixed", "allocated")}

    def _wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + _SECONDS_TO_START
        while not is_so():
            if time.monotonic() > until:
                logs = self.folder / "log"
                tails = (path.read_text(errors="replace")[-600:] for path in logs.glob("*"))
                raise ClusterError(f"{what} did not come up.\n" + "\n".join(tails))
            time.sleep(0.05)

    def _left(self, names: list[str]) -> list[Daemon]:
        """Return what jobs have left running on nodes, told by its environment."""
        found = []
        marks = {f"{self.folder}:{name}" for name in names}
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAUNCHER_LOCAL_NODE") in marks:
                    found.append(Daemon(process.pid, process.create_time()))
            except psutil.Error:
                continue
        return found


def end(daemons: Iterable[Daemon], number: signal.Signals) -> None:
    """Signal processes, and kill those that are left after some seconds."""
    running = [process for each in daemons if (process := each.process()) is not None]
    for each in (number, signal.SIGKILL):
        for process in running:
            try:
                process.send_signal(each)
            except psutil.NoSuchProcess:
                continue
        _, running = psutil.wait_procs(running, timeout=_SECONDS_TO_END)


def make_cluster(
    num_nodes: int = 2, *, cpus: int = 8, gpus: int = 0, folder: Path | None = None
) -> Cluster:
    """Start a cluster of so many nodes, each with CPUs and GPUs that it only says it has.

    Raises:
        ClusterError: It cannot be started here.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted(
        {name for each, name in _PROGRAMS.items() if not shutil.which(each, path=path)}
    )
    if missing:
        raise ClusterError(
            f"Slurm is not installed. As root: apt-get install --no-install-recommends "
            f"{' '.join(_PROGRAMS.values())}"
        )
    folder = Path(tempfile.mkdtemp(prefix="slurm-")) if folder is None else folder.resolve()
    if len(str(folder)) > 70:
        raise ClusterError(f"{folder} is too long for the sockets in it: 70 characters at most.")
    for each in ("log", "state", "spool", "dev"):
        (folder / each).mkdir(parents=True)
    folder.chmod(0o755)  # munge insists that others may pass through
    cluster = Cluster(
        folder, [f"node{number + 1}" for number in range(num_nodes)], isolated=_can_isolate()
    )
    _write_files(cluster, cpus, gpus)
    try:
        cluster.bring_up()
    except BaseException:
        cluster.bring_down()
        raise
    return cluster


def _can_isolate() -> bool:
    command = ["unshare", *_NAMESPACES, "mount", "-t", "tmpfs", "shm", "/dev/shm"]  # noqa: S108
    return (
        os.geteuid() == 0
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def _write_files(cluster: Cluster, cpus: int, gpus: int) -> None:
    folder = cluster.folder
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    hosts = Path("/etc/hosts").read_text(encoding="utf-8")
    names = " ".join([*cluster.nodes, socket.gethostname()])
    for name in cluster.nodes:
        text = f"127.0.0.1 {name} localhost\n127.0.0.1 {names}\n{hosts}"
        (folder / f"hosts.{name}").write_text(text, encoding="utf-8")
    gres = ""
    if gpus:
        for number in range(gpus):  # gres/gpu takes device files; another /dev/null does
            os.mknod(folder / "dev" / f"nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
        gres = f"AutoDetect=off\nName=gpu File={folder}/dev/nvidia[0-{gpus - 1}]\n"
    (folder / "gres.conf").write_text(gres)
    cluster.conf.write_text(_slurm_conf(cluster, cpus, gpus))


def _slurm_conf(cluster: Cluster, cpus: int, gpus: int) -> str:
    folder = cluster.folder
    user = pwd.getpwuid(os.geteuid()).pw_name
    control, *ports = _free_ports(1 + len(cluster.nodes))
    memory = psutil.virtual_memory().total // 2**20
    lines = [
        "ClusterName=local",
        "SlurmctldHost=localhost(127.0.0.1)",
        f"SlurmctldPort={control}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # A job that is put back may start again when its credential has expired: 120 s by default.
        f"AuthInfo=socket={folder}/munge.sock,cred_expire=5",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "MailProg=/bin/true",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        f"DefMemPerCPU={max(memory // cpus, 1)}",
        "SlurmdParameters=config_overrides",  # believes the nodes below, not the hardware
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "ReturnToService=2",
        "SlurmctldTimeout=30",
        "SlurmdTimeout=10",
        "InactiveLimit=0",
        "KillWait=5",
        "MinJobAge=3600",
        f"FirstJobId={random.randrange(1000, 60_000)}",  # so that jobs of two clusters never meet
    ]
    if gpus:
        lines.append("GresTypes=gpu")
    try:
        on_loopback = socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    except OSError:
        on_loopback = False
    if on_loopback:
        lines.append("CommunicationParameters=NoInAddrAny,NoCtldInAddrAny")
    for name, port in zip(cluster.nodes, ports, strict=True):
        lines.append(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} Sockets=1 "
            f"CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory}"
            + (f" Gres=gpu:{gpus}" if gpus else "")
        )
    lines.append(
        "PartitionName=main Nodes=ALL MaxTime=2-0 DefaultTime=60 PriorityTier=1 Default=YES"
    )
    lines.append("PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=60 PriorityTier=10")
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, 2000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ClusterError("There are no free ports.")


def open_cluster() -> Cluster:
    """Return the cluster that the environment names.

    Raises:
        ClusterError: There is none.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        raise ClusterError(f"Which cluster? `up` prints a line that sets {FOLDER}.")
    try:
        values = json.loads((Path(folder) / "cluster.json").read_text())
    except OSError as error:
        raise ClusterError(f"There is no cluster in {folder}: {error.strerror}.") from None
    daemons = {name: Daemon(**each) for name, each in values.pop("daemons").items()}
    return Cluster(**values | {"folder": Path(folder)}, daemons=daemons)


@click.group(help=__doc__.partition("\n")[0])
def main() -> None:
    """Handle a cluster."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `up` takes its daemons along


@main.command()
@click.option("--nodes", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--cpus", type=click.IntRange(min=1), default=8, show_default=True, help="Of a node.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="Likewise.")
def up(nodes: int, cpus: int, gpus: int) -> None:
    """Start a cluster, and print its environment as a line of shell."""
    cluster = make_cluster(nodes, cpus=cpus, gpus=gpus)
    click.echo(f"export {shlex.join(f'{name}={value}' for name, value in cluster.env.items())}")


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
def kill(names: tuple[str, ...]) -> None:
    """Take nodes away at once, with all that runs on them."""
    open_cluster().kill(names)


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
def start(names: tuple[str, ...]) -> None:
    """Start nodes again."""
    open_cluster().start(names)


@main.command()
def down() -> None:
    """End everything, and remove the cluster's folder."""
    open_cluster().bring_down()


if __name__ == "__main__":
    main()
