"""Findings as lines of a table, each warning and failure with its remedy."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from launcher.findings import LEVELS, Finding

_WIDTH = 100
_CHECK_WIDTH = 12


def finding_lines(finding: Finding) -> Iterator[str]:
    """Yield the lines of one finding, at most 100 characters wide: level, check, found, remedy."""
    indent = " " * (2 + 9 + _CHECK_WIDTH + 2)
    head = f"  {finding.level:<9}{finding.check:<{_CHECK_WIDTH}}  "
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
    """Return the number of findings at each level: `6 ok, 1 warning, 0 failures`."""
    levels = [finding.level for finding in findings]
    counts = {level: levels.count(level) for level in LEVELS}
    parts = [f"{counts['ok']} ok"]
    for level in LEVELS[1:]:
        parts.append(f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}")
    return ", ".join(parts)
