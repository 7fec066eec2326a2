"""The mirror of a run, from before its folder is made until everything is in the store."""

from __future__ import annotations

import sys

from launcher.console.echo import complain
from launcher.errors import EXIT_FAILED
from launcher.launch.prepare import PreparedRun, Request
from launcher.mirrors.mirror_client import MirrorClient
from launcher.runs.mirror_record import read_mirror
from launcher.runs.rundir import RunDir


class Mirroring:
    """What `launcher.launch.session` does about the mirror of a run; nothing if it has none.

    Args:
        request: The request, which names the URL.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._client: MirrorClient | None = None

    def open(self, run_dir: RunDir | None, *, takes_over: bool = False) -> None:
        """Take the URL, on the node that makes the run folder.

        Args:
            run_dir: The folder of a run to resume; None for a new run.
            takes_over: Whether this launcher owns the folder in place of a lost one.

        Raises:
            StoreError: The URL cannot be used.
            RunDirError: mirror.json is damaged.
        """
        url = self._request.mirror
        if url is None:
            return
        record = None if run_dir is None else read_mirror(run_dir)
        sessions = record.sessions if record is not None and record.url == url else ()
        self._client = MirrorClient(
            url, sessions, self._request.mirror_timeout, _warn, takes_over=takes_over
        )
        self._client.open()

    def attach(self, run_dir: RunDir) -> None:
        """Upload the files of a run folder from now on."""
        if self._client is not None:
            self._client.attach(run_dir)

    def check(self) -> None:
        """Start the process that uploads again if it was killed."""
        if self._client is not None:
            self._client.restart_if_ended()

    def finish(self, run_dir: RunDir, exit_code: int) -> int:
        """Wait until everything is in the store.

        Returns:
            The exit code of the run, which fails if the store lacks the end of a finished run.
        """
        client, self._client = self._client, None
        problem = "" if client is None else client.finish()
        if not problem:
            return exit_code
        complain(
            f"{self._request.mirror} lacks the end of the run, which {run_dir.shown} has: "
            f"{problem} `launcher resume {run_dir.shown}` uploads the rest."
        )
        return exit_code or EXIT_FAILED

    def close(self) -> None:
        """Give up, and leave what has been uploaded."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


def upload_rest(prepared: PreparedRun) -> int:
    """Upload what the store of a finished run lacks, and return the exit code of the command.

    Raises:
        StoreError: The URL cannot be used.
    """
    mirroring = Mirroring(prepared.request)
    assert prepared.run_dir is not None
    mirroring.open(prepared.run_dir)
    mirroring.attach(prepared.run_dir)
    return mirroring.finish(prepared.run_dir, 0)


def _warn(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)
