"""What a run observes about its data while it trains: where a stream stands, and bad samples."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from launcher.engine.backends.base import Backend
from launcher.engine.data.bad_samples import BadSample
from launcher.engine.data.fingerprint import first_difference
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.streams import SAME_EVERYWHERE, StreamState
from launcher.errors import TrainingError
from launcher.json_file import decode_line, lines_of
from launcher.recipe.evaluation_sets import title_of
from launcher.recipe.recipe import Recipe
from launcher.regular_file import open_regular, open_to_append
from launcher.runs.files import unwritable_error
from launcher.runs.rundir import RunDir

_MAX_COMPARED = 16
"""Number of samples that are compared between ranks at once, the latest ones."""


class DataWatch:
    """Compares what ranks read from a stream, keeps its place, and counts bad samples.

    Args:
        backend: This rank among the others.
        is_stream: Whether the training data is a stream.
        state: Where the stream stood when the run was resumed; None in a new run.
        bad_samples: Counts the samples that are left out; None if none are.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        is_stream: bool = False,
        state: StreamState | None = None,
        bad_samples: BadSamples | None = None,
    ) -> None:
        self._backend, self._is_stream = backend, is_stream
        self._state = state
        self._marks: dict[tuple[int, int], Any] = {}
        self.bad_samples = bad_samples

    @property
    def state(self) -> StreamState | None:
        """Where the stream stands after the steps so far, on this rank."""
        return self._state

    def add(self, step: int, micro_batches: Iterable[MicroBatch]) -> None:
        """Receive the micro-batches that this rank took.

        Args:
            step: The step that took them, counted from 1, or before an evaluation.
            micro_batches: The micro-batches.
        """
        for micro_batch in micro_batches:
            if self.bad_samples is not None:
                self.bad_samples.add(step, micro_batch.bad)
            note = micro_batch.stream
            if note is None:
                continue
            self._marks |= {(each.epoch, each.position): each.description for each in note.marks}
            keeps_state = self._state is not None and self._state.state is not None
            if note.state.state is not None or not keeps_state:
                self._state = note.state

    def exchange(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Compare and count over ranks what has been read (collective).

        Args:
            step: Number of steps taken.

        Returns:
            Values for metrics.jsonl, and warnings for the user, equal on every rank.

        Raises:
            TrainingError: Ranks read different streams, or too many samples are bad.
        """
        if self._is_stream:
            self._compare(step)
        return ({}, []) if self.bad_samples is None else self.bad_samples.exchange()

    def _compare(self, step: int) -> None:
        if self._backend.world_size == 1:
            self._marks.clear()
            return
        latest = dict(sorted(self._marks.items())[-_MAX_COMPARED:])
        by_rank: list[dict[tuple[int, int], Any]] = self._backend.gather(latest)
        for rank, marks in enumerate(by_rank[1:], start=1):
            for (epoch, position), description in marks.items():
                expected = by_rank[0].get((epoch, position), description)
                difference = first_difference(expected, description)
                if difference is not None:
                    place, on_rank_0, on_rank = difference
                    where = f", at {place}," if place else ""
                    raise TrainingError(
                        f"Ranks read different streams: sample {position:,} of epoch {epoch + 1}"
                        f"{where} is {on_rank} on rank {rank}, but {on_rank_0} on rank 0, as was "
                        f"found after step {step:,}. {SAME_EVERYWHERE}"
                    )
        if all(by_rank):
            reached = min(max(marks) for marks in by_rank)
            self._marks = {key: value for key, value in self._marks.items() if key > reached}


class _Line(NamedTuple):
    """A bad sample, and the number of the step that left it out, counted from 1."""

    step: int
    bad: BadSample


class _StoredLine(msgspec.Struct, frozen=True):
    """A line of bad_samples.jsonl."""

    split: str
    sample: int


class BadSamples:
    """Counts and lists the samples that are left out of their batches, over all ranks.

    Args:
        backend: This rank among the others.
        recipe: Its `max_bad_samples` is the limit.
        planned_samples: Samples that all steps of the run take.
    """

    def __init__(self, backend: Backend, recipe: Recipe, planned_samples: int) -> None:
        self._backend = backend
        self._setting = recipe.max_bad_samples
        self._limit = (
            self._setting
            if isinstance(self._setting, int)
            else math.ceil(self._setting * planned_samples)
        )
        self._own: list[_Line] = []
        self._run_dir: RunDir | None = None
        self._evaluated: set[tuple[str, int]] = set()
        """The bad samples of evaluation sets, which are listed once."""

        self.num_train = 0
        """Training samples left out since the start of the run, over all ranks."""

    def open(self, run_dir: RunDir) -> None:
        """Continue the list of a run folder, which holds what was left out before (collective)."""
        self._run_dir = run_dir
        lines: list[_StoredLine] = []
        if self._backend.rank == 0 and run_dir.bad_samples.exists():
            decoder = msgspec.json.Decoder(_StoredLine)
            try:
                with io.BufferedReader(open_regular(run_dir.bad_samples)) as file:
                    decoded = (decode_line(line, decoder) for line in lines_of(file))
                    lines = [line for line in decoded if line is not None]
            except OSError as error:
                raise unwritable_error(run_dir.bad_samples, error) from None
        stored = self._backend.broadcast([(line.split, line.sample) for line in lines])
        self.num_train = sum(split == "train" for split, _ in stored)
        self._evaluated = {(split, sample) for split, sample in stored if split != "train"}

    def add(self, step: int, bad: Iterable[BadSample]) -> None:
        """Receive the samples that were left out of a micro-batch of this rank."""
        if self._backend.leads_group:
            self._own += [_Line(step, each) for each in bad]

    def exchange(self) -> tuple[dict[str, float], list[str]]:
        """List the samples since the last call (collective); see `DataWatch.exchange`."""
        own, self._own = self._own, []
        if not self._backend.any_rank(bool(own)):
            return {}, []
        by_rank: list[list[_Line]] = self._backend.gather(own)
        lines = sorted(line for lines in by_rank for line in lines)
        listed = []
        for line in lines:
            key = (line.bad.split, line.bad.sample)
            if line.bad.split != "train":
                if key in self._evaluated:
                    continue
                self._evaluated.add(key)
            listed.append(line)
        self.num_train += sum(line.bad.split == "train" for line in listed)
        self._write(listed)
        if not listed:
            return {}, []
        last = listed[-1].bad
        file = "" if last.file is None else f", in {last.file}"
        text = f"{title_of(last.split)} sample {last.sample:,}{file}: {last.reason}"
        if self.num_train > self._limit:
            raise TrainingError(
                f"{self.num_train:,} training samples could not be read and were left out, more "
                f"than max_bad_samples={self._setting} allows, which is {self._limit:,} of this "
                f"run. The last one is {text}. bad_samples.jsonl in the run folder lists them. "
                "Repair the data, or raise max_bad_samples."
            )
        total = self.num_train + len(self._evaluated)
        warning = (
            f"{len(listed):,} more samples could not be read and were left out, {total:,} so far; "
            f"bad_samples.jsonl lists them. The last one is {text}"
        )
        return {"bad_samples": float(total)}, [warning]

    def _write(self, lines: list[_Line]) -> None:
        """Append lines to the list, on rank 0.

        Raises:
            RunDirError: The file cannot be written.
        """
        if self._run_dir is None or self._backend.rank != 0 or not lines:
            return
        path = self._run_dir.bad_samples
        try:
            with open_to_append(path) as file:
                for line in lines:
                    values = {"step": line.step, **line.bad._asdict()}
                    file.write(msgspec.json.encode(values) + b"\n")
        except OSError as error:
            raise unwritable_error(path, error) from None
