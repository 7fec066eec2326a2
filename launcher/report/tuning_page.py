"""The output of `launcher tune`: lines while it runs, the lines of tuned.yaml, and an HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from launcher.analysis.batch_sizes import SizeTrial
from launcher.analysis.lr_trials import LRSearchResult, LRTrial
from launcher.console.plots import Plot
from launcher.planning.derivations import counted
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.report.page import Page, Section, Table
from launcher.tuning.summaries import (
    batch_plot,
    loader_plot,
    loader_trial_text,
    lr_plot,
    lr_suggestions_text,
    lr_trial_text,
    noise_plot,
    noise_summary,
    size_trial_text,
)

if TYPE_CHECKING:
    from launcher.tuning.batch_search import BatchSearchResult
    from launcher.tuning.loader_search import LoaderSearchResult, LoaderTrial
    from launcher.tuning.noise_search import NoiseSearchResult
    from launcher.tuning.probe_run import Probe, Target
    from launcher.tuning.tuning_result import TunedSetting


class TuningReporter:
    """A listener of a tuning that prints its progress and collects sections for the page.

    Args:
        echo: Called with each line to print.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self.sections: list[Section] = []
        """One section for each finder that has finished."""

    def on_search(self, what: str) -> None:
        self._echo(f"{what}:")

    def on_message(self, text: str) -> None:
        self._echo(f"  {text}")

    def on_lr_trial(self, trial: LRTrial) -> None:
        self._echo(lr_trial_text(trial))

    def on_size_trial(self, trial: SizeTrial) -> None:
        self._echo(size_trial_text(trial))

    def on_loader_trial(self, reading: LoaderTrial) -> None:
        self._echo(loader_trial_text(reading))

    def on_lr_result(self, found: LRSearchResult, test: Probe) -> None:
        batch = f"{test.plan.batch_size:,}"
        title = f"Learning rate, at a batch of {batch}"
        self._add(title, lr_suggestions_text(found, test.plan), lr_plot(found, test.plan))

    def on_noise_result(self, found: NoiseSearchResult, probe: Probe) -> None:
        self._add("Gradient noise scale", noise_summary(found, probe), noise_plot(found, probe))

    def on_batch_result(self, found: BatchSearchResult, plan: Plan) -> None:
        trials = "\n".join(map(size_trial_text, found.trials))
        self._add("Batch and micro-batch", trials, batch_plot(found, plan))

    def on_loader_result(self, found: LoaderSearchResult, plan: Plan) -> None:
        readings = "\n".join(map(loader_trial_text, found.readings))
        self._add("DataLoader workers", readings, loader_plot(found, plan))

    def _add(self, title: str, text: str, plot: Plot) -> None:
        self.sections.append(Section(title=title, text=text, figures=[plot]))


def setting_lines(target: Target, findings: Sequence[TunedSetting]) -> list[tuple[str, Any, str]]:
    """Return (name, value, evidence) of each setting, those given by the user first."""
    lines = [(name, value, "given by the user") for name, value in target.override_values().items()]
    return lines + [(setting.name, setting.value, setting.evidence) for setting in findings]


def yaml_text(target: Target, plan: Plan, findings: Sequence[TunedSetting]) -> str:
    """Return the settings as YAML for `--config`, each with its evidence in a comment.

    Args:
        target: What was tuned.
        plan: The plan with the tuned settings, which the first line describes.
        findings: The tuned settings.
    """
    import yaml

    entries = []
    for name, value, evidence in setting_lines(target, findings):
        plain = list(value) if isinstance(value, tuple) else value
        flow = yaml.safe_dump({name: plain}, default_flow_style=True, width=10_000)
        entries.append((flow.strip()[1:-1], evidence))  # one line, without the braces
    width = max((len(entry) for entry, _ in entries), default=0)
    lines = [f"{entry:<{width}}  # {evidence}" for entry, evidence in entries]
    header = f"# launcher tune {target.reference.shown}: {_summary(plan)}"
    return "\n".join([header, *lines]) + "\n"


def tuning_page(
    target: Target,
    plan: Plan,
    findings: Sequence[TunedSetting],
    sections: Sequence[Section],
    command: str,
) -> Page:
    """Return the page of a tuned recipe.

    Args:
        target: What was tuned.
        plan: The plan with the tuned settings.
        findings: The tuned settings.
        sections: Sections of the finders, as `TuningReporter` collects them.
        command: Text to show below the settings: how to train with them.
    """
    settings = Table(
        head=("setting", "value", "evidence"),
        rows=[
            (name, str(value), evidence)
            for name, value, evidence in setting_lines(target, findings)
        ],
    )
    return Page(
        title=f"{plan.recipe}: tuned settings",
        facts=f"{target.reference.shown}, {_summary(plan)}",
        sections=[Section(title="Settings", table=settings, text=command), *sections],
    )


def _summary(plan: Plan) -> str:
    """Return devices, strategy, precision and today's date."""
    unit = "GPU" if plan.device == "cuda" else "CPU rank"
    ranks = counted(plan.world_size, unit)
    return f"{ranks}, {STRATEGIES[plan.strategy].title}, {plan.precision}, {date.today()}"
