"""Slurm's commands: how they are called, what their errors say, and sbatch and scancel."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from launcher.errors import SlurmError

_TIMEOUT_SECONDS = 120.0
"""Longest wait for a command of Slurm, which tries for a while to reach a controller."""


def run_command(*command: str, seconds: float = _TIMEOUT_SECONDS) -> str:
    """Run a command of Slurm and return its standard output.

    Args:
        *command: The command.
        seconds: Longest time that it may take.

    Raises:
        SlurmError: The command is not installed, or fails.
    """
    return _run(*command, seconds=seconds).stdout


def _run(*command: str, seconds: float = _TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            capture_output=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer within {seconds:g} s. See whether `sinfo` "
            "answers, and try again later."
        ) from None
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not installed here. Submit jobs from a login node of the cluster, "
            "which has Slurm's commands."
        ) from None
    if done.returncode:
        raise SlurmError(f"{command[0]} failed: {error_text(done.stderr or done.stdout)}")
    return done


def error_text(text: str) -> str:
    """Return an error message of Slurm as one sentence, without names of programs."""
    if "Could not establish a configuration source" in text:
        return "Slurm is installed here but is not configured: there is no slurm.conf."
    lines = [re.sub(r"^\w+: (?:error: |fatal: )?", "", line.strip()) for line in text.splitlines()]
    messages = [
        re.sub(r"^(?:allocation failure|Batch job submission failed): ", "", line) for line in lines
    ]
    return "; ".join(dict.fromkeys(text.rstrip(".") for text in messages if text)) + "."


def check_with_sbatch(script: str) -> str:
    """Let sbatch check a script without submitting it; return what it prints.

    Raises:
        SlurmError: sbatch rejects the script.
    """
    done = _run("sbatch", "--test-only", script)
    return error_text(done.stderr or done.stdout)


def submit(script: str) -> str:
    """Submit a script with sbatch; return the job id.

    Raises:
        SlurmError: sbatch rejects the script.
    """
    return run_command("sbatch", "--parsable", script).strip().partition(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs, whether they wait or run.

    Raises:
        SlurmError: scancel fails.
    """
    run_command("scancel", *jobs)
