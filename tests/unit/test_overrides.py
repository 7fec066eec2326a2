"""Overrides: a YAML file is stronger than the recipe, the command line stronger than both."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from launcher import OverrideError, Recipe, RecipeError, adamw, cosine, muon
from launcher.recipe.overrides import Override, build, read_arguments, read_yaml
from launcher.recipe.resolve import Reference


def nothing(*_: Any) -> Any:
    raise AssertionError


def example(
    *, width: int = 32, folder: Path = Path("/data"), mode: Literal["a", "b"] = "a"
) -> Recipe:
    """Return a recipe whose function has parameters."""
    return Recipe(
        name=f"{width}-{folder.name}-{mode}",
        model=nothing,
        data=nothing,
        loss=nothing,
        batch_size=256,
        lr=0.1,
        lr_batch_size=256,
        epochs=10,
    )


EXAMPLE = Reference(location="tests:example", function=example)


def test_the_command_line_is_stronger_than_a_file(tmp_path: Path) -> None:
    """Each value comes from the strongest source that has it, and the source is recorded."""
    file = tmp_path / "values.yaml"
    file.write_text("lr: 1e-3\nepochs: 7\nschedule: cosine(final_factor=0.1)\n")
    built = build(EXAMPLE, [*read_yaml(file), *read_arguments(["epochs=3", "seed=5"])])
    assert (built.recipe.lr, built.recipe.epochs, built.recipe.seed) == (1e-3, 3, 5)
    assert built.recipe.schedule == cosine(final_factor=0.1)
    assert built.sources["lr"] == f"{file}, line 1"
    assert built.sources["epochs"] == "command line"
    assert built.sources["batch_size"] == "recipe"
    assert built.sources["precision"] == "default"


def test_parameters_of_the_recipe_function() -> None:
    """An override named like a parameter of the function becomes its argument."""
    built = build(EXAMPLE, read_arguments(["width=64", "folder=~/x", "mode=b"]))
    assert built.recipe.name == "64-x-b"
    assert built.parameters == {"width": 64, "folder": Path("~/x").expanduser(), "mode": "b"}


def test_one_of_an_exclusive_pair_clears_the_other() -> None:
    """Overriding steps clears epochs, and overriding batch_size_per_gpu clears batch_size."""
    built = build(EXAMPLE, read_arguments(["steps=100", "batch_size_per_gpu=32"]))
    assert (built.recipe.steps, built.recipe.epochs) == (100, None)
    assert (built.recipe.batch_size_per_gpu, built.recipe.batch_size) == (32, None)
    assert built.sources["epochs"] == "replaced by steps"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_grad_norm=none", None),
        ("max_grad_norm=1e0", 1.0),
        ("in_memory=yes", True),
        ("in_memory=false", False),
        ("num_workers=0", 0),
        ("precision=bf16", "bf16"),
        ("train_samples=1e3", 1000),
        ("batch_milestones=0.3,0.6", (0.3, 0.6)),
        ("optimizer=adamw(decay_1d=false)", adamw(decay_1d=False)),
        ("optimizer=adamw(state_dtype=bf16)", adamw(state_dtype="bf16")),
        ("optimizer=muon(exclude=[head, '*.gate'])", muon(exclude=("head", "*.gate"))),
    ],
)
def test_text_is_read_by_the_type_of_the_setting(argument: str, value: Any) -> None:
    """None, yes and no, lists, calls and every notation of a number are read from text."""
    recipe = build(EXAMPLE, read_arguments([argument])).recipe
    assert getattr(recipe, argument.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batchsize=3"], "no such setting. Did you mean batch_size"),
        (["witdh=3"], "Did you mean width"),
        (
            ["lr=fast"],
            "lr=fast (command line): expected a number greater than 0, found the text 'fast'",
        ),
        (["lr=-1"], "expected a number greater than 0"),
        (["lr=inf"], "expected a number greater than 0"),
        (["epochs=1.5"], "expected a whole number of at least 1"),
        (["precision=fp8"], "expected fp32 or bf16"),
        (["strategy=fdsp"], "Did you mean fsdp?"),
        (["trackers=tensorbord"], "Did you mean tensorboard?"),
        (["schedule=cosin"], "Did you mean cosine?"),
        (["schedule=cosine(x=1)"], "takes no 'x'"),
        (["optimizer=adam"], "Did you mean adamw?"),
        (["optimizer=muon(adjust=orig)"], "match_rms_adamw or original"),
        (["model=net"], "cannot be given as text"),
        (["mode=c"], "expected a or b"),
        (["lr"], "expected name=value"),
        (["=3"], "expected name=value"),
        (["lr=1", "lr=2"], "given twice"),
        (["steps=1", "epochs=1"], "exclude each other"),
        (
            ["batch_milestones=1.5"],
            "each item a number of at least 0 and at most 1",
        ),
    ],
)
def test_bad_values_are_refused(arguments: list[str], message: str) -> None:
    """A bad override is refused with the setting, what was expected and what was found."""
    with pytest.raises(OverrideError) as caught:
        build(EXAMPLE, read_arguments(arguments))
    assert message in str(caught.value)


@pytest.mark.parametrize("arguments", [["steps=none", "epochs=3"], ["epochs=3", "steps=none"]])
def test_none_excludes_nothing(arguments: list[str]) -> None:
    """Of two settings that exclude each other, one may be none beside a value of the other."""
    recipe = build(EXAMPLE, read_arguments(arguments)).recipe
    assert (recipe.epochs, recipe.steps) == (3, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1\nseed: 2", "line 2: not YAML"),
        ("lr: 1\nlr: 2", "line 2: lr"),
        ("- lr", "expected lines `name: value`"),
        ("just text", "expected lines `name: value`"),
        ("seed: 1\nlr: fast", "line 2): expected a number"),
        ("seed: 1\nepochz: 2", "line 2): there is no such setting"),
        ("epochs: 1\nsteps: 2", "exclude each other"),
        ("a: !!python/object:os.system x", "not YAML"),
    ],
)
def test_bad_yaml_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    """A YAML file that does not parse or fit is refused with its name and the line."""
    file = tmp_path / "values.yaml"
    file.write_text(text)
    with pytest.raises(OverrideError) as caught:
        build(EXAMPLE, read_yaml(file))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_stronger_source_clears_the_other_of_a_pair(tmp_path: Path) -> None:
    """Steps from a stronger source clear the epochs of a YAML file."""
    file = tmp_path / "values.yaml"
    file.write_text("epochs: 3")
    built = build(EXAMPLE, [*read_yaml(file), Override(name="steps", value=9, source="find lr")])
    assert (built.recipe.epochs, built.recipe.steps) == (None, 9)


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    """A missing YAML file is an error; an empty one gives no overrides."""
    with pytest.raises(OverrideError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == ()


def test_a_function_that_fails_or_returns_something_else() -> None:
    """An exception in the recipe function is shown with its line; other results are refused."""

    def raises() -> Recipe:
        raise KeyError("learning rate")

    def returns() -> Recipe:
        return {"lr": 3}  # type: ignore[return-value]

    def misspelt() -> Recipe:
        return Recipe(batchsize=3)  # type: ignore[call-arg]

    for function, message in (
        (raises, r"KeyError: 'learning rate' \(.*test_overrides.py, line \d+\)"),
        (returns, "returned dict, not a Recipe"),
        (misspelt, "unexpected keyword argument 'batchsize'"),
    ):
        with pytest.raises(RecipeError, match=message):
            build(Reference(location="x:y", function=function))


def test_an_override_prints_with_its_source() -> None:
    """The text of an override is the argument and its source."""
    assert str(Override(name="lr", value="1", source="command line")) == "lr=1 (command line)"
