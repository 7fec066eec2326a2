"""The catalogue of settings, the parameters of recipes, and how the command line shows both."""

from __future__ import annotations

import pydoc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from examples import recipe

from launcher import Data, OverrideError, Recipe, RecipeError
from launcher.cli import group
from launcher.cli.standalone import _command
from launcher.recipe.catalogue import EFFECTS, OTHER, find_setting, settings
from launcher.recipe.overrides import build
from launcher.recipe.parameters import documented_arguments, names_in_source, parameters_of
from launcher.recipe.resolve import reference_of

CASE = '''
from launcher import Recipe


def case(*, depth: int, width: float = 2.0, mirrored=False) -> Recipe:
    """A net on squares.

    Args:
        depth: Number of layers,
            one after another.
        width (float): Factor of the width: of all layers.

    Returns:
        The recipe.
    """
'''


def case(*, depth: int, width: float = 2.0) -> Recipe:
    """A net on squares.

    Args:
        depth: Number of layers.
        width: Factor of the width.
    """
    return replace(recipe(), name=f"case{depth * width:g}")


def shown(*arguments: str) -> str:
    """Return what a command prints, on one line."""
    done = CliRunner().invoke(group, list(arguments), prog_name="launcher")
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_every_setting_is_described() -> None:
    """Each setting has a topic, a type in words, an effect and a sentence."""
    assert len(settings()) > 35
    for setting in settings().values():
        assert setting.topic != OTHER
        assert "?" not in setting.type_words
        assert setting.sentence.endswith(".")
        assert setting.affects in EFFECTS
    assert [name for name, setting in settings().items() if setting.default is None] == ["lr"]


def test_settings_are_listed() -> None:
    """`launcher settings` prints every setting with its type, default, effect and sentence."""
    text = shown("settings")
    for setting in settings().values():
        assert f" {setting.name} {setting.type_words}; " in text
        assert setting.sentence in text
    assert "lr a number greater than 0; required; affects updates" in text


def test_one_setting_is_shown() -> None:
    """`launcher settings NAME` prints that setting alone, with the calls that make its value."""
    text = shown("settings", "optimizer")
    assert "sgd(momentum=0.9, weight_decay=0.0, nesterov=false, decay_1d=true)" in text
    assert "batch_size" not in text


@pytest.mark.parametrize(("name", "offered"), [("learning_rate", "lr="), ("epoch", "epochs")])
def test_another_name_is_refused_with_the_right_one(name: str, offered: str) -> None:
    """A name that is no setting is refused with the setting that is meant."""
    with pytest.raises(OverrideError) as caught:
        find_setting(name)
    assert offered in str(caught.value)


@pytest.mark.parametrize("kind", [Recipe, Data])
def test_python_s_help_has_the_fields(kind: type) -> None:
    """`help(Recipe)` and `help(Data)` show the sentence under each field."""
    text = " ".join(pydoc.plain(pydoc.render_doc(kind)).replace("|", " ").split())
    assert kind.__doc__
    if kind is Recipe:
        assert "lr: Peak learning rate at a batch size of lr_batch_size." in text
    else:
        assert "train: The training set." in text


def test_arguments_are_read_from_the_docstring(tmp_path: Path) -> None:
    """Parameters have the type, the default and the sentence that the function states."""
    names: dict[str, Any] = {}
    exec(compile(CASE, "case.py", "exec"), names)
    depth, width, mirrored = parameters_of(names["case"])
    assert (depth.type_words, depth.default) == ("a whole number", None)
    assert depth.sentence == "Number of layers, one after another."
    assert (width.type_words, width.default) == ("a number", "2.0")
    assert width.sentence == "Factor of the width: of all layers."
    assert (mirrored.type_words, mirrored.default, mirrored.sentence) == ("", "false", "")
    (tmp_path / "case.py").write_text(CASE)
    assert names_in_source(tmp_path / "case.py", "") == ["depth", "width", "mirrored"]


@pytest.mark.parametrize(
    "doc",
    ["", "One line.", "Args:", "A line.\n\nArgs:\nnothing: at the margin", "Args:\n    words"],
)
def test_other_docstrings_document_nothing(doc: str) -> None:
    """A docstring without a section of arguments gives no sentences and no error."""
    assert documented_arguments(doc) == {}


@pytest.mark.parametrize("command", ["run", "plan", "submit", "check", "prove", "tune", "export"])
def test_help_shows_the_parameters_of_the_recipe(command: str, tmp_path: Path) -> None:
    """`launcher COMMAND RECIPE --help` lists the parameters of that recipe."""
    (tmp_path / "case.py").write_text(CASE)
    text = shown(command, str(tmp_path / "case.py"), "--help")
    assert "depth=... Number of layers, one after another. (a whole number, required)" in text
    assert "width=2.0 Factor of the width: of all layers. (a number)" in text
    assert "packed=true" in shown(command, "--help", "gpt")


def test_help_without_a_recipe_imports_none() -> None:
    """`launcher run --help` imports no recipe, and says where parameters are listed."""
    sys.modules.pop("launcher.recipes.gpt", None)
    text = shown("run", "--help")
    assert "RECIPE --help" in text
    assert "launcher.recipes.gpt" not in sys.modules


@pytest.mark.parametrize("text", ["import torch\n", "from launcher import nothing\n", "("])
def test_help_survives_a_recipe_that_cannot_be_imported(text: str, tmp_path: Path) -> None:
    """The help of a recipe that cannot be imported is the plain help and one line about it."""
    (tmp_path / "broken.py").write_text(text)
    path = str(tmp_path / "broken.py")
    words = shown("run", path, "--help")
    assert f"The parameters of {path} are not shown: " in words.replace("- ", "-")
    assert "--nproc-per-node" in words


def test_the_help_of_a_recipe_s_file_shows_its_parameters() -> None:
    """`python case.py --help` lists the parameters, and its text leaves out their section."""
    done = CliRunner().invoke(_command(case), ["--help"])
    assert done.exit_code == 0
    assert "  depth=...  Number of layers. (a whole number, required)" in done.output
    assert "A net on squares." in done.output
    assert "Args:" not in done.output


def test_a_missing_parameter_is_named() -> None:
    """A recipe without a parameter that it requires is refused by the parameter's name."""
    with pytest.raises(RecipeError, match=r"case\(\) needs depth=\.\.\. .* Number of layers"):
        build(reference_of(case))
