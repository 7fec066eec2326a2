"""Findings as a table, each that is not ok with what to do about it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from launcher.findings import LEVELS, Finding

_WIDTH = 100
_CHECK = 12


def finding_lines(finding: Finding) -> Iterator[str]:
    """Yield the lines of one finding."""
    indent = " " * (2 + 9 + _CHECK + 2)
    head = f"  {finding.level:<9}{finding.check:<{_CHECK}}  "
    yield from textwrap.wrap(
        finding.found, _WIDTH, initial_indent=head, subsequent_indent=indent
    ) or [head.rstrip()]
    if finding.remedy:
        yield from textwrap.wrap(
            f"-> {finding.remedy}",
            _WIDTH,
            initial_indent=indent,
            subsequent_indent=indent + "   ",
            break_on_hyphens=False,
        )


def summary(findings: Iterable[Finding]) -> str:
    """Return how many there are of each level, in one line."""
    levels = [finding.level for finding in findings]
    counts = {level: levels.count(level) for level in LEVELS}
    words = [f"{counts['ok']} ok"]
    for level in LEVELS[1:]:
        words.append(f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}")
    return ", ".join(words)
