"""A run that is given by its URL: its working folder on this machine, downloaded if it exists."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launcher.environment.nodes import Nodes
from launcher.environment.program import own_program
from launcher.errors import LauncherError, RunDirError, StoreError, UsageError
from launcher.object_stores.locations import is_url, shown_url
from launcher.object_stores.object_store import ObjectStore
from launcher.paths import exists

_MAX_NAME = 100


def store_at(url: str) -> ObjectStore:
    """Return the objects of a run by its URL.

    Raises:
        UsageError: It is no URL.
    """
    if not is_url(url):
        raise UsageError(
            f"{shown_url(url)} is not a URL, such as s3://bucket/runs/mine. A run folder on this "
            "machine needs no download."
        )
    return ObjectStore(url)


def unused_folder(url: str) -> Path:
    """Return a folder below runs/ that does not exist, named for the last part of a URL."""
    last = url.partition("?")[0].rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", last)[:_MAX_NAME].lstrip(".") or "run"
    path = Path("runs") / name
    numbers = (path.with_name(f"{name}-{number}") for number in range(2, 1000))
    for each in (path, *numbers):
        if not exists(each):
            return each
    raise RunDirError(f"Every default folder for {shown_url(url)} exists already. Give a folder.")


def place_run(
    out: Path | str | None, mirror: str | None, nodes: Nodes | None, *, continues: bool
) -> tuple[Path | None, str | None]:
    """Return the folder and the mirror of a run, downloaded if it is to be continued.

    Args:
        out: The folder or the URL that the user gave; None takes the default folder.
        mirror: The mirror that the user gave.
        nodes: The machines of the run.
        continues: Whether a run that exists there is resumed.

    Raises:
        UsageError: Folder, mirror and nodes do not fit together, or the download failed.
    """
    if isinstance(out, str) and is_url(out):
        if mirror is not None:
            raise UsageError(
                f"--out {shown_url(out)} is a mirror itself, and a run has one: leave out "
                f"--mirror {shown_url(mirror)}, or give a folder as --out."
            )
        _check_one_node(out, nodes, f"Give a shared folder, and --mirror {shown_url(out)}.")
        out, mirror = None, out
    folder = None if out is None else Path(out)
    if mirror is None or not continues or (folder is not None and exists(folder / "run.yaml")):
        return folder, mirror
    if nodes is not None and nodes.count > 1:  # the folder is shared, and each node would do it
        return folder, mirror
    target = folder or unused_folder(mirror)
    download(mirror, target, fall_back=True, if_exists=True)
    return target, mirror


def fetch_run(
    run: Path | str,
    out: Path | None,
    nodes: Nodes | None,
    *,
    checkpoint: str | None,
    fall_back: bool,
) -> Path:
    """Return the folder of a run to resume, which is downloaded if it is given by its URL.

    Args:
        run: The folder or the URL.
        out: The folder to download it to; None takes one below runs/.
        nodes: The machines of the run.
        checkpoint: The checkpoint, such as 120; None is the newest.
        fall_back: Whether an older checkpoint is taken if this one is damaged.

    Raises:
        UsageError: The run has several nodes, `out` is given for a folder, or the download failed.
    """
    if not (isinstance(run, str) and is_url(run)):
        if out is not None:
            raise UsageError(
                f"--out {out} is the folder to download a run to, and {run} is a folder already: "
                "leave it out."
            )
        return Path(run)
    target = out or unused_folder(run)
    _check_one_node(
        run,
        nodes,
        f"Download it to a shared folder, `launcher download {shown_url(run)} DIR`, and resume "
        "that.",
    )
    download(run, target, checkpoint=checkpoint, fall_back=fall_back)
    return target


@contextlib.contextmanager
def removed_if(refusals: type[LauncherError], run: Path | str, folder: Path) -> Iterator[None]:
    """Remove the folder of a run that was downloaded if its resumption is refused.

    Args:
        refusals: The errors that refuse it.
        run: What the user gave: nothing is removed if it is a folder.
        folder: The folder.
    """
    try:
        yield
    except refusals:
        if isinstance(run, str) and is_url(run):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_one_node(url: str, nodes: Nodes | None, instead: str) -> None:
    """Refuse a run on several nodes that is given by its URL: its nodes need a common folder.

    Raises:
        UsageError: It has several nodes.
    """
    if nodes is not None and nodes.count > 1:
        raise UsageError(
            f"A run on {nodes.count} nodes needs a run folder that all of them see, and "
            f"{shown_url(url)} is in an object store. {instead}"
        )


def download(
    url: str,
    out: Path,
    *,
    checkpoint: str | None = None,
    fall_back: bool = False,
    if_exists: bool = False,
) -> Path | None:
    """Download the run at a URL to resume it in a new folder, in a process of its own.

    Clients of stores start threads, and this process may fork ranks later.

    Args:
        url: The URL.
        out: The folder to make.
        checkpoint: The checkpoint, such as 120; None is the newest.
        fall_back: Whether an older checkpoint is taken if this one is damaged.
        if_exists: Whether it is no error if there is no run.

    Returns:
        The folder; None if there is no run.

    Raises:
        UsageError: The run or the checkpoint does not exist or is damaged, the store does not
            answer, or the folder cannot be made.
    """
    arguments = ["download", url, str(out), "--to-resume"]
    arguments += ["--from", checkpoint] if checkpoint is not None else []
    arguments += ["--auto"] if fall_back else []
    arguments += ["--if-exists"] if if_exists else []
    with subprocess.Popen(
        [*own_program(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stderr is not None
        last = ""
        for line in process.stderr:  # the last line is the error, which the caller shows
            if last:
                print(last, end="", file=sys.stderr, flush=True)
            last = line
    if process.returncode == 0:
        print(last, end="", file=sys.stderr, flush=True)
        return out if out.is_dir() else None
    error: LauncherError = StoreError(last.strip().removeprefix("launcher: ") or "interrupted")
    error.exit_code = process.returncode
    raise error
