"""Training data that can only be read from its start: streams.

Samples are numbered in the order in which one process sees them. Every rank reads the whole stream
in one process and keeps the samples of its own share of each global batch, so a step has the same
samples on any number of ranks. `Stream.transform` is applied to the samples that are kept alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from launcher.engine.data.fingerprint import describe, first_difference
from launcher.engine.data.order import Order, OrderRequest, SequentialOrder
from launcher.engine.data.randomness import Generators, seed_all
from launcher.engine.data.seeds import derive
from launcher.errors import LauncherError, RecipeError, SampleError
from launcher.json_file import encode_json
from launcher.printable import class_name, kind_of, text_of, traceback_of

ENDLESS = 1 << 62
"""The number of samples in an epoch of a stream without `train_samples`, which no run reaches."""

MAX_HELD_OUT = 1 << 20
"""Number of samples up to which a stream is read into memory as an evaluation set."""

_MARK_EVERY = 1024
"""Samples between two that are described, to compare them between ranks and after a resume."""

_MAX_STATE = 1 << 20
"""Longest state of a stream as JSON; the manifest of a checkpoint holds it."""

SAME_EVERYWHERE = (
    "A stream must yield the same samples in the same order in every process that reads it: seed "
    "its shuffling, and do not divide it among ranks or workers, because launcher does that."
)


class _EndError(SampleError):
    """A stream ended before a sample that was asked for."""


class Stream:
    """Training samples from a function that returns an iterable.

    Args:
        make_iterable: A function without arguments that returns an iterable over the samples from
            the first one on: a generator function, or one that opens a connection. It is called in
            each process that reads. If the iterable, or its iterator, has the methods `state_dict`
            and `load_state_dict`, a resumed run continues from the state; otherwise it reads the
            stream again up to its place. A method `set_epoch` receives the number of the epoch.
        transform: A function from what the iterable yields to a sample. A rank calls it for its own
            samples alone, so what is costly, such as decoding, belongs here.

    Raises:
        RecipeError: One of them is no function.
    """

    def __init__(
        self,
        make_iterable: Callable[[], Iterable[Any]],
        *,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not callable(make_iterable):
            raise RecipeError(
                "Stream(...): expected a function that returns an iterable over the samples, found "
                f"{kind_of(make_iterable)}. Pass the function itself, without calling it: each "
                "rank, and each epoch, reads an iterable of its own."
            )
        if not (transform is None or callable(transform)):
            raise RecipeError(
                "Stream(transform=...): expected a function from what the iterable yields to a "
                f"sample, found {kind_of(transform)}."
            )
        self.make_iterable, self.transform = make_iterable, transform

    def make_order(self, request: OrderRequest) -> Order:
        """Return the order of the samples, which is that of the stream.

        Raises:
            RecipeError: The recipe asks for another order.
        """
        if request.shuffle != "global":
            raise RecipeError(
                f"shuffle={request.shuffle}: the training data is a stream, which is read in its "
                "own order. Remove this setting, and shuffle inside the stream with a seed."
            )
        return SequentialOrder()


class StreamMark(NamedTuple):
    """The description of a sample that a stream has yielded."""

    epoch: int
    position: int
    description: Any


class StreamState(NamedTuple):
    """Where a stream stands, as a checkpoint holds it."""

    epoch: int
    position: int
    """Number of samples that have been read in this epoch."""

    state: str | None
    """The result of the stream's `state_dict` as JSON; None if it has none."""

    mark: StreamMark | None
    """The last sample that was described."""

    def to_json(self) -> dict[str, Any]:
        """Return the state as values of JSON."""
        mark = None if self.mark is None else list(self.mark)
        return {
            "epoch": self.epoch,
            "position": self.position,
            "state": self.state,
            "mark": mark,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StreamState:
        """Return the state that `to_json` gave, or raise KeyError, TypeError or ValueError."""
        mark = None if values["mark"] is None else StreamMark(*values["mark"])
        return cls(int(values["epoch"]), int(values["position"]), values["state"], mark)


class StreamNote(NamedTuple):
    """What a reader tells about its stream beside a micro-batch."""

    marks: tuple[StreamMark, ...]
    """Descriptions of samples that were read since the last micro-batch."""

    state: StreamState


def as_stream(data: Any) -> Stream | None:
    """Return training data as a stream; None if it is not one.

    Raises:
        RecipeError: The data is an iterator, which can be read once.
    """
    if isinstance(data, Stream):
        return data
    if isinstance(data, Iterator):
        raise RecipeError(
            f"Data(...): {kind_of(data)} can be read once and by one process. Return the function "
            "that makes it, as launcher.Stream(make_iterable): each rank, and each epoch, reads an "
            "iterable of its own."
        )
    if inspect.isgeneratorfunction(data):
        return Stream(data)
    is_iterable = hasattr(type(data), "__iter__") and not isinstance(data, type)
    has_order = hasattr(data, "__getitem__") or hasattr(data, "__len__")
    if isinstance(data, IterableDataset) or (is_iterable and not has_order):
        return Stream(_Constant(data))
    return None


class _Constant:
    """A function that returns the same iterable in every call; it can be pickled."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self) -> Any:
        return self._value


class StreamReader:
    """Reads a stream in one process, forwards, and keeps the samples that are asked for.

    Before each sample the global generators of `random`, `numpy.random` and torch are seeded by
    (seed, epoch, position), so what a stream draws does not depend on where it was resumed.

    Args:
        stream: The stream.
        seed: The run's seed.
        title: The name of the data in messages.
    """

    def __init__(self, stream: Stream, seed: int, title: str = "training") -> None:
        self._stream, self._seed, self._title = stream, seed, title
        self._iterable: Any = None
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._next = 0, 0
        self._kept: dict[int, Any] = {}
        self._last: list[Any] = []
        self._filled = 0
        self._marks: list[StreamMark] = []
        self._last_mark: StreamMark | None = None
        self._resume_from: StreamState | None = None

    def restore(self, saved: StreamState) -> None:
        """Read on from where a checkpoint was saved, once this process starts to read.

        A stream without a state is read again up to there.
        """
        self._resume_from = saved

    def take(
        self,
        epoch: int,
        positions: list[int],
        *,
        is_trial: bool,
        has_weight: bool,
        on_bad: Callable[[int, SampleError], None] | None = None,
    ) -> list[Any]:
        """Return the samples at some positions of an epoch, which follow those of the last call.

        Args:
            epoch: The epoch.
            positions: Rising positions in the epoch.
            is_trial: Whether the samples will be asked for again.
            has_weight: Whether the samples count. If they do not, samples that were read before
                stand in for them.
            on_bad: Receives each position whose transform raised an exception, and the error; the
                sample is then left out, unless this raises.

        Raises:
            SampleError: The stream ends before them, or raised an exception.
        """
        if has_weight or is_trial:
            if self._iterator is None or epoch != self._epoch:
                self._open(epoch)
            if not is_trial:
                self._kept = {at: raw for at, raw in self._kept.items() if at >= positions[0]}
            raw_samples = [self._read(position, keeps=is_trial) for position in positions]
            if not is_trial:
                self._kept = {at: raw for at, raw in self._kept.items() if at > positions[-1]}
        else:
            return self._fill(epoch) * len(positions)
        samples = []
        for position, raw in zip(positions, raw_samples, strict=True):
            try:
                samples.append(self._transform(epoch, position, raw))
            except SampleError as error:
                if on_bad is None:
                    raise
                on_bad(position, error)
            else:
                self._last = [raw]
        return samples

    def substitute(self, epoch: int) -> list[Any]:
        """Return a sample of weight 0, or nothing if none has been read that can be transformed.

        Raises:
            SampleError: The stream ended.
        """
        try:
            return self._fill(epoch)
        except _EndError:
            raise
        except SampleError:
            self._last = []
            return []

    def note(self) -> StreamNote:
        """Return what is to be told beside the micro-batch that was just read."""
        marks, self._marks = tuple(self._marks), []
        position = min([self._next, *self._kept]) if self._kept else self._next
        state = self._state() if position == self._next else None
        return StreamNote(marks, StreamState(self._epoch, position, state, self._last_mark))

    def _fill(self, epoch: int) -> list[Any]:
        """Return a sample of weight 0: the last one that was read, or else the next one."""
        if not self._last:
            if self._iterator is None:
                self._open(epoch)
            following = [at for at in self._kept if at >= self._filled]
            position = min(following, default=self._next)
            self._filled = position + 1
            self._last = [self._read(position, keeps=True)]
        return [self._transform(epoch, self._next, self._last[0])]

    def _open(self, epoch: int) -> None:
        saved, self._resume_from = self._resume_from, None
        seed_all(derive(self._seed, epoch))
        name = f"The {self._title} stream"
        self._epoch, self._next, self._kept, self._last_mark = epoch, 0, {}, None
        self._filled = 0
        self._iterable = _guarded(name, "when it was opened", self._stream.make_iterable)
        if callable(set_epoch := getattr(self._iterable, "set_epoch", None)):
            _guarded(name, "in set_epoch", lambda: set_epoch(epoch))
        resumes = saved is not None and saved.epoch == epoch
        state = json.loads(saved.state) if resumes and saved and saved.state else None
        if state is not None and _has_state(self._iterable):
            _guarded(name, "in load_state_dict", lambda: self._iterable.load_state_dict(state))
        self._iterator = _guarded(name, "when it was opened", lambda: iter(self._iterable))
        if state is not None and _has_state(self._iterator) and not _has_state(self._iterable):
            iterator: Any = self._iterator
            _guarded(name, "in load_state_dict", lambda: iterator.load_state_dict(state))
        if not resumes or saved is None:
            return
        if state is not None:
            self._next = saved.position
            return
        while self._next < saved.position:
            self._advance(saved.mark)

    def _read(self, position: int, *, keeps: bool) -> Any:
        if position in self._kept:
            return self._kept[position]
        while self._next < position:
            self._advance()
        if self._next > position:
            raise SampleError(
                f"Sample {position:,} of the {self._title} stream was passed: it was asked for "
                f"after sample {self._next - 1:,}. This is an error in launcher; please report it."
            )
        raw = self._advance()
        if keeps:
            self._kept[position] = raw
        return raw

    def _advance(self, expected: StreamMark | None = None) -> Any:
        """Return the next sample of the stream.

        Args:
            expected: The description of a sample in a checkpoint, to which that sample is compared.
        """
        assert self._iterator is not None
        position = self._next
        seed_all(derive(self._seed, self._epoch, position))
        name = f"The {self._title} stream"
        try:
            raw = next(self._iterator)
        except StopIteration:
            raise _EndError(self._end_text(name, position)) from None
        except (LauncherError, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  # the recipe's code may raise anything
            raise _error(
                name, f"at sample {position:,} of epoch {self._epoch + 1}", error
            ) from None
        self._next += 1
        if position & (position - 1) == 0 or position % _MARK_EVERY == 0:
            mark = StreamMark(self._epoch, position, json.loads(encode_json(describe(raw))))
            self._marks.append(mark)
            self._last_mark = mark
            if expected is not None and expected.position == position:
                self._compare(mark, expected)
        return raw

    def _end_text(self, name: str, position: int) -> str:
        if position == 0:
            return (
                f"{name} yielded no sample in epoch {self._epoch + 1}. Check what it reads; and "
                "where it was read before, make it start anew when it is iterated again, or "
                "return launcher.Stream(make_iterable), which makes a new one for each epoch."
            )
        advice = "Lower train_samples, which is the number of samples of an epoch"
        if self._epoch == 0:
            advice = (
                f"With train_samples={position} in the recipe, launcher starts the stream again "
                "for each further epoch. Otherwise take fewer steps"
            )
        return (
            f"{name} ended after {position:,} samples of epoch {self._epoch + 1}, before the last "
            f"step: the run needs sample {position:,} as well, counted from 0. {advice}."
        )

    def _compare(self, mark: StreamMark, expected: StreamMark) -> None:
        difference = first_difference(expected.description, mark.description)
        if difference is not None:
            place, before, now = difference
            where = f", at {place}," if place else ""
            raise SampleError(
                f"The {self._title} stream is not the one that the checkpoint was trained on: "
                f"sample {mark.position:,} of epoch {mark.epoch + 1}{where} is {now}, but was "
                f"{before}. {SAME_EVERYWHERE} To resume with another stream on purpose, add "
                "`--accept data`."
            )

    def _transform(self, epoch: int, position: int, raw: Any) -> Any:
        transform = self._stream.transform
        if transform is None:
            return raw
        seed_all(derive(self._seed, epoch, position))
        where = f"for sample {position:,} of epoch {epoch + 1}"
        name = f"The transform of the {self._title} stream"
        return _guarded(name, where, lambda: transform(raw))

    def _state(self) -> str | None:
        """Return the state of the stream as JSON; None if it has none that a checkpoint can hold.

        Raises:
            SampleError: `state_dict` raised an exception.
        """
        owner = next(filter(_has_state, (self._iterable, self._iterator)), None)
        if owner is None:
            return None
        name = f"The {self._title} stream"
        state = _guarded(name, "in state_dict", owner.state_dict)
        try:
            text = encode_json(state)
            is_equal = json.loads(text) == state
        except (TypeError, ValueError, RecursionError):
            return None
        return text if is_equal and len(text) <= _MAX_STATE else None


def read_all(stream: Stream, seed: int, title: str, limit: int | None = None) -> list[Any]:
    """Return the samples of a finite stream, or the first ones.

    Args:
        stream: The stream.
        seed: The run's seed.
        title: The name of the data in messages.
        limit: Number of samples to read; None reads the stream to its end.

    Raises:
        RecipeError: The stream has more samples than an evaluation set in memory may have.
        SampleError: The stream raised an exception, or is empty.
    """
    samples: list[Any] = []
    generators = Generators()
    reader = StreamReader(stream, seed, title)
    try:
        while limit is None or len(samples) < limit:
            try:
                samples += reader.take(0, [len(samples)], is_trial=False, has_weight=True)
            except _EndError:
                break
            if len(samples) > MAX_HELD_OUT:
                raise RecipeError(
                    f"The {title} data is a stream of more than {MAX_HELD_OUT:,} samples. An "
                    "evaluation reads a finite set, which a stream gives by being read into "
                    "memory once. Return a data set with __len__ and __getitem__, or end the "
                    "stream earlier."
                )
    finally:
        generators.restore()
    return samples


def _has_state(value: Any) -> bool:
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return all(map(callable, methods))


def _guarded(name: str, where: str, function: Callable[[], Any]) -> Any:
    """Return the result of a function of the recipe.

    Raises:
        SampleError: It raised an exception.
    """
    try:
        return function()
    except (LauncherError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  # the recipe's code may raise anything
        raise _error(name, where, error) from None


def _error(name: str, where: str, error: BaseException) -> SampleError:
    calls = error.__traceback__.tb_next if error.__traceback__ is not None else None
    error.__traceback__ = calls  # without the call above
    text = f"{name} raised {class_name(error)} {where}: {text_of(error, 2_000) or 'it has no text'}"
    return SampleError(text + (f"\n\n{traceback_of(error).rstrip()}" if calls is not None else ""))
