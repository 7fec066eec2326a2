"""Shell completion, tested in a real bash."""

from __future__ import annotations

import pytest
from support import Commands

SCRIPT = """
eval "$(launcher completion bash)"
compopt() { echo "compopt $*" >&2; }
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_launcher_completion launcher
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["repo"], ["report"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["run", "dig"], ["digits"]),
        (["run", "mine.py", "strat"], ["strategy="]),
        (["run", "dist"], ["distill", "distances.py"]),
        (["run", "gpt", "lay"], ["layers="]),
        (["settings", "lr_r"], ["lr_rule"]),
        (["run", "digits", "strategy", "="], ["ddp", "fsdp", "zero1", "zero2", "zero3"]),
        (["run", "digits", "strategy", "=", "f"], ["fsdp"]),
        (["run", "digits", "lr", "=", "0.1", "offl"], ["offload="]),
        (["run", "digits", "compile", "=", ""], ["true", "false"]),
        (["run", "digits", "trackers", "=", "tens"], ["tensorboard"]),
        (["run", "digits", "schedule", "=", "one"], ["one_cycle()"]),
        (["run", "digits", "--max-re"], ["--max-restarts"]),
        (["watch", ""], ["runs/one"]),
    ],
)
def test_bash_completes(run: Commands, words: list[str], offered: list[str]) -> None:
    """Bash completes commands, options, recipes, settings with their values, and run folders."""
    (run.folder / "runs/one").mkdir(parents=True)
    (run.folder / "runs/one/run.yaml").touch()
    (run.folder / "distances.py").touch()
    done = run("bash", "-c", SCRIPT, "bash", "launcher", *words)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == offered
    assert ("nospace" in done.stderr) is offered[0].endswith("=")


@pytest.mark.parametrize(("shell", "word"), [("zsh", "compdef"), ("fish", "complete")])
def test_other_shells_have_scripts(run: Commands, shell: str, word: str) -> None:
    """`launcher completion` prints a script for zsh and for fish."""
    done = run("launcher", "completion", shell)
    assert done.exit_code == 0
    assert word in done.stdout
    assert "_LAUNCHER_COMPLETE" in done.stdout


def test_zsh_completes_a_setting_as_one_word(run: Commands) -> None:
    """In zsh, which does not split words at `=`, `strategy=f` completes to `strategy=fsdp`."""
    done = run(
        *("launcher",),
        env={
            "_LAUNCHER_COMPLETE": "zsh_complete",
            "COMP_WORDS": "launcher run digits strategy=f",
            "COMP_CWORD": "3",
        },
    )
    assert "strategy=fsdp" in done.stdout
