"""Every error this package raises on purpose.

    LauncherError
    ├── UsageError          the user's mistake; exit code 2, no traceback
    │   ├── RecipeError     a recipe cannot be found, imported or built, or a value in it is wrong
    │   ├── OverrideError   a name=value, a YAML file or a command-line value is wrong
    │   ├── PlanError       the numbers do not go together, or ask for more than there is
    │   ├── WorldError      the processes found are not the processes planned
    │   ├── SlurmError      Slurm refuses, is not there, or a site profile is wrong
    │   ├── RunDirError     the run folder exists, is missing or cannot be written
    │   └── CheckpointError a checkpoint is missing, damaged or of another training
    ├── TrainingError       the run itself failed; exit code 1
    │   ├── SampleError     the data set raised while a sample was read
    │   └── LostRankError   another rank, which this one waits for, has failed and says why
    ├── PeerError           another node of the run has failed or gone; its exit code
    └── EndedError          ranks have ended early and said why; their exit code

Each message says what was asked, what was found and what to do, in words that can be pasted.
"""

from __future__ import annotations

from collections.abc import Iterable

EXIT_FAILED = 1
"""Exit code of a run that started and failed."""

EXIT_USAGE = 2
"""Exit code of a mistake that was found before or instead of training."""

EXIT_RESUMABLE = 75
"""Exit code of a run that was asked to stop, saved a checkpoint and waits to be resumed (the
EX_TEMPFAIL of sysexits.h: try again)."""


class LauncherError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the process ends with."""

    exit_code: int = EXIT_FAILED


class UsageError(LauncherError):
    """The user's mistake: shown as one message, without a traceback."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe cannot be found, imported or built, or a value in it is wrong."""


class OverrideError(UsageError):
    """A `name=value`, a YAML file or a value in one of them is wrong."""


class PlanError(UsageError):
    """The numbers do not go together, or ask for more than the machine has."""


class WorldError(UsageError):
    """The processes that were found are not the processes that were planned."""


class SlurmError(UsageError):
    """Slurm refuses what is asked of it, or is not there, or a site profile is wrong."""


class RunDirError(UsageError):
    """The run folder exists already, is missing, or cannot be written."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or of another training."""


class TrainingError(LauncherError):
    """The run itself failed."""


class SampleError(TrainingError):
    """The data set raised while a sample was read; the message names the sample."""


class LostRankError(TrainingError):
    """Another rank, which this one waits for, has failed; it says why itself."""


class PeerError(LauncherError):
    """Another node of the run has failed, and says why itself, or has gone.

    Args:
        node: Its name.
        exit_code: What it ends with; None where it has gone.
    """

    def __init__(self, node: str, exit_code: int | None) -> None:
        how = "has gone without a word" if exit_code is None else "has failed, and says why"
        super().__init__(f"the run ended on this node because {node} {how}")
        self.gone = exit_code is None
        self.exit_code = EXIT_FAILED if exit_code is None else exit_code


class EndedError(LauncherError):
    """Ranks have ended early, and what there is to say of it was shown.

    Args:
        exit_code: Of the run.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the run ended with exit code {exit_code}")
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean ...?"` for the known names nearest to `name`, or an empty string."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""
