"""YAML files: whatever a file holds, it is read at once or refused with its name and line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launcher.errors import OverrideError, SlurmError
from launcher.recipe.overrides import read_yaml
from launcher.slurm.site import read_site
from launcher.yaml_file import read_yaml_file

SECONDS = 5.0
"""Longest time that any file may take."""


def bomb() -> str:
    """Return a line that stands for 9 ** 9 texts."""
    lists = ["&a0 [x,x,x,x,x,x,x,x,x]"]
    lists += [f"&a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 9)]
    return f"lr: [{', '.join(lists)}]"


DAMAGES: dict[str, tuple[str | bytes, int]] = {
    "an integer that is none": ("lr: !!int x\n", 1),
    "an empty integer": ('x: 1\nlr: !!int ""\n', 2),
    "a date that does not exist": ("x: 1\nlr: 2001-99-99\n", 2),
    "a truth value that is none": ("lr: !!bool maybe\n", 1),
    "a time that is none": ("lr: !!timestamp x\n", 1),
    "a character beyond Unicode": ('lr: "\\U00110000"\n', 1),
    "half of a character": ('x: 1\nlr: "\\ud800"\n', 2),
    "a byte that is not UTF-8": (b"x: 1\nlr: \xff\n", 2),
    "a NUL byte": ("x: 1\nlr: \0\n", 2),
    "deep lists": ("lr: " + "[" * 1000, 1),
    "very deep lists": ("x: 1\nlr: " + "[" * 100_000, 2),
    "deep mappings": ("lr: " + "{a: " * 1000, 1),
    "an integer of 5,000 hexadecimal digits": ("lr: 0x" + "f" * 5000, 1),
    "an integer of 5,000 digits": ("lr: " + "1" * 5000, 1),
    "an anchor bomb": (bomb(), 1),
    "an alias that contains itself": ("lr: &a [*a]\n", 1),
    "an alias without an anchor": ("lr: *a\n", 1),
    "a list as a name": ("? [a]\n: 1\n", 1),
    "a mapping as a name within a value": ("lr: {{a: 1}: 2}\n", 1),
    "a tag that would run code": ("lr: !!python/object/apply:os.abort []\n", 1),
    "a name given twice": ("lr: 1\nlr: 2\n", 2),
    "two documents": ("lr: 1\n---\nlr: 2\n", 2),
    "an open bracket": ("x: 1\nlr: [1,\n", 3),
}


@pytest.mark.parametrize(("content", "line"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_yaml_is_refused_with_its_line(
    tmp_path: Path, content: str | bytes, line: int
) -> None:
    """Whatever is wrong in a file of settings is one short error with the file and the line."""
    path = tmp_path / "settings.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.monotonic()
    with pytest.raises(OverrideError) as caught:
        read_yaml(path)
    assert time.monotonic() - started < SECONDS
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert len(str(caught.value)) < 1000
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    "content",
    ["partition: " + "[" * 1000, 'partition: "\\U00110000"', bomb(), "env: {[a]: b}", "time: *a"],
)
def test_damaged_site_profiles_are_refused(tmp_path: Path, content: str) -> None:
    """A site profile, whose values stay text, has the same limits."""
    path = tmp_path / "site.yaml"
    path.write_text(content)
    with pytest.raises((OverrideError, SlurmError), match="line 1"):
        read_site(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A FIFO, a device, a folder and a file of a terabyte are refused at once."""
    fifo, large = tmp_path / "fifo", tmp_path / "large"
    os.mkfifo(fifo)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    started = time.monotonic()
    for path in (fifo, Path("/dev/zero"), tmp_path, large, tmp_path / "missing"):
        with pytest.raises(OverrideError, match=f"Cannot read {path}: "):
            read_yaml(path)
    assert time.monotonic() - started < SECONDS


def test_aliases_are_read(tmp_path: Path) -> None:
    """An anchor that is used a few times works, as do lines of names."""
    path = tmp_path / "settings.yaml"
    path.write_text("a: &x [1, 2]\nb: *x\n\nc: [*x, *x]\n")
    file = read_yaml_file(path)
    assert file.value == {"a": [1, 2], "b": [1, 2], "c": [[1, 2], [1, 2]]}
    assert file.lines == {"a": 1, "b": 2, "c": 4}


def test_numbers_mean_the_same_as_on_the_command_line(tmp_path: Path) -> None:
    """A zero before digits is no octal number, and digits with colons are text, not base 60."""
    path = tmp_path / "settings.yaml"
    path.write_text("a: 010\nb: 1:30\nc: 12:30:00.5\nd: 1_000\ne: 1e-3\nf: 0\ng: 0.5\n")
    values = read_yaml_file(path).value
    assert values == {
        "a": "010",
        "b": "1:30",
        "c": "12:30:00.5",
        "d": 1000,
        "e": "1e-3",
        "f": 0,
        "g": 0.5,
    }
