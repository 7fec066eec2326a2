"""What bash offers behind TAB, by bash itself."""

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
    """Commands, options, recipes, settings with their values, run folders."""
    (run.folder / "runs/one").mkdir(parents=True)
    (run.folder / "runs/one/run.yaml").touch()
    done = run("bash", "-c", SCRIPT, "bash", "launcher", *words)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == offered
    assert ("nospace" in done.stderr) is offered[0].endswith("=")


@pytest.mark.parametrize(("shell", "word"), [("zsh", "compdef"), ("fish", "complete")])
def test_other_shells_have_scripts(run: Commands, shell: str, word: str) -> None:
    """They are click's own."""
    done = run("launcher", "completion", shell)
    assert done.exit_code == 0
    assert word in done.stdout
    assert "_LAUNCHER_COMPLETE" in done.stdout


def test_zsh_takes_words_whole(run: Commands) -> None:
    """`strategy=f` is one word there."""
    done = run(
        *("launcher",),
        env={
            "_LAUNCHER_COMPLETE": "zsh_complete",
            "COMP_WORDS": "launcher run digits strategy=f",
            "COMP_CWORD": "3",
        },
    )
    assert "strategy=fsdp" in done.stdout
