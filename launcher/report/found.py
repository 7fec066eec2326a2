"""What finders found, in words and curves."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from launcher.finders.lr import usable
from launcher.plan import Plan
from launcher.report.plots import Curve, Mark, Plot, draw

if TYPE_CHECKING:
    from launcher.find import FoundLR

RULES = {
    "valley": "two thirds along the longest descent",
    "steep": "where the loss falls fastest",
    "minimum": "a tenth of where it is lowest",
    "slide": "before its slope changes, from the right",
}

_SYMBOLS = {"valley": "v", "steep": "s", "minimum": "m", "slide": "l"}


def lr_plot(found: FoundLR, plan: Plan) -> Plot:
    """Return the curve of a range test with what the rules suggest."""
    lrs, losses = usable(found.curve)
    marks = [
        Mark(
            name=name,
            symbol=_SYMBOLS[name],
            x=lr,
            y=losses[min(bisect.bisect_left(lrs, lr), len(losses) - 1)],
        )
        for name, lr in asdict(found.suggestions).items()
        if name in RULES and lr is not None
    ]
    return Plot(
        title=f"{plan.recipe}: loss of {plan.batch_size:,} samples over the learning rate",
        x_label="lr",
        y_label="loss",
        curves=[Curve(name="loss, smoothed", xs=lrs, ys=losses)],
        marks=marks,
        log_x=True,
    )


def lr_text(found: FoundLR, rule: str, settings: Mapping[str, float], plan: Plan) -> str:
    """Return curve, suggestions, and the lines to paste."""
    curve, suggestions = found.curve, found.suggestions
    if suggestions.reason:
        return f"No learning rate is suggested: {suggestions.reason}."
    lines = [draw(lr_plot(found, plan)), "", f"at a batch of {plan.batch_size:,}:"]
    for name, what in RULES.items():
        lr = getattr(suggestions, name)
        lines.append(f"  {name:<8} {'-' if lr is None else f'{lr:.3g}':<9} {what}")
    if not settings:
        return "\n".join([*lines, "", f"The rule {rule} suggests nothing here: take another."])
    evidence = f"# launcher find lr, {rule}: {len(curve.lrs)} steps of {plan.batch_size:,} samples"
    lines += ["", "for --config, or as name=value:"]
    for name, value in settings.items():
        lines.append(f"{name}: {value:.3g}  {evidence}")
        evidence = ""
    return "\n".join(line.rstrip() for line in lines)
