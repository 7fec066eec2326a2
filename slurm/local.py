"""Run a real Slurm cluster of virtual nodes on one machine, to try `launcher submit`.

    eval "$(python slurm/local.py up --nodes 2)"
    launcher submit digits --nodes 2 -n 2
    python slurm/local.py kill node2        # a power failure of the node
    python slurm/local.py start node2
    python slurm/local.py down

The cluster needs Debian's packages slurmctld, slurmd, slurm-client and munge; with --accounting,
also slurmdbd and mariadb-server-core. Started by root, each node has a host name, process ids,
/dev/shm and device files of GPUs of its own, by Linux namespaces. Otherwise all nodes share those
of the machine. All files are in one folder. The daemons listen on loopback only if the machine's
host name resolves to 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import psutil
from local_accounting import (
    database_command,
    is_registered,
    make_database,
    missing_packages,
    socket_of,
)
from local_configuration import ClusterError, NodeClaims, write_configuration

__all__ = ["Cluster", "ClusterError", "Daemon", "end", "make_cluster", "open_cluster"]

FOLDER = "LAUNCHER_LOCAL_SLURM"
"""Environment variable with the path of the cluster's folder."""

_PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
}
"""Debian package of each program."""

_NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
_SECONDS_TO_START = 30.0
_SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Daemon:
    """Process that is identified by its id and start time, because ids are reused."""

    pid: int
    """Process id."""

    began: float
    """Start time in seconds since the epoch."""

    def process(self) -> psutil.Process | None:
        """Return the process, or None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            same = process.create_time() == self.began
            running = same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if running else None


@dataclass
class Cluster:
    """Slurm cluster whose configuration, state and list of daemons are in one folder."""

    folder: Path
    """Folder of all files of the cluster."""

    nodes: list[str]
    """Names of the nodes."""

    isolated: bool
    """Whether each node has namespaces of its own."""

    gpus: dict[str, int]
    """GPUs that each node claims to have, by its name."""

    accounting: bool = False
    """Whether slurmdbd records the jobs."""

    daemons: dict[str, Daemon] = field(default_factory=dict)
    """Started daemons by name; that of a node's slurmd is the node's name."""

    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Daemons that this process started itself and must reap."""

    @property
    def conf(self) -> Path:
        """Path of slurm.conf."""
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which Slurm's commands and this file find the cluster."""
        return {"SLURM_CONF": str(self.conf), FOLDER: str(self.folder)}

    def save(self) -> None:
        """Write the nodes and the daemons to cluster.json, for later commands of this file."""
        daemons = {name: asdict(daemon) for name, daemon in self.daemons.items()}
        values = {
            "folder": str(self.folder),
            "nodes": self.nodes,
            "isolated": self.isolated,
            "gpus": self.gpus,
            "accounting": self.accounting,
            "daemons": daemons,
        }
        (self.folder / "cluster.json").write_text(json.dumps(values, indent=1))

    def start(self, names: Iterable[str]) -> None:
        """Start nodes that are not running, and wait until all of `names` accept jobs.

        Raises:
            ClusterError: A node does not accept jobs within 30 seconds.
        """
        nodes = set(names)
        for name in nodes:
            if name not in self.daemons or self.daemons[name].process() is None:
                command = self._slurmd_command(name)
                self._spawn(name, command, LAUNCHER_LOCAL_NODE=f"{self.folder}:{name}")
        self._wait_for(lambda: nodes <= self._available_nodes(), " and ".join(sorted(nodes)))

    def kill(self, names: Iterable[str]) -> None:
        """Kill nodes at once, with all processes that run on them."""
        names = list(names)
        for name in names:
            end([self.daemons[name]], signal.SIGKILL)
        end(self._job_processes(names), signal.SIGKILL)

    def bring_up(self) -> None:
        """Start all daemons and wait until the nodes accept jobs.

        Raises:
            ClusterError: A daemon does not come up within 30 seconds.
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
        if self.accounting:
            self._start_accounting()
        self._spawn("slurmctld", ["slurmctld", "-D"])
        self.start(self.nodes)

    def bring_down(self) -> None:
        """Stop all daemons and jobs, and remove the folder."""
        self.kill(name for name in self.nodes if name in self.daemons)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            if name in self.daemons:
                end([self.daemons[name]], signal.SIGTERM)
        for child in self.children:
            child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_accounting(self) -> None:
        """Start the database and slurmdbd, and register the cluster.

        Raises:
            ClusterError: One of them does not come up.
        """
        user = pwd.getpwuid(os.geteuid()).pw_name
        try:
            make_database(self.folder, user)
        except subprocess.CalledProcessError as error:
            raise ClusterError(f"mariadb-install-db failed: {error.stderr.decode()}") from None
        self._spawn("mariadbd", database_command(self.folder, user))
        self._wait_for(socket_of(self.folder).exists, "mariadbd")
        self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(socket_of(self.folder)))
        self._wait_for(lambda: is_registered(self.env), "slurmdbd")

    def _slurmd_command(self, name: str) -> list[str]:
        slurmd = ["slurmd", "-D", "-N", name]
        if not self.isolated:
            return slurmd
        # The shell stays, because the first process of the namespace must reap orphaned processes.
        arguments = [str(self.folder), name, str(self.gpus[name]), *slurmd]
        return ["unshare", *_NAMESPACES, "sh", str(Path(__file__).with_name("node.sh")), *arguments]

    def _spawn(self, name: str, command: list[str], **env: str) -> None:
        base = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        base["PATH"] = f"{base.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**base, **self.env, **env},
            )
        self.children.append(process)
        self.daemons[name] = Daemon(process.pid, psutil.Process(process.pid).create_time())
        self.save()

    def _available_nodes(self) -> set[str]:
        """Return the nodes that accept jobs."""
        sinfo = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"],
            env=os.environ | self.env,
            text=True,
            capture_output=True,
            check=False,
        )
        lines = (line.split() for line in sinfo.stdout.splitlines())
        return {name for name, state in lines if state in ("idle", "mixed", "allocated")}

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _SECONDS_TO_START
        while not condition():
            if time.monotonic() > deadline:
                logs = self.folder / "log"
                tails = (path.read_text(errors="replace")[-600:] for path in logs.glob("*"))
                raise ClusterError(
                    f"{what} did not come up within {_SECONDS_TO_START:g} s. The logs end with:\n"
                    + "\n".join(tails)
                )
            time.sleep(0.05)

    def _job_processes(self, names: list[str]) -> list[Daemon]:
        """Return the processes of jobs on nodes, recognised by a variable in their environment."""
        processes = []
        marks = {f"{self.folder}:{name}" for name in names}
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAUNCHER_LOCAL_NODE") in marks:
                    processes.append(Daemon(process.pid, process.create_time()))
            except psutil.Error:
                continue
        return processes


def end(daemons: Iterable[Daemon], first_signal: signal.Signals) -> None:
    """Signal processes, and kill those that are still running after 5 seconds."""
    running = [process for daemon in daemons if (process := daemon.process()) is not None]
    for number in (first_signal, signal.SIGKILL):
        for process in running:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        _, running = psutil.wait_procs(running, timeout=_SECONDS_TO_END)


def make_cluster(
    num_nodes: int = 2,
    *,
    cpus: int | Sequence[int] = 8,
    gpus: int | Sequence[int] = 0,
    accounting: bool = False,
    folder: Path | None = None,
) -> Cluster:
    """Start a cluster.

    Args:
        num_nodes: Number of nodes.
        cpus: CPU cores that each node claims to have, or those of each node.
        gpus: GPUs that each node claims to have, or those of each node.
        accounting: Whether slurmdbd records the jobs in a database of the cluster.
        folder: Folder of the cluster, which must not exist; None makes a temporary one.

    Raises:
        ClusterError: Slurm is not installed, the path of the folder is too long, or a daemon does
            not come up.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if not all(shutil.which(program, path=path) for program in _PROGRAMS):
        raise ClusterError(
            "Slurm is not installed. As root: apt-get install --no-install-recommends "
            f"{' '.join(_PROGRAMS.values())}"
        )
    if accounting and (missing := missing_packages()):
        raise ClusterError(
            "The accounting of Slurm is not installed. As root: apt-get install "
            f"--no-install-recommends {' '.join(missing)}"
        )
    folder = Path(tempfile.mkdtemp(prefix="slurm-")) if folder is None else folder.resolve()
    if len(str(folder)) > 70:
        raise ClusterError(
            f"The path {folder} has {len(str(folder))} characters, and the sockets in it allow 70. "
            "Set TMPDIR to a shorter path."
        )
    for name in ("log", "state", "spool", "dev"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munge requires that other users can enter the folder
    claims = _claims(num_nodes, cpus, gpus)
    cluster = Cluster(
        folder,
        list(claims),
        isolated=_can_isolate(),
        gpus={name: node.gpus for name, node in claims.items()},
        accounting=accounting,
    )
    write_configuration(folder, claims, accounting=accounting)
    try:
        cluster.bring_up()
    except BaseException:
        cluster.bring_down()
        raise
    return cluster


def _claims(
    num_nodes: int, cpus: int | Sequence[int], gpus: int | Sequence[int]
) -> dict[str, NodeClaims]:
    """Return what each node claims to have, by its name.

    Raises:
        ClusterError: There are not as many numbers as nodes.
    """
    of_each = [[each] * num_nodes if isinstance(each, int) else list(each) for each in (cpus, gpus)]
    if any(len(numbers) != num_nodes for numbers in of_each):
        raise ClusterError(
            f"--cpus and --gpus take one number, or one for each of the {num_nodes} nodes: 2,1."
        )
    pairs = enumerate(zip(*of_each, strict=True), start=1)
    return {f"node{number}": NodeClaims(*claims) for number, claims in pairs}


def _can_isolate() -> bool:
    command = ["unshare", *_NAMESPACES, "mount", "-t", "tmpfs", "shm", "/dev/shm"]  # noqa: S108
    return (
        os.geteuid() == 0
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def open_cluster() -> Cluster:
    """Return the cluster whose folder is in the environment variable LAUNCHER_LOCAL_SLURM.

    Raises:
        ClusterError: The variable is not set, or its folder has no cluster.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        raise ClusterError(
            f"{FOLDER} is not set. Run the line of shell that `python slurm/local.py up` prints."
        )
    try:
        values = json.loads((Path(folder) / "cluster.json").read_text())
    except OSError as error:
        raise ClusterError(f"There is no cluster in {folder}: {error.strerror}.") from None
    daemons = {name: Daemon(**daemon) for name, daemon in values.pop("daemons").items()}
    return Cluster(**values | {"folder": Path(folder)}, daemons=daemons)


class _Numbers(click.ParamType[list[int]]):
    """Numbers with commas between them."""

    name = "N[,N...]"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        words = value.split(",")
        if not all(word.isascii() and word.isdigit() for word in words):
            self.fail(f"expected numbers such as 2 or 2,1; found {value!r}.", param, ctx)
        return [int(word) for word in words]


@click.group(help=__doc__.partition("\n")[0])
def main() -> None:
    """Start, change and stop a cluster."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a stopped `up` ends its daemons


@main.command()
@click.option("--nodes", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option(
    "--cpus",
    type=_Numbers(),
    default="8",
    show_default=True,
    help="CPU cores that each node claims to have: one number, or one for each node.",
)
@click.option(
    "--gpus",
    type=_Numbers(),
    default="0",
    show_default=True,
    help="GPUs that each node claims to have: one number, or one for each node.",
)
@click.option("--accounting", is_flag=True, help="Record jobs in a database, for sacct.")
def up(nodes: int, cpus: list[int], gpus: list[int], *, accounting: bool) -> None:
    """Start a cluster, and print a line of shell that exports its environment."""
    cluster = make_cluster(
        nodes,
        cpus=cpus[0] if len(cpus) == 1 else cpus,
        gpus=gpus[0] if len(gpus) == 1 else gpus,
        accounting=accounting,
    )
    click.echo(f"export {shlex.join(f'{name}={value}' for name, value in cluster.env.items())}")


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
def kill(names: tuple[str, ...]) -> None:
    """Kill nodes at once, with all processes that run on them."""
    open_cluster().kill(names)


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
def start(names: tuple[str, ...]) -> None:
    """Start killed nodes again."""
    open_cluster().start(names)


@main.command()
def down() -> None:
    """Stop all daemons and jobs, and remove the cluster's folder."""
    open_cluster().bring_down()


if __name__ == "__main__":
    main()
