"""The results of a tuning as values, and the listener that follows it while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from launcher.analysis.batch_sizes import SizeTrial
from launcher.analysis.lr_trials import LRSearchResult, LRTrial
from launcher.planning.plan import Plan
from launcher.tuning.batch_search import BatchSearchResult
from launcher.tuning.loader_search import LoaderSearchResult, LoaderTrial
from launcher.tuning.noise_search import NoiseSearchResult
from launcher.tuning.probe_run import Probe


@dataclass(frozen=True, kw_only=True)
class TunedSetting:
    """A recommended setting of a recipe."""

    name: str
    """Name of the setting."""

    value: Any
    """The recommended value."""

    evidence: str
    """The measurement behind it, in one line."""


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """The recommended settings of a recipe, and the measurements behind them."""

    settings: tuple[TunedSetting, ...]
    """The recommended settings, in the order in which they were found."""

    lr_search: LRSearchResult | None
    """The search for a learning rate at the recommended global batch; None if it was given."""

    noise: NoiseSearchResult | None
    """The measurement of the gradient noise; None if it cannot be measured on these ranks."""

    critical_batch: float | None
    """B_crit in samples, from the noise; None if it is undetermined."""

    batch: BatchSearchResult | None
    """The search for the batch and micro-batch; None if the micro-batch size was given."""

    loader: LoaderSearchResult | None
    """The search for DataLoader workers; None if their number was given."""

    @property
    def values(self) -> dict[str, Any]:
        """The recommended values by name, such as `Target.with_settings` takes."""
        return {setting.name: setting.value for setting in self.settings}


class TuningListener(Protocol):
    """An object that is called with everything that a tuning does and finds."""

    def on_search(self, what: str) -> None:
        """Called when a search starts, with what it searches for."""

    def on_message(self, text: str) -> None:
        """Called with a sentence about the present search."""

    def on_lr_trial(self, trial: LRTrial) -> None:
        """Called after the short trainings at each learning rate."""

    def on_size_trial(self, trial: SizeTrial) -> None:
        """Called after each trial of a micro-batch size."""

    def on_loader_trial(self, reading: LoaderTrial) -> None:
        """Called after each measurement with a number of workers."""

    def on_lr_result(self, result: LRSearchResult, test: Probe) -> None:
        """Called with the result of a search for a learning rate and its range test.

        If the global batch has changed since the range test, its learning rates are scaled to it,
        and `test` is a range test at that batch.
        """

    def on_noise_result(self, result: NoiseSearchResult, probe: Probe) -> None:
        """Called with the measured gradient noise and the training in which it was measured."""

    def on_batch_result(self, result: BatchSearchResult, plan: Plan) -> None:
        """Called with the result of a search for a batch and the plan that it used."""

    def on_loader_result(self, result: LoaderSearchResult, plan: Plan) -> None:
        """Called with the result of a search for DataLoader workers and the plan that it used."""
