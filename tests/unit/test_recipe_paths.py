"""Texts that name no recipe: each is refused at once, with what was found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import RecipeError
from launcher.recipe.resolve import resolve

RECIPE = "from launcher import Recipe\n"

FILES = {
    "null": (b"x = 1\0\n", "null bytes.", "SyntaxError"),
    "broken": (b"def broken(:\n", "line 1", "SyntaxError"),
    "nested": (b"(" * 5000, "line 1", "SyntaxError"),
    "exits": (f"{RECIPE}raise SystemExit(0)\n".encode(), "line 2", "SystemExit: 0"),
    "large": (b"#" * (2**22 + 1), "4,194,305 bytes", "too large"),
    "waits": (f"{RECIPE}async def waits() -> Recipe: ...\n".encode(), "async function", "`def "),
    "none": (f"{RECIPE}none = 3\n".encode(), "`launcher new NAME`", "docs/porting.md"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_holds_no_recipe_is_refused(name: str, tmp_path: Path) -> None:
    """A file that cannot be imported, or holds something else, is one error that says why."""
    content, *words = FILES[name]
    (tmp_path / f"{name}.py").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        resolve(str(tmp_path / f"{name}.py"))
    assert all(word in str(caught.value) for word in words)
    assert "(None" not in str(caught.value)


def test_what_is_no_file_is_refused_without_being_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a FIFO, a device, a link to nothing and names of any length are refused by kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    os.mkfifo("pipe.py")
    Path("device.py").symlink_to("/dev/zero")
    Path("link.py").symlink_to("link.py")
    for text, words in {
        "folder.py": "is a folder",
        ".": "is not the name of a recipe",
        "/": "is a folder",
        "pipe.py": "is not a Python file",
        "device.py": "is not a Python file",
        "/dev/stdin": "is not a Python file",
        "link.py": "is a link to a file that does not exist",
        "gone/mine.py": "There is no folder 'gone' either",
        "digits.py": "is named without .py",
        "x" * 300: "There is no recipe",
        "x" * 300 + ".py": "There is no file",
        "x/" * 3000 + "y.py": "There is no file",
        "mine\udce9.py": "There is no file",
        "mine\0.py": "There is no file",
        "builtins:int": "is a class",
        "os:getcwd": "is a Python function that returns",
        "digits:wide": "Its recipes: digits.",
        "": "is not the name of a recipe",
    }.items():
        with pytest.raises(RecipeError) as caught:
            resolve(text)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 1000
