"""Calls the hooks of a recipe's callbacks on this rank, and keeps their state in checkpoints."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.analysis.gradient_noise import Measurement
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.state.training_state import is_plain
from launcher.engine.training.context import Listener, TrainContext
from launcher.engine.training.shown_model import ShownModel
from launcher.engine.training.trained_weights import TrainedWeights
from launcher.errors import TrainingError
from launcher.json_file import encode_json
from launcher.printable import add_note, kind_of, printable_line
from launcher.recipe.callback_checks import HOOKS
from launcher.recipe.training_log import without_log
from launcher.runs.callback_context import CallbackContext
from launcher.runs.manifest import CallbackState, CallbackValues
from launcher.runs.rundir import RunDir
from launcher.runs.step_row import StepRow

_MAX_STATE_CHARACTERS = 1 << 20
"""Longest state of a callback as JSON; the manifest of a checkpoint holds it."""


class CallbackHooks:
    """The callbacks of a recipe on one rank.

    Every rank calls its own objects, in their order. What a hook raises ends the run, with a note
    that names the callback, the hook, the step and the rank.

    Args:
        context: What is trained.
        run_dir: The run folder.
        first_step: Number of steps that were taken before.
    """

    def __init__(self, context: TrainContext, run_dir: RunDir, first_step: int) -> None:
        self._context, self._run_dir = context, run_dir
        self._callbacks: tuple[Any, ...] = context.recipe.callbacks
        self._having = {
            hook: [each for each in self._callbacks if callable(getattr(each, hook, None))]
            for hook in HOOKS
        }
        """The callbacks that have each hook."""

        self._trained = TrainedWeights(context) if self._callbacks else None
        self._step = first_step
        self._rows: tuple[StepRow, ...] = ()
        self._evaluation: Mapping[str, float] = MappingProxyType({})
        self._evaluated_step: int | None = None
        self._checkpoint: Path | None = None
        self._shown = ShownModel(context)

    def __bool__(self) -> bool:
        """Return whether there are any callbacks."""
        return bool(self._callbacks)

    def with_before_step(self, context: TrainContext) -> TrainContext:
        """Return the context of the loop with what it calls before each step.

        Callbacks are shown this context from now on.
        """
        self._context = context
        if not self._having["before_step"]:
            return context
        return replace(context, before_step=(self._before_step,))

    def listening(self, listener: Listener) -> Listener:
        """Return a listener that passes everything on to `listener`, and then tells callbacks."""
        return _CallbackListener(listener, self) if self else listener

    def on_run_start(self) -> None:
        """Tell the callbacks that the first step follows."""
        self._call("on_run_start")

    def after_step(self, step: int) -> None:
        """Tell the callbacks that `step` steps have been taken."""
        self._step = step
        self._call("after_step")

    def on_rows(self, rows: list[StepRow]) -> None:
        """Keep the measurements that were read last."""
        self._rows = tuple(rows)

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Tell the callbacks of an evaluation after `step` steps."""
        self._evaluation, self._evaluated_step = MappingProxyType(dict(values)), step
        self._call("on_evaluation")

    def on_checkpoint(self, folder: Path) -> None:
        """Tell the callbacks of a checkpoint that is complete."""
        self._checkpoint = folder
        self._call("on_checkpoint")

    def on_run_end(self, step: int, *, finished: bool) -> None:
        """Tell the callbacks that no step follows."""
        self._step = step
        self._call("on_run_end", finished=finished)

    def state(self) -> CallbackValues | None:
        """Return what a checkpoint holds of the callbacks; None if there are none.

        Raises:
            TrainingError: The state of a callback is too large, or of types that it cannot hold.
        """
        if not self._callbacks:
            return None
        states = [
            CallbackState(name=name, state=self._state_of(callback, name))
            for callback, name in self._stateful()
        ]
        return CallbackValues(
            states=states, evaluation=dict(self._evaluation), evaluated_step=self._evaluated_step
        )

    def restore(self, values: CallbackValues | None, checkpoint: str) -> None:
        """Give each callback the state that the callback of its class, and place, had.

        Args:
            values: What `state` returned on rank 0; None if the checkpoint has none.
            checkpoint: The name of the checkpoint.
        """
        saved: dict[tuple[str, int], dict[str, Any]] = {}
        if values is not None:
            self._evaluation = MappingProxyType(values["evaluation"])
            self._evaluated_step = values["evaluated_step"]
            saved = dict(_numbered((state["name"], state["state"]) for state in values["states"]))
        for key, callback in _numbered((name, callback) for callback, name in self._stateful()):
            if key in saved:
                self._guard(callback, "load_state_dict", functools.partial(_call_with, saved[key]))
            elif self._context.backend.rank == 0:
                print(
                    f"launcher: {checkpoint} holds no state of the callback {key[0]}, which "
                    "begins anew.",
                    flush=True,
                )

    def has_seen_evaluation(self, step: int) -> bool:
        """Return whether the restored callbacks know the evaluation after `step` steps."""
        return self._evaluated_step == step

    def _before_step(self, step: int) -> None:
        self._call("before_step", epoch_of=step)

    def _call(self, hook: str, *, epoch_of: int | None = None, finished: bool = False) -> None:
        """Call a hook of every callback that has it.

        Args:
            hook: The name of the hook.
            epoch_of: The step, counted from 0, whose epoch the callbacks are told; None is that of
                the last step.
            finished: Whether the run has taken all of its steps.
        """
        callbacks = self._having[hook]
        if not callbacks:
            return
        context, step = self._context, max(self._step - 1, 0) if epoch_of is None else epoch_of
        shown = CallbackContext(
            step=self._step,
            epoch=context.sampler.window(step).epoch + 1,
            plan=context.plan,
            rank=context.backend.rank,
            world_size=context.backend.world_size,
            run_dir=self._run_dir.path,
            evaluation=self._evaluation,
            rows=self._rows,
            checkpoint=self._checkpoint,
            finished=finished,
            get_model=self._shown.get,
        )
        for callback in callbacks:
            self._shown.begin()
            self._guard(callback, hook, functools.partial(_call_with, shown))
            self._shown.end(_name_of(callback), hook)
            if self._trained is not None:
                self._trained.check(_name_of(callback))

    def _guard(self, callback: Any, method: str, call: Callable[[Any], Any]) -> Any:
        """Return `call(callback.method)`; name the callback in a note if that raises."""
        try:
            with without_log("a callback"):
                return call(getattr(callback, method))
        except BaseException as error:
            add_note(
                error,
                f"The callback {_name_of(callback)} raised this in {method}, after step "
                f"{self._step:,} on rank {self._context.backend.rank}.",
            )
            raise

    def _stateful(self) -> Iterator[tuple[Any, str]]:
        for callback in self._callbacks:
            if callable(getattr(callback, "state_dict", None)):
                yield callback, _name_of(callback)

    def _state_of(self, callback: Any, name: str) -> dict[str, Any]:
        state = self._guard(callback, "state_dict", lambda method: method())
        found = (
            _find_unsavable(state, "state_dict()") if isinstance(state, dict) else kind_of(state)
        )
        if found:
            raise TrainingError(
                f"The callback {name} cannot be saved: state_dict returned {found}. Return a dict "
                "with text as keys; a checkpoint holds numbers, text, true, false, None, and lists "
                "and dicts of these. Of a tensor it holds tensor.tolist()."
            )
        if len(encode_json(state)) > _MAX_STATE_CHARACTERS:
            raise TrainingError(
                f"The callback {name} cannot be saved: its state has more than "
                f"{_MAX_STATE_CHARACTERS:,} characters as JSON. Keep large values in a file of the "
                "callback's own, and its name in the state."
            )
        saved: dict[str, Any] = copy.deepcopy(state)
        return saved


class _CallbackListener:
    """A `Listener` that passes everything on to another one, and then tells callbacks."""

    def __init__(self, listener: Listener, hooks: CallbackHooks) -> None:
        self._listener, self._hooks = listener, hooks

    def on_micro_batches(self, step: int, micro_batches: list[MicroBatch]) -> None:
        self._listener.on_micro_batches(step, micro_batches)
        self._hooks.after_step(step)

    def on_steps(self, rows: list[StepRow]) -> None:
        self._listener.on_steps(rows)
        self._hooks.on_rows(rows)

    def on_noise(self, measurements: list[Measurement]) -> None:
        self._listener.on_noise(measurements)

    def on_warning(self, text: str) -> None:
        self._listener.on_warning(text)

    def on_values(self, step: int, values: Mapping[str, Any]) -> None:
        self._listener.on_values(step, values)

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self._listener.on_evaluation(step, values)
        self._hooks.on_evaluation(step, values)


def _call_with(argument: Any, method: Callable[[Any], Any]) -> Any:
    return method(argument)


def _name_of(callback: Any) -> str:
    return printable_line(type(callback).__name__)


def _numbered(pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[tuple[str, int], Any]]:
    """Yield values by (name, number among those of this name)."""
    counts: Counter[str] = Counter()
    for name, value in pairs:
        yield (name, counts[name]), value
        counts[name] += 1


def _find_unsavable(value: Any, path: str) -> str:
    """Return what in a value a checkpoint cannot hold, and where; empty if it can hold all."""
    if is_plain(value):
        return ""
    if isinstance(value, dict):
        if others := [key for key in value if not isinstance(key, str)]:
            return f"{kind_of(others[0])} as a key of {path}"
        parts = ((part, f"{path}[{key!r}]") for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((part, f"{path}[{index}]") for index, part in enumerate(value))
    else:
        return f"{kind_of(value)} as {path}"
    return printable_line(next(filter(None, (_find_unsavable(*part) for part in parts)), ""))
