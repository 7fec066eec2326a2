"""Write the configuration files of a local Slurm cluster; see local.py."""

from __future__ import annotations

import os
import pwd
import random
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
from local_accounting import write_slurmdbd_conf

_PORTS = range(20_000, 32_000)
"""Ports for the daemons, below the range that the kernel gives to outgoing connections."""


@dataclass(frozen=True)
class NodeClaims:
    """What a virtual node claims to have."""

    cpus: int
    """CPU cores."""

    gpus: int
    """GPUs."""


class ClusterError(click.ClickException):
    """Error of a cluster that cannot be started or does not exist."""


def write_configuration(
    folder: Path, nodes: dict[str, NodeClaims], *, accounting: bool = False
) -> None:
    """Write the key of munge, the hosts files, gres.conf and slurm.conf into a cluster's folder.

    Args:
        folder: Existing folder of the cluster.
        nodes: What each node claims to have, by its name.
        accounting: Whether to write slurmdbd.conf as well, and to record jobs in its database.

    Raises:
        ClusterError: There are not enough free ports.
    """
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    hosts = Path("/etc/hosts").read_text(encoding="utf-8")
    names = " ".join([*nodes, socket.gethostname()])
    for name in nodes:
        text = f"127.0.0.1 {name} localhost\n127.0.0.1 {names}\n{hosts}"
        (folder / f"hosts.{name}").write_text(text, encoding="utf-8")
    for number in range(max(node.gpus for node in nodes.values())):
        # gres/gpu needs device files; these equal /dev/null
        os.mknod(folder / "dev" / f"nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
    (folder / "gres.conf").write_text(_gres_conf(folder, nodes))
    user = pwd.getpwuid(os.geteuid()).pw_name
    database, *ports = _free_ports(2 + len(nodes))
    conf = _slurm_conf(folder, nodes, user, ports)
    if accounting:  # the queue soon forgets jobs that have ended, which sacct still knows
        conf += (
            "MinJobAge=20\nAccountingStorageType=accounting_storage/slurmdbd\n"
            f"AccountingStorageHost=localhost\nAccountingStoragePort={database}\n"
            f"AccountingStoragePass={folder}/munge.sock\n"
        )
        write_slurmdbd_conf(folder, user, database)
    else:
        conf += "MinJobAge=3600\n"
    (folder / "slurm.conf").write_text(conf)


def _gres_conf(folder: Path, nodes: dict[str, NodeClaims]) -> str:
    lines = [
        f"NodeName={name} Name=gpu File={folder}/dev/nvidia[0-{node.gpus - 1}]"
        for name, node in nodes.items()
        if node.gpus
    ]
    return "\n".join(["AutoDetect=off", *lines, ""]) if lines else ""


def _slurm_conf(folder: Path, nodes: dict[str, NodeClaims], user: str, ports: list[int]) -> str:
    control, *ports = ports
    memory = psutil.virtual_memory().total // 2**20
    cpus = max(node.cpus for node in nodes.values())
    lines = [
        "ClusterName=local",
        "SlurmctldHost=localhost(127.0.0.1)",
        f"SlurmctldPort={control}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # A requeued job starts again only when its credential has expired, by default after 120 s.
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
        "SlurmdParameters=config_overrides",  # trust the node lines below, not the hardware
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "ReturnToService=2",
        "SlurmctldTimeout=30",
        "SlurmdTimeout=10",
        "InactiveLimit=0",
        "KillWait=5",
        f"FirstJobId={random.randrange(1000, 60_000)}",  # jobs of two clusters must not collide
    ]
    if any(node.gpus for node in nodes.values()):
        lines.append("GresTypes=gpu")
    try:
        on_loopback = socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    except OSError:
        on_loopback = False
    if on_loopback:
        lines.append("CommunicationParameters=NoInAddrAny,NoCtldInAddrAny")
    for (name, node), port in zip(nodes.items(), ports, strict=True):
        lines.append(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} Sockets=1 "
            f"CoresPerSocket={node.cpus} ThreadsPerCore=1 RealMemory={memory}"
            + (f" Gres=gpu:{node.gpus}" if node.gpus else "")
        )
    lines.append(
        "PartitionName=main Nodes=ALL MaxTime=2-0 DefaultTime=60 PriorityTier=1 Default=YES"
    )
    lines.append("PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=60 PriorityTier=10")
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.sample(_PORTS, 2000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(
        f"{count} free ports are needed, and only {len(ports)} were found between "
        f"{_PORTS.start} and {_PORTS.stop - 1}. End what listens there."
    )
