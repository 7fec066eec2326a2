"""The environment variables that `--hosts` passes on to the other machines.

ssh starts programs in the environment of the host. These variables configure libraries that train,
and users of DeepSpeed and Open MPI expect the hosts to have those of their terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
