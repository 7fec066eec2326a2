"""What tuning found: told while it goes on, then as lines of YAML and as a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from launcher.analysis.batch_sizes import SizeTrial
from launcher.analysis.lr_curve import FoundLR, LRTrial
from launcher.planning.derivations import counted
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.report.page import Page, Section, Table
from launcher.tuning.summaries import (
    batch_plot,
    loader_plot,
    lr_plot,
    lr_rules,
    lr_trial_text,
    noise_account,
    noise_plot,
    reading_text,
    trial_text,
)

if TYPE_CHECKING:
    from launcher.tuning.batch_search import FoundBatch
    from launcher.tuning.loader_search import FoundLoader, LoaderTrial
    from launcher.tuning.noise_search import FoundNoise
    from launcher.tuning.probe_run import Probe, Target
    from launcher.tuning.tuning_result import TunedSetting


class TuningReporter:
    """A listener that tells what goes on, and keeps it as the sections of a page.

    Args:
        echo: Is given each line.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self.sections: list[Section] = []

    def begins(self, what: str) -> None:
        self._echo(f"{what}:")

    def says(self, text: str) -> None:
        self._echo(f"  {text}")

    def tried_lr(self, trial: LRTrial) -> None:
        self._echo(lr_trial_text(trial))

    def tried(self, trial: SizeTrial) -> None:
        self._echo(trial_text(trial))

    def read(self, reading: LoaderTrial) -> None:
        self._echo(reading_text(reading))

    def found_lr(self, found: FoundLR, test: Probe) -> None:
        batch = f"{test.plan.batch_size:,}"
        title = f"Learning rate, at a batch of {batch}"
        self._add(title, lr_rules(found, test.plan), lr_plot(found, test.plan))

    def found_noise(self, found: FoundNoise, probe: Probe) -> None:
        self._add("Gradient noise scale", noise_account(found, probe), noise_plot(found, probe))

    def found_batch(self, found: FoundBatch, plan: Plan) -> None:
        lines = "\n".join(map(trial_text, found.trials))
        self._add("Batch and micro-batch", lines, batch_plot(found, plan))

    def found_loader(self, found: FoundLoader, plan: Plan) -> None:
        lines = "\n".join(map(reading_text, found.readings))
        self._add("DataLoader workers", lines, loader_plot(found, plan))

    def _add(self, title: str, text: str, plot: Any) -> None:
        self.sections.append(Section(title=title, text=text, figures=[plot]))


def setting_lines(target: Target, findings: Sequence[TunedSetting]) -> list[tuple[str, Any, str]]:
    """Return (name, value, why) of each setting: those that were given, then those found."""
    lines = [(name, value, "as given") for name, value in target.given().items()]
    return lines + [(each.name, each.value, each.evidence) for each in findings]


def yaml_text(target: Target, plan: Plan, findings: Sequence[TunedSetting]) -> str:
    """Return what `--config` takes, with why behind each line."""
    import yaml

    lines = []
    for name, value, why in setting_lines(target, findings):
        plain = list(value) if isinstance(value, tuple) else value
        dumped = yaml.safe_dump({name: plain}, default_flow_style=True, width=10_000)
        lines.append((dumped.strip()[1:-1], why))  # on one line, without the braces
    width = max((len(dumped) for dumped, _ in lines), default=0)
    said = [f"{dumped:<{width}}  # {why}" for dumped, why in lines]
    return "\n".join([f"# launcher tune {target.reference.shown}: {_facts(plan)}", *said]) + "\n"


def page(
    target: Target,
    plan: Plan,
    findings: Sequence[TunedSetting],
    sections: Sequence[Section],
    command: str,
) -> Page:
    """Return the page of a recipe that was tuned."""
    lines = setting_lines(target, findings)
    settings = Table(
        head=("setting", "value", "because"),
        rows=[(name, str(value), why) for name, value, why in lines],
    )
    return Page(
        title=f"{plan.recipe}, tuned",
        facts=f"{target.reference.shown}, {_facts(plan)}",
        sections=[Section(title="Settings", table=settings, text=command), *sections],
    )


def _facts(plan: Plan) -> str:
    unit = "GPU" if plan.device == "cuda" else "CPU rank"
    ranks = counted(plan.world_size, unit)
    return f"{ranks}, {STRATEGIES[plan.strategy].title}, {plan.precision}, {date.today()}"
