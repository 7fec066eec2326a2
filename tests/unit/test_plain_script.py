"""Files without a recipe, which are recognised before they are imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher import RecipeError
from launcher.recipe.resolve import resolve

TRAINS = "raise SystemExit('this file was run')\n"

PLAIN = {
    "top": f"import torch\n{TRAINS}",
    "arguments": f"import argparse\n{TRAINS}",
    "own_name": f"import torch\ndef own_name():\n    pass\n{TRAINS}",
    "model": f"from torch import nn\nclass Net(nn.Module):\n    pass\n{TRAINS}",
    "empty": "",
}

RECIPES = {
    "annotated": "from launcher import Recipe\ndef one() -> Recipe:\n    ...\n",
    "text": "def one() -> 'launcher.Recipe':\n    ...\n",
    "named": "from json import loads as named\n",
    "starred": "from json import *\nstarred = loads\n",
    "late": "import torch.nn\nfrom launcher import Recipe\ndef late():\n    ...\n",
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_training_script_is_not_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training script is refused, as a file and as a module, without being run."""
    (tmp_path / f"plain_{name}.py").write_text(PLAIN[name].replace(name, f"plain_{name}"))
    monkeypatch.chdir(tmp_path)
    for text in (f"plain_{name}.py", f"./plain_{name}.py", f"plain_{name}"):
        with pytest.raises(RecipeError) as caught:
            resolve(text)
        for word in ("launcher new", "-> Recipe", "docs/porting.md"):
            assert word in str(caught.value)
    assert f"plain_{name}" not in sys.modules


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_that_may_hold_a_recipe_is_imported(name: str, tmp_path: Path) -> None:
    """A file that imports launcher, or defines what is asked for, is imported."""
    (tmp_path / f"{name}.py").write_text(RECIPES[name])
    assert callable(resolve(str(tmp_path / f"{name}.py")).function)


def test_a_function_that_is_named_is_taken(tmp_path: Path) -> None:
    """A file that imports torch first is imported if the function that is asked for is in it."""
    (tmp_path / "heavy_one.py").write_text("import torch.nn\ndef make():\n    ...\n")
    assert resolve(f"{tmp_path / 'heavy_one.py'}:make").function.__name__ == "make"
    with pytest.raises(RecipeError, match="launcher new"):
        resolve(f"{tmp_path / 'heavy_one.py'}:other")


def test_a_file_of_launcher_s_without_a_recipe_is_told_the_same(tmp_path: Path) -> None:
    """A file that imports launcher and has no recipe is imported, and told what a recipe is."""
    (tmp_path / "nothing_here.py").write_text("import launcher\n")
    with pytest.raises(RecipeError, match=r"no recipe: no function .* `launcher new NAME`"):
        resolve(str(tmp_path / "nothing_here.py"))
