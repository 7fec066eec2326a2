"""The text of `launcher settings`: what each setting means, its type, its default, its effect."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from launcher.recipe.catalogue import CALLS, EFFECTS, Setting, call_signatures, settings

_WIDTH = 96

_HEAD = (
    "Settings are written NAME=VALUE on the command line, NAME: VALUE in a file for --config, and "
    "NAME=VALUE in Recipe(...) in Python. Keyword parameters of a recipe's function are given in "
    "the same way; `launcher run RECIPE --help` lists them."
)


def settings_text() -> str:
    """Return all settings by topic, in lines of at most 96 characters."""
    lines = textwrap.wrap(_HEAD, _WIDTH)
    topic = ""
    for setting in settings().values():
        if setting.topic != topic:
            topic = setting.topic
            lines += ["", topic]
        lines += _entry(setting)
    lines += ["", "Affects"]
    for word, sentence in EFFECTS.values():
        lines += _wrapped(sentence, 14, f"  {word:<12}")
    return "\n".join([*lines, "", "`launcher settings NAME` shows one of them."])


def setting_text(setting: Setting) -> str:
    """Return what there is to know about one setting."""
    word, effect = EFFECTS[setting.affects]
    default = "none: every recipe gives one" if setting.default is None else setting.default
    lines = [setting.name, *_wrapped(setting.sentence, 2, "  ")]
    for label, text in (
        ("type", setting.type_words),
        ("default", default),
        ("affects", f"{word}. {effect}"),
    ):
        lines += _wrapped(text, 12, f"  {label:<10}")
    if setting.name in CALLS:
        lines += _calls(setting.name)
    return "\n".join(lines)


def _entry(setting: Setting) -> list[str]:
    default = "required" if setting.default is None else f"default {setting.default}"
    facts = f"{setting.type_words}; {default}; affects {EFFECTS[setting.affects][0]}"
    return [*_wrapped(facts, 6, f"  {setting.name}  "), *_wrapped(setting.sentence, 6, " " * 6)]


def _calls(name: str) -> Iterator[str]:
    yield "  calls"
    for call, sentence in call_signatures(name).items():
        yield from _wrapped(call, 8, "    ")
        yield from _wrapped(sentence, 6, " " * 6)


def _wrapped(text: str, indent: int, first: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
