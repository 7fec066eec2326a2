"""Recipes, found by name, path or module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import ROOT, Commands

REFERENCES = [
    "digits",
    "recipes.digits",
    "recipes.digits:digits",
    "launcher.recipes.digits",
    "launcher.recipes.digits:digits",
    "recipes/digits.py",
    "recipes/digits",
    str(ROOT / "recipes/digits.py") + ":digits",
]


@pytest.mark.parametrize("reference", REFERENCES)
def test_every_form_of_reference_is_resolved(run: Commands, reference: str) -> None:
    """A name, a module and a path relative to the working folder resolve to the same recipe."""
    (run.folder / "recipes").symlink_to(ROOT / "recipes")
    done = run("launcher", "plan", reference, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == "digits"


def test_another_package_called_recipes_is_no_obstacle(run: Commands) -> None:
    """An installed package called `recipes`, which fails to import, is ignored."""
    other = run.folder / "site/recipes"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ModuleNotFoundError('do not import recipes')\n")
    done = run("launcher", "plan", "digits", env={"PYTHONPATH": str(other.parent)})
    assert done.exit_code == 0, done.stderr


def test_a_local_recipe_hides_a_shipped_one(run: Commands) -> None:
    """./recipes/digits.py takes precedence over the shipped recipe, and imports its neighbours."""
    folder = run.folder / "recipes"
    folder.mkdir()
    (folder / "neighbour.py").write_text("NAME = 'mine'\n")
    (folder / "digits.py").write_text(
        "from dataclasses import replace\n"
        "from neighbour import NAME\n"
        "from launcher import Data, Recipe\n"
        "def digits() -> Recipe:\n"
        "    return Recipe(name=NAME, model=print, data=print, loss=print, batch_size=8, lr=1,\n"
        "                  lr_batch_size=8, steps=3)\n"
    )
    done = run("launcher", "plan", "digits", "--json")
    assert json.loads(done.stdout)["recipe"] == "mine"


@pytest.mark.parametrize(
    ("statement", "advice"),
    [
        ("from recipes.digits import digits", "launcher.recipes.digits."),
        ("from recipes.nothing import digits", "'recipes' that Python found is {}/recipes/__init"),
        ("import no_such_package", "Install 'no_such_package' into this environment."),
        ("import helpers.one", "'helpers' in {}"),
    ],
)
def test_missing_modules_are_told_from_hidden_ones(
    run: Commands, statement: str, advice: str
) -> None:
    """The advice is to install a missing package, or names the place of one that was not found."""
    for folder in ("recipes", "helpers", "sub"):
        (run.folder / folder).mkdir()
    (run.folder / "recipes/__init__.py").write_text("")
    (run.folder / "sub/mine.py").write_text(f"{statement}\nfrom launcher import Recipe\n")
    done = run("launcher", "plan", "sub/mine.py")
    assert done.exit_code == 2
    (run.folder / "mine.py").write_text(f"{statement}\nfrom launcher import Recipe\n")
    in_working_folder = run("launcher", "plan", "mine.py")
    assert in_working_folder.exit_code == 2
    stderr = done.stderr if "helpers" in statement else in_working_folder.stderr
    assert advice.format(run.folder) in stderr


def test_a_copied_recipe_can_be_imported(run: Commands) -> None:
    """Another file in ./recipes can import the file that `launcher new` writes there."""
    assert run("launcher", "new", "recipes/ft.py", "--from", "finetune").exit_code == 0
    (run.folder / "recipes/two.py").write_text(
        "from launcher import Recipe\n"
        "from recipes.ft import from_scratch\n"
        "def two() -> Recipe:\n"
        "    return from_scratch()\n"
    )
    done = run("python", "-m", "launcher", "plan", "recipes/two.py")
    assert done.exit_code == 0, done.stderr
    (run.folder / "recipes/__init__.py").write_text("")
    done = run("launcher", "plan", "recipes.two")
    assert done.exit_code == 0, done.stderr


def test_folders_with_special_characters(run: Commands, tmp_path: Path) -> None:
    """A recipe trains in folders whose names have quotes, blanks and dollar signs."""
    folder = tmp_path / "a'; touch pwned" / 'b"=0" $(x) ${local_rank}'
    folder.mkdir(parents=True)
    source = (ROOT / "recipes/digits.py").read_text()
    (folder / "digits.py").write_text(source)
    done = run("launcher", "run", folder / "digits.py", "epochs=1", "--out", folder / "out")
    assert done.exit_code == 0, done.stderr
    assert (folder / "out/result.json").is_file()
    assert not (run.folder / "pwned").exists()
