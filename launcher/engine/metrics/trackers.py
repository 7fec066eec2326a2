"""Experiment trackers, as Accelerate knows them: what a run measures, sent to where people look.

They work in a thread of rank 0, so that no step waits for a network, and whatever goes wrong there
is a warning. A run that is resumed goes on in the same place where the tracker has such a thing.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from launcher.runs.redaction import hidden_values, redacted
from launcher.runs.rundir import RunDir

_SECONDS_TO_FINISH = 30.0
_SECONDS_TO_LEAVE = 5.0
"""Where the run has been stopped or has failed, and others wait."""

_MOST_WAITING = 10_000
_WIDTH = 200
_MOST_FAILURES = 3
"""In a row, after which a tracker is left alone."""


class Trackers:
    """Some trackers at work.

    Args:
        names: Of `accelerate.utils.LoggerType`.
        run_dir: The run's folder.
        project: What runs of this recipe are filed under.
        config: What the run was set to.
    """

    def __init__(
        self, names: Sequence[str], run_dir: RunDir, project: str, config: Mapping[str, Any]
    ) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._run_dir, self._project = run_dir, project
        self._config = {name: _plain(value) for name, value in hidden_values(config).items()}
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST_WAITING)
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._running: dict[str, GeneralTracker] = {}
        self._failures: dict[str, int] = {}
        self._lost = 0
        self._closed = False
        if not PartialState._shared_state:  # noqa: SLF001  # their loggers insist on one
            PartialState(cpu=True)
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()
        for name in self._names:
            self._queue.put(lambda name=name: self._start(name))  # type: ignore[misc]

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send numbers that are finite."""
        known = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        self._put(lambda: self._each(lambda tracker: tracker.log(dict(known), step=step)))

    def attach(self, make_page: Callable[[], Path], summary: str) -> None:
        """Make a page, send it where a tracker keeps files, and text that names it to the others.

        It is made in their thread: what it imports may be what a tracker is importing.
        """

        def send() -> None:
            with self._warning("the report"):
                page = make_page()
                self._each(lambda tracker: _attach(tracker, page, summary))

        self._put(send)

    def warnings(self) -> list[str]:
        """Return what has gone wrong since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._warnings.get_nowait())
        return found

    def close(self, seconds: float = _SECONDS_TO_FINISH) -> list[str]:
        """Let them finish what there is to send, for so long at most; return what went wrong."""
        if not self._closed:
            self._closed = True
            self._put(lambda: self._each(lambda tracker: tracker.finish()))
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(seconds)
            if self._thread.is_alive():
                shown = ",".join(self._running) or ",".join(self._names)  # not even started
                self._warnings.put(
                    f"trackers: {shown}: not all was sent within {seconds:g} s, and the rest is "
                    "lost there. metrics.jsonl has it."
                )
        return self.warnings()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        """Let them finish, if nobody has."""
        self.close(_SECONDS_TO_LEAVE)

    def _put(self, action: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._lost += 1
            if self._lost == 1:
                self._warnings.put(
                    "the trackers do not keep up: some numbers are not sent. metrics.jsonl has all."
                )

    def _work(self) -> None:
        while (action := self._queue.get()) is not None:
            action()

    def _start(self, name: str) -> None:
        with self._warning(name):
            tracker = LOGGER_TYPE_TO_CLASS[name](**_arguments(name, self._run_dir, self._project))
            tracker.main_process_only = False  # this is the main process; nobody need be asked
            tracker.start()
            if not (name == "mlflow" and name in _remembered(self._run_dir)):
                tracker.store_init_configuration(self._config)  # there a setting never changes
            self._running[name] = tracker
            if name == "mlflow":
                _remember(self._run_dir, name, tracker.tracker.info.run_id)

    def _each(self, action: Callable[[GeneralTracker], Any]) -> None:
        for name, tracker in list(self._running.items()):
            with self._warning(name):
                action(tracker)
                self._failures[name] = 0

    @contextlib.contextmanager
    def _warning(self, name: str) -> Any:
        """Have what goes wrong told once, and a tracker left alone that goes on going wrong."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # some of them raise SystemExit
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            if failures == 1:
                self._warnings.put(_what_failed(name, error))
            if failures >= _MOST_FAILURES:
                self._running.pop(name, None)


def _what_failed(name: str, error: BaseException) -> str:
    """Return a warning."""
    if isinstance(error, ModuleNotFoundError):
        what = f"the package {error.name} is not installed"
    else:
        first = shorten(redacted(str(error)), _WIDTH, placeholder=" ...").rstrip(".")
        what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return f"trackers: {name}: {what}. The run goes on without it; metrics.jsonl has all numbers."


def _arguments(name: str, run_dir: RunDir, project: str) -> dict[str, Any]:
    """Return what a tracker is made with. What it called the run before it calls it again."""
    path = run_dir.path
    if name == "tensorboard":
        return {"run_name": name, "logging_dir": str(path)}
    if name == "wandb":
        own = _remembered(run_dir).get(name) or uuid.uuid4().hex[:16]
        _remember(run_dir, name, own)
        settings = {"name": path.name, "dir": str(path), "id": own, "resume": "allow"}
        return {"run_name": project, **settings}
    if name == "mlflow":
        before = _remembered(run_dir).get(name)
        settings = {"experiment_name": project, "run_name": path.name}
        return settings | ({} if before is None else {"run_id": before})
    kwargs: dict[str, Any] = {"run_name": project}
    if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
        kwargs["logging_dir"] = str(path)
    return kwargs


def _remembered(run_dir: RunDir) -> dict[str, str]:
    """Return the ids that trackers have given the run."""
    try:
        found: dict[str, str] = json.loads(run_dir.trackers.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _remember(run_dir: RunDir, name: str, own: str) -> None:
    kept = _remembered(run_dir) | {name: own}
    run_dir.trackers.write_text(json.dumps(kept) + "\n", encoding="utf-8")


def _attach(tracker: GeneralTracker, page: Path, summary: str) -> None:
    """Send a page, in the tracker's own way."""
    if tracker.name == "wandb":
        tracker.tracker.save(str(page), base_path=str(page.parent), policy="now")
    elif tracker.name == "mlflow":
        tracker.log_artifact(str(page))
    elif tracker.name == "comet_ml":
        tracker.tracker.log_asset(str(page))
    elif tracker.name == "clearml":
        tracker.tracker.upload_artifact("report", str(page))
    elif tracker.name == "dvclive":
        tracker.tracker.log_artifact(str(page))
    else:
        tracker.log({"report": f"{summary}\n\n{page}"}, step=0)


def _plain(value: Any) -> bool | int | float | str:
    """Return a value as all trackers take it."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
