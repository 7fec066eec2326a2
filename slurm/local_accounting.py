"""The accounting of a local Slurm cluster: a MariaDB with a socket of its own, and slurmdbd."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PROGRAMS = {
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
    "slurmdbd": "slurmdbd",
}
"""Debian package of each program; the plugin in `slurm-wlm-mysql-plugin` comes with slurmdbd."""

_SMALL = (
    "--skip-networking",
    "--skip-log-bin",
    "--performance-schema=OFF",
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=8M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=OFF",
)
"""Options of a database that starts fast, and that nobody needs after a crash."""


def socket_of(folder: Path) -> Path:
    """Return the socket of the database in a cluster's folder."""
    return folder / "db.sock"


def write_slurmdbd_conf(folder: Path, user: str, port: int) -> None:
    """Write slurmdbd.conf, which only its user may read.

    Args:
        folder: Existing folder of the cluster.
        user: User of the daemons, also in the database.
        port: Port of slurmdbd.
    """
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.sock",
        "DbdHost=localhost",
        "DbdAddr=127.0.0.1",
        f"DbdPort={port}",
        f"SlurmUser={user}",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        f"StorageUser={user}",
        "StorageLoc=slurm",
        f"LogFile={folder}/log/slurmdbd.log",
        f"PidFile={folder}/slurmdbd.pid",
    ]
    path = folder / "slurmdbd.conf"
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")


def make_database(folder: Path, user: str) -> None:
    """Make the files of the database, whose socket lets in the user of the daemons alone.

    Raises:
        subprocess.CalledProcessError: mariadb-install-db fails.
    """
    command = ["mariadb-install-db", "--no-defaults", f"--datadir={folder}/db", f"--user={user}"]
    command += ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={user}"]
    command += ["--skip-test-db", "--skip-name-resolve", *_SMALL]
    subprocess.run(command, check=True, capture_output=True, env=_environment())


def database_command(folder: Path, user: str) -> list[str]:
    """Return the command of the database."""
    return [
        *("mariadbd", "--no-defaults", f"--datadir={folder}/db", f"--user={user}"),
        *(f"--socket={socket_of(folder)}", f"--pid-file={folder}/db.pid", *_SMALL),
    ]


def is_registered(env: dict[str, str]) -> bool:
    """Register the cluster with slurmdbd; return whether it answers.

    Args:
        env: The environment with which Slurm's commands find the cluster.
    """
    done = subprocess.run(
        ["sacctmgr", "--immediate", "add", "cluster", "local"],
        env=_environment() | env,
        text=True,
        capture_output=True,
        check=False,
    )
    return done.returncode == 0 or "already exists" in done.stdout + done.stderr


def missing_packages() -> list[str]:
    """Return the Debian packages that accounting lacks."""
    path = _environment()["PATH"]
    missing = [
        package for name, package in PROGRAMS.items() if shutil.which(name, path=path) is None
    ]
    return sorted(set(missing))


def _environment() -> dict[str, str]:
    """Return the environment of this process, with the folders of daemons on the path."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"}
