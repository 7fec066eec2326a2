"""`launcher new` writes recipes under names that work, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.recipe.resolve import resolve
from launcher.recipe.scaffold import new_recipe


@pytest.mark.parametrize(
    "name", ["\u00fcn\u00ef", "class", "1a", "my recipe", "torch", "yaml", "json", "launcher"]
)
def test_a_name_that_would_not_work_is_refused(name: str, tmp_path: Path) -> None:
    """Neither a name that no run may have nor that of another module becomes a recipe."""
    with pytest.raises(UsageError):
        new_recipe(tmp_path / f"{name}.py")
    assert list(tmp_path.iterdir()) == []


def test_other_names_are_written(tmp_path: Path) -> None:
    """A name of letters, digits and underscores becomes a recipe that can be built."""
    new_recipe(tmp_path / "deep" / "mine_2.py")
    reference = resolve(str(tmp_path / "deep" / "mine_2.py"))
    assert reference.function().name == "mine_2"
