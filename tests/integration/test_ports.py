"""The ports of a run on one machine: only loopback, and strangers cannot disturb the run."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, Commands, processes_of

LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000")


def listening(mark: str) -> Iterator[tuple[str, int]]:
    """Yield each address, in hexadecimal, and port on which processes of a run listen."""
    sockets = {}
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                address, _, port = fields[1].partition(":")
                sockets[f"socket:[{fields[9]}]"] = address, int(port, 16)
    for process in processes_of(mark):
        for descriptor in Path(f"/proc/{process.split()[0]}/fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target in sockets:
                yield sockets[target]


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_ports_are_on_loopback_and_ignore_strangers(run: Commands, strategy: str) -> None:
    """A run listens on loopback only, and a stranger that sends garbage does not stop it."""
    process = run.start(
        *("launcher", "run", ROOT / "recipes/digits.py", "-n", "2", "epochs=20"),
        *(f"strategy={strategy}", "--out", "out"),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "samples/s" in line:
            break
    endpoints = set(listening(run.mark))
    assert endpoints, "gloo listens at least"
    assert {address for address, _ in endpoints} <= set(LOOPBACK)
    for _, port in endpoints:
        for garbage in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\0" * 100, b"\xff" * 5000):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                stranger.sendall(garbage)
    assert process.poll() is None, "the run ended before it could be disturbed"
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "step 240/240" in stdout


def test_nothing_is_left_in_the_temporary_folder(run: Commands) -> None:
    """The private folder of a run is removed when the run finishes or is stopped by Ctrl-C."""
    env = {"TMPDIR": str(run.folder)}
    recipe = ROOT / "recipes/digits.py"
    assert run("launcher", "run", recipe, "epochs=1", env=env).exit_code == 0
    process = run.start("launcher", "run", recipe, env=env)
    deadline = time.monotonic() + 30
    while not list(run.folder.glob("launcher-*")):
        assert time.monotonic() < deadline, "the private folder never appears"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(run.folder.glob("launcher-*")) == []
