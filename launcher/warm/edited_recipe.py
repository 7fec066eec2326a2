"""`launcher watch --follow-edits`: run a recipe again on a warm server when its file is saved."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from launcher.environment.program import own_program
from launcher.errors import UsageError
from launcher.recipe.resolve import find_file
from launcher.signals import EXIT_BY_SIGNAL, handlers_restored
from launcher.warm.forked_command import end_with_parent

_SECONDS_BETWEEN_LOOKS = 0.1

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class _EndedBySignalError(Exception):
    """A signal ended the command; the argument is its number."""


def follow_edits(recipe: str, arguments: Sequence[str], say: Callable[[str], object]) -> int:
    """Run a recipe, and again after each change of its file or of the modules that it imports.

    A run in progress stops after its step, with a checkpoint. Ctrl-C ends.

    Args:
        recipe: Name or file of the recipe.
        arguments: Further arguments of `launcher run`.
        say: Receives a line for the user.

    Returns:
        The exit code.

    Raises:
        UsageError: The recipe is in no file, or the arguments name a folder for one run.
    """
    file = find_file(recipe.partition(":")[0])
    if file is None:
        raise UsageError(
            f"--follow-edits runs a recipe again when its file is saved, and {recipe} names no "
            "file. Give a file, such as mine.py, or the name of a recipe in recipes/."
        )
    if any(argument.partition("=")[0] == "--out" for argument in arguments):
        raise UsageError(
            "--out names the folder of one run, and --follow-edits makes several. Leave it out: "
            "each run makes a folder below runs/."
        )
    command = [*own_program(), "run", recipe, *arguments, "--warm"]
    with handlers_restored():
        for number in _ENDING:
            signal.signal(number, _raise_ended)
        signal.signal(signal.SIGINT, _raise_ended)
        return _follow(file, command, say)


def _follow(file: Path, command: Sequence[str], say: Callable[[str], object]) -> int:
    while True:
        before = module_times(file)
        process = _start(command)
        try:
            _wait_for_edit(file, before, process, say)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait()
        except _EndedBySignalError as end:
            return _end(process, end.args[0])
        say(f"{file.name}, or a module that it imports, has changed: it runs again.")


def _wait_for_edit(
    file: Path,
    before: Mapping[Path, int],
    process: subprocess.Popen[bytes],
    say: Callable[[str], object],
) -> None:
    """Wait until a file has changed, and has stayed the same for a moment."""
    has_said = False
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if not has_said and process.poll() is not None:
            say(f"The run ended with exit code {process.returncode}. It runs again when "
                f"{file.name} is saved; Ctrl-C ends.")  # fmt: skip
            has_said = True
        now = module_times(file)
        if now != before and file in now:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            if module_times(file) == now:
                return


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    watcher = os.getpid()
    return subprocess.Popen(command, preexec_fn=lambda: end_with_parent(watcher))  # noqa: PLW1509


def _end(process: subprocess.Popen[bytes], number: int) -> int:
    """Wait for the last run, which the terminal has told of Ctrl-C; return the exit code."""
    if number != signal.SIGINT and process.poll() is None:
        process.send_signal(number)
    while process.poll() is None:
        with contextlib.suppress(_EndedBySignalError):
            process.wait()
    return EXIT_BY_SIGNAL + number


def _raise_ended(number: int, _: FrameType | None) -> None:
    raise _EndedBySignalError(number)


def module_times(file: Path) -> dict[Path, int]:
    """Return when a recipe's file, and the modules beside it that it imports, were changed.

    Args:
        file: The file of the recipe.

    Returns:
        The times of modification in nanoseconds, by path. Modules are found in the folder of the
        recipe and below it, with the packages that they belong to.
    """
    times: dict[Path, int] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in times:
            continue
        try:
            times[path] = path.stat().st_mtime_ns
            text = path.read_bytes()
        except OSError:
            continue
        with contextlib.suppress(SyntaxError, ValueError):
            waiting += _imported_files(ast.parse(text), path, file.parent)
    return times


def _imported_files(tree: ast.Module, path: Path, root: Path) -> Iterator[Path]:
    """Yield the files that a module may import from the folder of the recipe and from its own.

    Args:
        tree: The module.
        path: Its file.
        root: The folder of the recipe.
    """
    for node in ast.walk(tree):
        names: list[str] = []
        folders = {path.parent, root}
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)]
            folders = set(path.parents[node.level - 1 : node.level]) if node.level else folders
        for name in filter(None, names):
            parts = name.split(".")
            for folder in folders:
                for count in range(1, len(parts) + 1):  # a package is imported before its modules
                    stem = folder.joinpath(*parts[:count])
                    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
                    yield from (each for each in candidates if each.is_file())
