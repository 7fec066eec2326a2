"""Fuzzing of command lines: each ends with a documented exit code and at most one error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from fuzz.harness import invoke
from fuzz.strategies import numbers, texts
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.cli import group
from launcher.recipe.recipe import setting_types

SETTINGS = [*setting_types(), "schedule", "optimizer", "model", "unknown", "LR", ""]

COMMANDS = [
    ["plan", "{}"],
    ["plan", "digits", "--config", "{}"],
    ["plan", "digits", "--estimate", "{}"],
    ["plan", "digits", "--estimate", ".", "--cluster", "{}"],
    ["plan", "digits", "-n", "{}"],
    ["plan", "digits", "--nodes", "{}"],
    ["plan", "digits", "{}"],
    ["plan", "digits", "--{}"],
    ["submit", "digits", "--dry-run", "--nodes", "{}"],
    ["submit", "digits", "--dry-run", "--time", "{}"],
    ["submit", "digits", "--dry-run", "--cluster", "{}"],
    ["submit", "digits", "--dry-run", "--array", "{}"],
    ["submit", "digits", "--dry-run", "--gpus-per-node", "{}"],
    ["submit", "digits", "--dry-run", "--out", "{}"],
    ["resume", "{}"],
    ["resume", "empty", "--from", "{}"],
    ["report", "{}"],
    ["runs", "{}"],
    ["runs", "--sort", "{}"],
    ["watch", "{}"],
    ["status", "{}"],
    ["logs", "{}"],
    ["logs", "empty", "--rank", "{}"],
    ["cancel", "{}"],
    ["recipes", "{}"],
    ["completion", "{}"],
    ["{}"],
]
"""Commands that read an argument and start no training, whatever it is."""


def options() -> Iterator[list[str]]:
    """Yield a command line for each option with a value, which a wrong setting keeps from running.

    `doctor`, which takes no settings, would start ranks, and `prove` makes its folder first.
    """
    with click.Context(group) as context:
        commands: dict[tuple[str, ...], click.Command | None]
        commands = {
            (name,): group.get_command(context, name) for name in group.list_commands(context)
        }
        find = commands.pop(("find",))
        assert isinstance(find, click.Group)
        commands |= {
            ("find", name): find.get_command(context, name) for name in find.list_commands(context)
        }
    for words, command in commands.items():
        assert command is not None
        if words[0] in ("doctor", "prove"):
            continue
        takes_settings = any(parameter.name == "overrides" for parameter in command.params)
        target = "empty" if words == ("resume",) else "digits"
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.is_flag:
                arguments = [target, "lr=wrong"] if takes_settings else []
                yield [*words, *arguments, parameter.opts[-1], "{}"]


OPTIONS = list(options())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a working folder with an empty run folder in it."""
    (tmp_path / "empty").mkdir()
    return tmp_path


@given(name=st.sampled_from(SETTINGS), value=texts() | numbers())
@example(name="epochs", value="1000000000000")
@example(name="train_samples", value="1000000000000000000")
def test_settings(folder: Path, name: str, value: str) -> None:
    """`launcher plan` takes or refuses any value of any setting."""
    invoke(["plan", "digits", f"{name}={value}"], folder)


@given(pairs=st.lists(st.tuples(st.sampled_from(SETTINGS), numbers()), max_size=4))
def test_combinations_of_settings(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """`launcher plan` takes or refuses any combination of numbers."""
    invoke(["plan", "digits", *(f"{name}={value}" for name, value in pairs)], folder)


@given(command=st.sampled_from(OPTIONS), value=texts() | numbers())
def test_options(folder: Path, command: list[str], value: str) -> None:
    """Every option of every command takes or refuses any text."""
    invoke([part.replace("{}", value) for part in command], folder)


@given(command=st.sampled_from(COMMANDS), value=texts() | numbers())
def test_arguments(folder: Path, command: list[str], value: str) -> None:
    """Commands take or refuse any text wherever an argument may stand."""
    invoke([part.replace("{}", value) for part in command], folder)
