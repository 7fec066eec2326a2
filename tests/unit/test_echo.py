"""What commands print, and how they end if it cannot be printed or something unexpected happens."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click
import pytest

from launcher.cli import group, run_command
from launcher.console.echo import complain, echo

COMMANDS = sorted(group.list_commands(click.Context(group)))


def raising(error: BaseException) -> click.Command:
    """Return a command that raises `error`."""

    @click.command
    def command() -> None:
        raise error

    return command


def test_control_characters_of_a_text_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A text is printed with escapes, and with the colours that the caller adds."""
    echo("a\x1b[2J\n\u202eb")
    echo("c\x07", newline=False, style=lambda text: text.upper())
    assert capsys.readouterr().out == "a\\x1b[2J\n\\u202eb\nC\\X07"


def test_a_file_for_programs_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    """Text that other programs read keeps its characters if no terminal shows it."""
    echo("a\u202eb", exact=True)
    assert capsys.readouterr().out == "a\u202eb\n"


def test_a_stream_gets_what_it_can_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that the encoding of a stream lacks are written as escapes."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    echo("café \udce9")
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    assert stream.buffer.getvalue() == b"caf\\xe9 \\udce9\n"


def test_a_long_error_message_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    """An error message of 10 MB is printed with its beginning and its end."""
    complain("a" * 10_000_000)
    assert len(capsys.readouterr().err) < 30_000


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (PermissionError(13, "Permission denied", "/a\x1b/b"), 2, "/a\\x1b/b: Permission denied."),
        (OSError(36, "File name too long", "x" * 300), 2, "File name too long."),
        (OSError(28, "No space left on device"), 1, "No space left on device."),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
        (MemoryError(), 1, "Memory ran out."),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_the_system_is_one_message(
    capsys: pytest.CaptureFixture[str], error: BaseException, exit_code: int, message: str
) -> None:
    """An error of the system that a command raises ends it with one message."""
    assert run_command(raising(error), []) == exit_code
    err = capsys.readouterr().err
    assert message in err
    assert err.strip().count("\n") == 0


@pytest.mark.parametrize("error", [KeyError("lr\x1b"), EOFError(), OSError("no number")])
def test_a_bug_is_shown_with_its_traceback(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """An exception that nothing expected is called a bug, and its traceback is shown once."""
    assert run_command(raising(error), []) == 1
    err = capsys.readouterr().err
    assert err.count("Traceback (most recent call last)") == 1
    assert "a bug of launcher" in err
    assert "\x1b" not in err


def test_the_reader_of_the_output_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command whose output is closed, as by `head`, ends quietly with exit code 0."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # it has no descriptor to redirect
    assert run_command(raising(BrokenPipeError(32, "Broken pipe")), []) == 0


@pytest.mark.parametrize(
    "arguments",
    [["--version"], *([name, "--help"] for name in COMMANDS), ["recipes"], ["plan", "digits"]],
    ids=" ".join,
)
def test_output_that_cannot_be_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """A command whose output meets a full disk ends with one message and exit code 1."""
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_command(group, arguments, "launcher") == 1
    err = capsys.readouterr().err
    assert err == "launcher: standard output cannot be written: No space left on device.\n"
