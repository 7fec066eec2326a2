"""Write the pages that follow from the code: settings, commands and the list of public names.

python docs/generate.py            write docs/settings.md, docs/cli.md and docs/api.md
python docs/generate.py --check    exit with 1 and name the pages that are out of date
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path

import click

import launcher
from launcher import Recipe
from launcher.cli import group
from launcher.recipe.catalogue import EFFECTS, settings
from launcher.recipe.field_docs import sentences_of

DOCS = Path(__file__).resolve().parent
MARK = "<!-- Written by docs/generate.py: change the source and run that again. -->\n"

SETTINGS_HEAD = """\
# Settings

These are the fields of [`Recipe`](api.md#launcher.Recipe). Every setting can be given in three
places: in the recipe, in a YAML file that `--config` names, and as `name=value` on the command
line. The command line is stronger than the file, and the file is stronger than the recipe.

```sh
launcher plan digits lr=0.2 precision=bf16 "schedule=warmup(cosine(), fraction=0.1)"
```

`none` stands for no value. `launcher settings` prints the same list, and `launcher settings NAME`
one of them. Keyword parameters of a recipe function are given in the same way: see
[Recipes](recipes.md#parameters).

Each setting affects one part of a run:

"""

CLI_HEAD = """\
# Commands

`launcher COMMAND --help` prints the same in a terminal. Every command that takes a recipe accepts a
name (`digits`), a file (`mine.py`) or a function in a file (`mine.py:variant`), and any
[setting](settings.md) as `name=value`. With a recipe beside it, `--help` also lists the recipe's
own parameters: `launcher run gpt --help`.
"""

API_HEAD = """\
# API reference

Everything here is imported from `launcher`. Importing the package imports nothing else: each name
is fetched when it is first used. [Start from Python](python-api.md) explains how the parts fit.
"""

NAMES = {
    "Run, plan, resume": "plan run resume RunResult RunDir History Plan",
    "Sweeps": "sweep SweepResult TrialResult objective",
    "Evaluate and predict": "evaluate EvaluationResult predict Predictions",
    "Recipes": (
        "Recipe Objective Data Evaluation all_predictions log CallbackContext main packaged_file"
    ),
    "Schedules": (
        "one_cycle cyclical cosine linear constant exponential multi_step wsd warmup "
        "torch_schedule plateau schedule Schedule ScheduleValue"
    ),
    "Optimizers": "sgd adamw muon schedule_free OptimizerSpec",
    "Stored data": (
        "ParquetRows TokenFiles Shards MosaicShards LitShards ImageFolder LMDBSamples SQLiteRows "
        "RemoteCache Stream"
    ),
    "Orders of data": "Mixture Source weighted Packed attention_mask cumulative_lengths",
    "Averaged weights": "ema tail Averaging",
    "Parts to use elsewhere": "make_plan read_machine Machine loader_policy LoaderPolicy",
    "Errors": " ".join([*(name for name in launcher.__all__ if name.endswith("Error")), "Failure"]),
}
"""Public names by topic; one that is not named here comes under "Other"."""


def grouped(topics: dict[str, str], known: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each topic with those of its names that exist, and at last the names of no topic."""
    named = {name for names in topics.values() for name in names.split()}
    rest = " ".join(name for name in known if name not in named)
    for topic, names in (*topics.items(), ("Other", rest)):
        if found := [name for name in names.split() if name in known]:
            yield topic, found


def settings_page() -> str:
    """Return the page of settings: a table for each topic, and what a recipe adds in Python."""
    text, topic = SETTINGS_HEAD, ""
    text += "| Affects | Meaning |\n|---|---|\n"
    text += "".join(f"| {word} | {sentence} |\n" for word, sentence in EFFECTS.values())
    for setting in settings().values():
        if setting.topic != topic:
            topic = setting.topic
            text += f"\n## {topic}\n\n| Setting | Type | Default | Affects | Meaning |\n"
            text += "|---|---|---|---|---|\n"
        default = "required" if setting.default is None else f"`{setting.default}`"
        affects = EFFECTS[setting.affects][0]
        cells = f"`{setting.name}`", setting.type_words, default, affects, setting.sentence
        text += f"| {' | '.join(one_line(cell) for cell in cells)} |\n"
    text += "\n## Fields that only Python can set\n\n| Field | Meaning |\n|---|---|\n"
    functions = {
        name: sentence for name, sentence in sentences_of(Recipe).items() if name not in settings()
    }
    return text + "".join(f"| `{name}` | {one_line(text)} |\n" for name, text in functions.items())


def one_line(text: str) -> str:
    """Return text as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def cli_page() -> str:
    """Return the page of commands: usage, description and options of each."""
    text = CLI_HEAD
    for path, command in commands(group, "launcher"):
        context = click.Context(command, info_name=path, terminal_width=100)
        usage = command.get_usage(context).removeprefix("Usage: ")
        text += f"\n## {path}\n\n```text\n{usage}\n```\n\n{prose(command.help or '')}\n"
        options = [
            each for each in command.params if isinstance(each, click.Option) and not each.hidden
        ]
        if options:
            text += "\n| Option | Meaning |\n|---|---|\n"
            for option in options:
                name, meaning = option.get_help_record(context) or ("", "")
                text += f"| `{one_line(name)}` | {one_line(meaning)} |\n"
    return text


def commands(parent: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield every command below a group with the words that call it."""
    context = click.Context(parent)
    for name in parent.list_commands(context):
        command = parent.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def prose(text: str) -> str:
    """Return the help of a command as Markdown: paragraphs, and examples as text."""
    written = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        mark, _, lines = paragraph.partition("\n")
        is_example = mark.strip(" ") == "\b"  # click's mark of lines to leave as they are
        written.append(f"```text\n{lines}\n```" if is_example else " ".join(paragraph.split()))
    return "\n\n".join(written)


def api_page() -> str:
    """Return the page of public names, which mkdocstrings fills in from their docstrings."""
    text = API_HEAD
    for topic, names in grouped(NAMES, list(launcher.__all__)):
        text += f"\n## {topic}\n"
        text += "".join(f"\n::: launcher.{name}\n{options_for(name)}" for name in names)
    return text


def options_for(name: str) -> str:
    """Return options of mkdocstrings: a dataclass has a line for each field, and no signature."""
    if not is_dataclass(getattr(launcher, name)):
        return ""
    options = "separate_signature: false", "show_labels: false", "show_signature: false"
    return "    options:\n" + "".join(f"      {option}\n" for option in options)


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "cli.md": cli_page,
    "api.md": api_page,
}


def main() -> int:
    """Write the pages, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the pages that follow from the code.")
    parser.add_argument("--check", action="store_true", help="Write nothing; fail on stale pages.")
    only_check = parser.parse_args().check
    texts = {DOCS / name: MARK + make() for name, make in PAGES.items()}
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if only_check:
        for path in stale:
            print(f"{path} is out of date: run `python docs/generate.py`.", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
