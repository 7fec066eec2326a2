"""Recipes that are in no file, written by their value and read again."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher
from launcher.recipe import by_value
from launcher.recipe.resolve import is_in_no_file, resolve

TYPED = """
import enum
from dataclasses import dataclass
from launcher import Recipe
from launcher.recipes.digits import digits

rate = 0.5

class Kind(enum.Enum):
    small = 1

@dataclass
class Settings:
    kind: Kind = Kind.small

    def rate(self):
        return rate

def mine(*, batch: int = 64) -> Recipe:
    settings = Settings()
    assert settings.kind is Kind.small
    return Recipe(
        name="mine", model=digits().model, data=digits().data, loss=digits().loss,
        batch_size=batch, lr=settings.rate(), epochs=1,
    )
"""


def typed(text: str, **values: Any) -> dict[str, Any]:
    """Return the variables of a prompt after `text` was typed there."""
    variables = {"__name__": "__main__", **values}
    exec(compile(text, "<stdin>", "exec"), variables)
    return variables


def test_a_typed_recipe_is_the_same_elsewhere(tmp_path: Path) -> None:
    """A recipe that is read again has the values that its variables had when it was written."""
    variables = typed(TYPED)
    assert is_in_no_file(variables["mine"])
    location = by_value.write(variables["mine"], tmp_path)
    variables["rate"] = 7.0
    assert location == f"{tmp_path}/recipe.py:mine"
    for text in (location, f"{tmp_path}/recipe.py"):
        recipe = resolve(text).function(batch=32)
        assert (recipe.lr, recipe.batch_size) == (0.5, 32)
    assert variables["mine"]().lr == 7.0


def test_classes_of_a_typed_recipe_can_be_pickled(tmp_path: Path) -> None:
    """Instances of its classes can be sent between processes that have read the same recipe."""
    variables = typed(TYPED)
    function = resolve(by_value.write(variables["mine"], tmp_path)).function
    made = function.__globals__["Settings"]()
    assert type(made) is not variables["Settings"]
    assert type(made).__module__.startswith("launcher_recipe_")
    assert type(pickle.loads(pickle.dumps(made))) is type(made)
    assert variables["Settings"].__module__ == "__main__"


def open_file() -> io.TextIOWrapper:
    """Return a file that is open for reading."""
    return Path(__file__).open(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (open_file, "an open file"),
        (lambda: torch.empty(2, device="meta"), "a tensor on meta"),
        (lambda: (each for each in "ab"), "a generator, which cannot be pickled"),
        (lambda: {"a": [open_file()]}, "a dict, which cannot be pickled"),
    ],
)
def test_what_cannot_be_sent_is_named(
    make: Callable[[], object], words: str, tmp_path: Path
) -> None:
    """A recipe is refused if it uses what no other process can have, by name and by who uses it."""
    text = f"{TYPED}\ndef reads():\n    return held\ndef bad():\n    return mine(), reads()\n"
    held = make()
    variables = typed(text, held=held)
    with pytest.raises(launcher.RecipeError, match="reads uses `held`") as caught:
        by_value.write(variables["bad"], tmp_path)
    assert words in str(caught.value)
    assert not any(tmp_path.iterdir())
    for file in (held, *(held.get("a", ()) if isinstance(held, dict) else ())):
        if isinstance(file, io.IOBase):
            file.close()


def test_a_closure_over_a_file_is_refused() -> None:
    """`launcher.run` refuses a typed recipe that closes over an open file before a run starts."""
    text = f"{TYPED}\ndef make(log):\n    return lambda: log.name or mine()\n"
    with open_file() as file:
        recipe = typed(text)["make"](file)
        with pytest.raises(launcher.RecipeError, match="`log`, an open file"):
            launcher.run(recipe, nproc_per_node=1)


def test_a_recipe_of_another_python_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte code of another version of Python is not run; a damaged pickle is refused too."""
    location = by_value.write(typed(TYPED)["mine"], tmp_path)
    path = tmp_path / "recipe.pickle"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(launcher.RecipeError, match="damaged"):
        resolve(location)
    path.unlink()
    with pytest.raises(launcher.RecipeError, match="No such file"):
        resolve(location)
    monkeypatch.setattr(sys, "version_info", (3, 99))
    monkeypatch.setattr(by_value, "_python_version", lambda: "3.99")
    with pytest.raises(launcher.RecipeError, match=r"Python 3\.99"):
        resolve(location)
