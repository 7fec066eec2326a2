"""The environment variables that `--hosts` passes on to the other machines.

ssh starts programs in the environment of the host. Three sources add to it, the weakest first:
variables of the terminal that configure libraries which train; the files .deepspeed_env in the home
folder and in the working folder, which the launcher of DeepSpeed reads; and `--forward`, the `-x`
of Open MPI.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.errors import UsageError
from launcher.printable import printable_line, shortened
from launcher.recipe.text_values import without_quotes
from launcher.regular_file import read_regular
from launcher.runs.redaction import is_secret

_PREFIXES = (
    *("CUDA_", "CUBLAS_", "CUDNN_", "HIP_", "ROCR_", "HSA_", "MIOPEN_"),
    *("NCCL_", "RCCL_", "GLOO_", "UCX_", "FI_", "RDMAV_", "MV2_"),
    *("TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "DS_"),
    *("HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "MLFLOW_"),
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_"),
    "PYTHON",
)
_NAMES = ("LD_LIBRARY_PATH", "LD_PRELOAD")

_SEARCH_PATH = "PYTHONPATH"

_OF_ONE_PROCESS = re.compile(
    r"(RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|CROSS)_\w*|MASTER_(ADDR|PORT)"
    r"|LAUNCHER_HOST\w*|LAUNCHER_RENDEZVOUS|(TORCHELASTIC|SLURM|OMPI|PMI|PMIX)_\w*)\Z"
)
"""Variables that tell a process its place, which differs from host to host."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

_FILE_VARIABLE, _FILE = "DS_ENV_FILE", ".deepspeed_env"
"""The variable that names DeepSpeed's file of variables, and its name without it."""

_MAX_BYTES = 1 << 20
_MAX_SHOWN = 40
_MAX_BEGINNING = 10
"""Characters that are shown of a malformed line, which may hold a key."""


def forwarded_variables(env: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the variables to pass on, without keys and passwords.

    Whoever can list the processes of a host sees them, because they are in a command line. A host
    needs its own key, for example in the files that the command line tools of Hugging Face and
    Weights & Biases write.

    Args:
        env: The environment of the terminal.
        folder: The working folder, to which relative folders of PYTHONPATH belong.
    """
    values = {
        name: value
        for name, value in env.items()
        if (name.startswith(_PREFIXES) or name in _NAMES) and not is_secret(name, value)
    }
    if _SEARCH_PATH in values:
        # The process that ssh starts is not in the working folder yet.
        folders = values[_SEARCH_PATH].split(":")
        values[_SEARCH_PATH] = ":".join(str(folder / each) for each in folders)
    return values


def named_variables(assignments: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that `--forward NAME` and `--forward NAME=VALUE` name, also secrets.

    Args:
        assignments: The values of the option. A later one takes precedence.
        env: The environment, which has the values of names alone.

    Raises:
        UsageError: A name is not that of a variable, has no value here, or is set by launcher.
    """
    variables = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        shown = printable_line(shortened(name, _MAX_SHOWN))
        if not _NAME.match(name):
            raise UsageError(
                f"--forward {shown}: expected NAME or NAME=VALUE, where NAME is the name of an "
                "environment variable, such as HF_HOME=/data/hf."
            )
        if _OF_ONE_PROCESS.match(name):
            raise UsageError(
                f"--forward {shown}: launcher sets this variable, to another value on each host. "
                "Leave it out."
            )
        if not separator and name not in env:
            raise UsageError(
                f"--forward {shown}: there is no variable {shown} here whose value could be passed "
                f"on. Set it, or write --forward {shown}=VALUE."
            )
        variables[name] = value if separator else env[name]
    return variables


def variables_in_files(
    env: Mapping[str, str], home: Path, folder: Path, warn: Callable[[str], object]
) -> dict[str, str]:
    """Return the variables in DeepSpeed's files, without those that look like secrets.

    A line is NAME=VALUE; empty lines and those that begin with # are skipped. The value may be in
    quotes. The file in the working folder takes precedence over the one in the home folder.

    Args:
        env: The environment, in which DS_ENV_FILE may give the files another name.
        home: The home folder of the user.
        folder: The working folder.
        warn: Called with a sentence for each line that is left out, and each file that cannot be
            read.
    """
    variables: dict[str, str] = {}
    name = env.get(_FILE_VARIABLE) or _FILE
    for path in dict.fromkeys((home / name, folder / name)):
        try:
            text = read_regular(path, _MAX_BYTES).decode()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            warn(f"{path} is left out: {reason}.")
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                variable, _, value = line.strip().partition("=")
                value = without_quotes(value)
                if (problem := _problem(line, variable, value)) is None:
                    variables[variable] = value
                else:
                    warn(f"{path}, line {number}: {problem}")
    return variables


def _problem(line: str, name: str, value: str) -> str | None:
    """Return why a line of DeepSpeed's file is left out, or None. No value is shown."""
    if "=" not in line or not _NAME.match(name):
        shown = printable_line(name[:_MAX_BEGINNING])
        return f"expected NAME=VALUE, found a line that begins with {shown!r}; it is left out."
    if _OF_ONE_PROCESS.match(name):
        return f"{name} is left out, because launcher sets it, to another value on each host."
    if is_secret(name, value):
        return (
            f"{name} is left out, because it looks like a key or a password. Set it in this "
            f"terminal and add --forward {name} to pass it on."
        )
    return None
