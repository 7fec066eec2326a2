"""The errors that this package raises on purpose, and the exit codes of its commands.

    LauncherError
    ├── UsageError          a mistake of the user; exit code 2, no traceback
    │   ├── RecipeError     a recipe cannot be found, imported or built, or a value in it is wrong
    │   ├── OverrideError   a name=value, a YAML file or a value in one of them is wrong
    │   ├── PlanError       the settings contradict each other, or ask for more than there is
    │   ├── WorldError      the processes or their recipe are not those that were planned
    │   ├── SchedulerError  a scheduler refuses a request or is missing, or a site profile is wrong
    │   │   ├── SlurmError  ... Slurm
    │   │   └── KubernetesError  ... Kubernetes
    │   ├── RunDirError     the run folder exists, is missing or cannot be written
    │   ├── CheckpointError a checkpoint is missing, damaged or of another training
    │   └── StoreError      an object store cannot be reached, denies access, or lacks an object
    ├── TrainingError       the run failed; exit code 1
    │   ├── SampleError     the data set raised an exception while a sample was read
    │   └── LostRankError   another rank that this one waits for failed, and shows its own error
    ├── HealthError         a node is not fit for a run; exit code 75 in a job, which goes elsewhere
    ├── PeerError           another node of the run failed or disappeared; that node's exit code
    │   └── CutOffError     this node stood still, or was cut off, and the others have given it up
    └── EndedError          ranks ended early and their error was shown; their exit code

Each message states what was asked, what was found and what to do, in text that can be searched for.
"""

from __future__ import annotations

from collections.abc import Iterable

EXIT_FAILED = 1
"""Exit code of a run that started and failed."""

EXIT_USAGE = 2
"""Exit code of a mistake that was found before or instead of training."""

EXIT_RESUMABLE = 75
"""Exit code of a run that was asked to stop, saved a checkpoint and can be resumed (EX_TEMPFAIL of
sysexits.h: try again)."""

EXIT_WITHOUT = 200
"""Exit code of a launcher whose run goes on without it, on other nodes."""


class LauncherError(Exception):
    """Base class of all errors raised on purpose; the process ends with `exit_code`."""

    exit_code: int = EXIT_FAILED

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython shows for this error: its message without a traceback."""
        return f"{type(self).__name__}: {self}".splitlines()


class UsageError(LauncherError):
    """A mistake of the user, shown as one message without a traceback."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe cannot be found, imported or built, or a value in it is wrong."""


class OverrideError(UsageError):
    """A `name=value`, a YAML file or a value in one of them is wrong."""


class PlanError(UsageError):
    """The settings contradict each other, or ask for more than the machine has."""


class WorldError(UsageError):
    """The processes that were found, or the recipe that they built, are not the planned ones."""


class SchedulerError(UsageError):
    """A scheduler refuses a request or is not installed, or a site profile is wrong."""


class SlurmError(SchedulerError):
    """Slurm refuses a request or is not installed, or a site profile is wrong."""


class KubernetesError(SchedulerError):
    """Kubernetes refuses a request, kubectl is missing, or a site profile is wrong."""


class RunDirError(UsageError):
    """The run folder already exists, is missing, or cannot be written."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or of another training."""


class StoreError(UsageError):
    """An object store cannot be reached, denies access, or lacks an object.

    Args:
        text: What was asked, what the store answered, and what to do.
        kind: Why the request failed, such as "denied"; empty for other errors.
    """

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class TrainingError(LauncherError):
    """The run itself failed."""


class SampleError(TrainingError):
    """The data set raised an exception while a sample was read; the message names the sample."""


class LostRankError(TrainingError):
    """Another rank that this one waits for failed, and shows its own error."""


class HealthError(LauncherError):
    """A node is not fit for a run, for example because a GPU has failed.

    Args:
        text: What was found on which node, and what to do.
        exit_code: `EXIT_RESUMABLE` in a job that can run on other nodes.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class PeerError(LauncherError):
    """Another node of the run failed, and shows its own error, or disappeared.

    Args:
        node: The node's name.
        exit_code: The exit code of that node; None if it disappeared.
    """

    def __init__(self, node: str, exit_code: int | None) -> None:
        event = "has disappeared" if exit_code is None else "has failed; that node shows the error"
        super().__init__(f"the run ended on this node because {node} {event}")
        self.gone = exit_code is None
        self.exit_code = EXIT_FAILED if exit_code is None else exit_code


class CutOffError(PeerError):
    """The other nodes took this one for lost and have ended the run, or go on without it.

    Args:
        node: The name of this node.
        seconds: How long it did not answer, as far as it knows.
    """

    def __init__(self, node: str, seconds: float) -> None:
        super().__init__(node, None)
        text = f"the run ended on this node ({node}), which did not answer for {seconds:.0f} s, so "
        self.args = (f"{text}that the other nodes took it for lost",)


class EndedError(LauncherError):
    """Ranks ended early, and their error has already been shown.

    Args:
        exit_code: The exit code of the run.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the run ended with exit code {exit_code}")
        self.exit_code = exit_code


def sentence(text: str) -> str:
    """Return a text with a full stop, unless it ends with a mark already: `Did you mean adamw?`."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean ...?"` with the known names most similar to `name`; empty if none is.

    A name that differs in case alone, or has dashes for underscores, is the most similar, and then
    names that begin with it.

    Args:
        name: The unknown name.
        known: The names to choose from. Dashes before an option are shown and not compared.
    """
    from difflib import get_close_matches

    names = {_compared(other): other for other in known}
    form = _compared(name)
    matches = [form] if form in names else get_close_matches(form, names, n=3, cutoff=0.6)
    if len(form) > 2 and (begun := [other for other in names if other.startswith(form)]):
        matches = [other for other in matches if other == form] or begun[:3]
    return f" Did you mean {' or '.join(names[match] for match in matches)}?" if matches else ""


def _compared(name: str) -> str:
    return name.lstrip("-").lower().replace("-", "_")
