"""Temporary folders of runs: removed with their process, or by the next run."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import process
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.engine.ranks.temporary_files import (
    check_temporary_folder,
    sockets_in,
    temporary_files_beside_sockets,
)
from launcher.errors import WorldError
from launcher.launch.signal_handler import SignalHandler
from launcher.runs.job import Job
from launcher.runs.private_folder import private_folder
from launcher.signals import StopRequest


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder in which temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other(parent: Path) -> Iterator[tuple[int, Path]]:
    """Yield a process that has a private folder and does not end, and the folder."""
    pid = os.fork()
    if pid == 0:
        with private_folder():
            time.sleep(60)
        os._exit(0)
    deadline = time.monotonic() + 10
    while not (locks := list(parent.glob("*/launcher.lock"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield pid, locks[0].parent
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_ends_with_its_context(parent: Path) -> None:
    """The folder is private and is removed with its content, also after an exception."""

    def fail() -> None:
        with private_folder() as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "file").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(parent.iterdir()) == []


def test_a_forked_process_leaves_the_folder(parent: Path) -> None:
    """A process that is forked in the context and leaves it removes nothing."""
    context = private_folder()
    folder = context.__enter__()
    pid = os.fork()
    if pid == 0:
        context.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(pid, 0)
    assert list(parent.iterdir()) == [folder]
    context.__exit__(None, None, None)
    assert list(parent.iterdir()) == []


def test_the_folder_of_a_living_process_stays(other: tuple[int, Path]) -> None:
    """A folder whose process lives is not removed."""
    with private_folder():
        assert other[1].is_dir()


def test_the_folder_of_a_killed_process_is_removed(parent: Path) -> None:
    """A folder that a killed process left is removed by the next process that makes one."""
    pid = os.fork()
    if pid == 0:
        with private_folder():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (left,) = parent.iterdir()
    with private_folder() as folder:
        assert not left.exists()
        assert list(parent.iterdir()) == [folder]


def test_what_is_not_a_folder_of_a_run_stays(
    parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Folders without a lock, links to folders and caches with content are not removed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "launcher.lock").touch()
    (parent / "launcher-link").symlink_to(elsewhere)
    (parent / "launcher-mine").mkdir()
    (parent / "launcher-file").touch()
    (parent / "torchinductor_used").mkdir()
    (parent / "torchinductor_used/code.py").touch()
    (parent / "torchinductor_empty").mkdir()
    with private_folder():
        pass
    assert (elsewhere / "launcher.lock").exists()
    names = sorted(path.name for path in parent.iterdir())
    assert names == ["launcher-file", "launcher-link", "launcher-mine", "torchinductor_used"]


def test_sockets_are_kept_in_a_folder_with_a_short_path(tmp_path: Path) -> None:
    """Multiprocessing uses the folder in the context, unless a socket's address is too long."""
    configuration = process.current_process()._config  # type: ignore[attr-defined]
    with sockets_in(Path("/tmp/short")):
        assert configuration["tempdir"] == "/tmp/short"
        check_temporary_folder()
    with sockets_in(tmp_path / ("x" * 100)):
        assert "tempdir" not in configuration


def test_temporary_files_are_kept_beside_sockets(parent: Path) -> None:
    """A temporary file is made in the folder of the sockets in the context, and not after it."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    try:
        with temporary_files_beside_sockets():
            assert tempfile.gettempdir() == str(parent)
        with sockets_in(folder):
            with temporary_files_beside_sockets():
                descriptor, name = tempfile.mkstemp()
            assert tempfile.gettempdir() == str(parent)
        os.close(descriptor)
        assert [path.name for path in folder.iterdir()] == [Path(name).name]
        assert list(parent.iterdir()) == []
    finally:
        shutil.rmtree(folder)


def test_a_long_temporary_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TMPDIR that is too long for the sockets of workers is refused with its length."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 100)
    with pytest.raises(WorldError, match="101 bytes"):
        check_temporary_folder()


def _exit_code_of(function: Callable[[], object]) -> int:
    """Return the exit code of a process that is forked to call a function."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(99)  # the function was to end the process
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_interrupt_removes_the_folder_of_a_command(parent: Path) -> None:
    """Ctrl-C leaves no folder, even if it comes before the run has a handler for its signals."""

    def interrupted() -> None:
        SignalHandler()
        with private_folder(), private_folder():
            signal.raise_signal(signal.SIGINT)

    assert _exit_code_of(interrupted) == 130
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_saves_nothing_ends_by_a_signal_before_it_starts(
    parent: Path, number: signal.Signals
) -> None:
    """A stop signal that comes before the ranks of a check or a finder start ends the command."""

    def stopped() -> None:
        signals = SignalHandler()
        with private_folder():
            signal.raise_signal(number)
            signals.attach(cast("Job", SimpleNamespace(saves=False)), announces=False)

    assert _exit_code_of(stopped) == 128 + number
    assert list(parent.iterdir()) == []


def test_an_interrupt_while_a_folder_is_removed(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C that comes while a folder is removed lets nothing of it remain."""
    remove = shutil.rmtree
    interrupts = iter([signal.SIGINT])

    def remove_interrupted(*args: Any, **options: Any) -> None:
        for number in interrupts:
            signal.raise_signal(number)
        remove(*args, **options)

    monkeypatch.setattr(shutil, "rmtree", remove_interrupted)

    def interrupted() -> None:
        SignalHandler()
        with private_folder() as folder:
            (folder / "file").touch()

    assert _exit_code_of(interrupted) == 130
    assert list(parent.iterdir()) == []


def test_a_rank_that_ends_by_a_signal_removes_its_folder(parent: Path) -> None:
    """A rank of torchrun that a signal ends at once, without an exception, leaves no folder."""

    def ended() -> None:
        stop = StopRequest()
        stop.listen()
        with private_folder(), stop.ends_at_once():
            signal.raise_signal(signal.SIGTERM)

    assert _exit_code_of(ended) == 128 + signal.SIGTERM
    assert list(parent.iterdir()) == []
