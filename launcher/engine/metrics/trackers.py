"""Send a run's metrics to experiment trackers (TensorBoard, W&B, MLflow ...) through Accelerate.

Trackers work in a thread of rank 0, so no step waits for a network, and any failure of theirs is
only a warning. A resumed run continues the same tracker run where the tracker supports that.
"""

from __future__ import annotations

import contextlib
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

from launcher.errors import RunDirError
from launcher.json_file import find_json
from launcher.runs.files import write_json
from launcher.runs.redaction import hidden_values, redacted
from launcher.runs.rundir import RunDir

_FINISH_TIMEOUT = 30.0
"""Seconds to wait for trackers at the end of a finished run."""

_EXIT_TIMEOUT = 5.0
"""Seconds to wait after a stop or a failure, when others wait for this process."""

_MAX_QUEUED = 10_000
_MAX_ERROR_CHARACTERS = 200
_MAX_FAILURES = 3
"""Consecutive failures after which a tracker is dropped."""


class Trackers:
    """The experiment trackers of a run, served by one thread.

    Args:
        names: Names from `accelerate.utils.LoggerType`.
        run_dir: The run folder.
        project: Project or experiment name, shared by all runs of the recipe.
        config: Settings of the run.
    """

    def __init__(
        self, names: Sequence[str], run_dir: RunDir, project: str, config: Mapping[str, Any]
    ) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._run_dir, self._project = run_dir, project
        self._config = {name: _to_scalar(value) for name, value in hidden_values(config).items()}
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_QUEUED)
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._active: dict[str, GeneralTracker] = {}
        self._failures: dict[str, int] = {}
        self._num_dropped = 0
        self._closed = False
        if not PartialState._shared_state:  # noqa: SLF001  # Accelerate's loggers require one
            PartialState(cpu=True)
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()
        for name in self._names:
            self._queue.put(lambda name=name: self._start(name))  # type: ignore[misc]

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send the finite values of a step to every tracker."""
        finite = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        self._put(lambda: self._call_each(lambda tracker: tracker.log(dict(finite), step=step)))

    def attach(self, make_page: Callable[[], Path], summary: str) -> None:
        """Create a page and attach it to each tracker.

        Trackers that store files get the page; the others get `summary` with the path of the page.
        The page is created in the trackers' thread, because both may import the same modules.
        """

        def send() -> None:
            with self._catching("the report"):
                page = make_page()
                self._call_each(lambda tracker: _attach_page(tracker, page, summary))

        self._put(send)

    def warnings(self) -> list[str]:
        """Return the warnings since the last call."""
        texts = []
        with contextlib.suppress(queue.Empty):
            while True:
                texts.append(self._warnings.get_nowait())
        return texts

    def close(self, timeout: float = _FINISH_TIMEOUT) -> list[str]:
        """Wait up to `timeout` seconds for pending data to be sent; return the warnings."""
        if not self._closed:
            self._closed = True
            self._put(lambda: self._call_each(lambda tracker: tracker.finish()))
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(timeout)
            if self._thread.is_alive():
                names = ",".join(self._active) or ",".join(self._names)  # none has started yet
                self._warnings.put(
                    f"trackers: {names}: not everything was sent within {timeout:g} s. The rest is "
                    "missing there; metrics.jsonl has all values."
                )
        return self.warnings()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the trackers with a short timeout, unless `close` was called."""
        self.close(_EXIT_TIMEOUT)

    def _put(self, action: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._num_dropped += 1
            if self._num_dropped == 1:
                self._warnings.put(
                    "the trackers cannot keep up, so some values are not sent. metrics.jsonl has "
                    "all values."
                )

    def _work(self) -> None:
        while (action := self._queue.get()) is not None:
            action()

    def _start(self, name: str) -> None:
        with self._catching(name):
            arguments = _tracker_arguments(name, self._run_dir, self._project)
            tracker = LOGGER_TYPE_TO_CLASS[name](**arguments)
            tracker.main_process_only = False  # only rank 0 gets here, so there is nothing to check
            tracker.start()
            # MLflow refuses to change the parameters of an existing run.
            if not (name == "mlflow" and name in _read_run_ids(self._run_dir)):
                tracker.store_init_configuration(self._config)
            self._active[name] = tracker
            if name == "mlflow":
                _save_run_id(self._run_dir, name, tracker.tracker.info.run_id)

    def _call_each(self, action: Callable[[GeneralTracker], Any]) -> None:
        for name, tracker in list(self._active.items()):
            with self._catching(name):
                action(tracker)
                self._failures[name] = 0

    @contextlib.contextmanager
    def _catching(self, name: str) -> Any:
        """Warn of the first of consecutive failures, and drop a tracker that keeps failing."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # some trackers raise SystemExit
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            if failures == 1:
                self._warnings.put(_failure_text(name, error))
            if failures >= _MAX_FAILURES:
                self._active.pop(name, None)


def _failure_text(name: str, error: BaseException) -> str:
    """Return the warning for a failed tracker, without secrets."""
    if isinstance(error, ModuleNotFoundError):
        reason = f"the package {error.name} is not installed"
    else:
        text = shorten(redacted(str(error)), _MAX_ERROR_CHARACTERS, placeholder=" ...").rstrip(".")
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return (
        f"trackers: {name}: {reason}. The run continues without it; metrics.jsonl has all values."
    )


def _tracker_arguments(name: str, run_dir: RunDir, project: str) -> dict[str, Any]:
    """Return the constructor arguments of a tracker, with the run id of an earlier start if any."""
    path = run_dir.path
    if name == "tensorboard":
        return {"run_name": name, "logging_dir": str(path)}
    if name == "wandb":
        run_id = _read_run_ids(run_dir).get(name) or uuid.uuid4().hex[:16]
        _save_run_id(run_dir, name, run_id)
        settings = {"name": path.name, "dir": str(path), "id": run_id, "resume": "allow"}
        return {"run_name": project, **settings}
    if name == "mlflow":
        previous_id = _read_run_ids(run_dir).get(name)
        settings = {"experiment_name": project, "run_name": path.name}
        return settings | ({} if previous_id is None else {"run_id": previous_id})
    kwargs: dict[str, Any] = {"run_name": project}
    if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
        kwargs["logging_dir"] = str(path)
    return kwargs


def _read_run_ids(run_dir: RunDir) -> dict[str, str]:
    """Return the ids under which trackers know the run, by tracker."""
    with contextlib.suppress(RunDirError):
        return find_json(run_dir.trackers, dict[str, str]) or {}
    return {}


def _save_run_id(run_dir: RunDir, name: str, run_id: str) -> None:
    ids = _read_run_ids(run_dir) | {name: run_id}
    write_json(run_dir.trackers, ids)


def _attach_page(tracker: GeneralTracker, page: Path, summary: str) -> None:
    """Send a page to a tracker through its own interface for files."""
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


def _to_scalar(value: Any) -> bool | int | float | str:
    """Return a value as a type that every tracker accepts."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
