"""Commands, options and names that do not exist, and what is offered instead of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from examples import recipe

from launcher import Recipe
from launcher.cli import group, run_command
from launcher.cli.standalone import _command
from launcher.errors import did_you_mean

CASES = {
    "plan digits --lr 0.1": "Write lr=0.1.",
    "plan --lr 0.1 digits": "Write lr=0.1.",
    "plan digits -lr 0.1": "Write lr=0.1.",
    "plan digits --LR=0.1": "Write lr=0.1.",
    "plan digits --batch-size 32 epochs=1": "Write batch_size=32.",
    "plan digits --schedule cosine(final_factor=0.1)": "'schedule=cosine(final_factor=0.1)'",
    "plan digits --compile": "Write compile=VALUE.",
    "plan digits --compile epochs=1": "Write compile=VALUE.",
    "run gpt --layers 2": "Write layers=2.",
    "run --layers=2 gpt": "Write layers=2.",
    "run digits --learning-rate 0.1": "Write lr=0.1 instead.",
    "run digits --learing-rate 0.1": "Write lr=0.1 instead.",
    "run digits --bf16 lr=0.1": "Write precision=bf16 instead.",
    "run digits --output_dir there": "Write --out there instead.",
    "run digits --nproc-per 2": "Did you mean --nproc-per-node?",
    "prove digits --steps 24 --zebra": "`launcher prove --help`",
    "run digits -qz": "no option -z",
    "plan digits lr 0.1": "such as lr=0.1.",
    "plan digits lr = 0.1": "such as lr=0.1.",
    "plan digits lr =0.1": "such as lr=0.1.",
    "plan digits lr= 0.1": "such as lr=0.1.",
    "plan digits lr epochs=1": "such as lr=0.2.",
    "plan digits optimizer=adamw(lr=0.1)": "takes no 'lr'; it takes beta1",
    "plan digits optimizer=adamw(betas=0)": "optimizer=adamw(beta1=...",
    "plan digts": "Did you mean digits?",
    "plan digits.py": "The recipe digits is named without .py.",
    "new mine --from causal_lm": "Did you mean finetune:causal_lm?",
    "settings learning_rate": "Write lr=... instead.",
    "digits lr=0.1": "`launcher run digits lr=0.1`",
    "train digits": "`launcher run RECIPE`",
    "rus": "Did you mean runs or run?",
    "find lrs digits": "Did you mean lr?",
    "\x1b[2J": r"no command '\x1b[2J'",
}


@pytest.mark.parametrize(("line", "offered"), CASES.items())
def test_what_is_meant_is_offered(
    line: str,
    offered: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A word that does not exist ends with exit code 2 and one line, which says what to write."""
    monkeypatch.chdir(tmp_path)
    assert run_command(group, line.split(" "), "launcher") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert offered in shown.err
    assert shown.err.count("\n") == 1


def a_recipe(*, depth: int = 2) -> Recipe:
    return recipe(name=f"depth{depth}")


@pytest.mark.parametrize(
    ("argument", "offered"),
    [
        ("--lr=0.1", "Write lr=0.1."),
        ("--depth=3", "Write depth=3."),
        ("-n2", "`launcher run` has this option"),
        ("--hosts=a,b", "`launcher run` has this option"),
    ],
)
def test_a_recipe_s_own_command_offers_as_much(
    argument: str, offered: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python mine.py` offers settings, parameters of the recipe, and the options of others."""
    assert run_command(_command(a_recipe), [argument], "mine.py") == 2
    assert offered in capsys.readouterr().err


def test_dashes_and_case_are_not_compared() -> None:
    """An option is similar to a name, and shown as it is given."""
    assert did_you_mean("--Num-Workers", ["num_workers", "seed"]) == " Did you mean num_workers?"
    assert did_you_mean("confg", ["--config", "--out"]) == " Did you mean --config?"
    assert (
        did_you_mean("nproc", ["--nproc-per-node", "--plot"]) == " Did you mean --nproc-per-node?"
    )
    assert did_you_mean("zebra", ["--config"]) == ""
