"""The GPUs of this machine, and accelerators that launcher cannot use. Read from files alone."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.recipe.text_values import digits

_SECONDS_FOR_WSL = 10
"""Longest wait for `nvidia-smi` under WSL."""

_DEVICE_FILES = {
    "neuron*": "an AWS Neuron device",
    "davinci[0-9]*": "a Huawei Ascend device",
    "hl[0-9]*": "an Intel Gaudi device",
}
"""Accelerators by the names of their files in /dev."""

_INTEL = "0x8086"
_DISPLAY_WITHOUT_VGA = "0x0380"
"""The PCI class of Intel's GPUs for data centres; integrated ones are VGA controllers."""


@dataclass(frozen=True, kw_only=True)
class Accelerators:
    """The accelerators of a machine."""

    num_gpus: int
    """GPUs that torch.cuda may use in this process: those of NVIDIA or, with ROCm, of AMD."""

    unusable: tuple[str, ...]
    """A phrase for each kind of accelerator that is present and that no run can use."""


def find_accelerators(
    root: Path, env: Mapping[str, str], *, torch_is_rocm: bool | None = None
) -> Accelerators:
    """Return the accelerators of a machine.

    Args:
        root: The root of the file system to read from.
        env: The environment, whose variables hide devices.
        torch_is_rocm: Whether torch is built for AMD's GPUs; None looks at the installed one.
    """
    unusable = list(_others(root))
    if num_nvidia := _num_nvidia(root):
        instances = _mig_instances(root)
        if instances and len(set(instances)) >= num_nvidia:
            num_nvidia = 1  # where all GPUs are divided, CUDA shows a process one instance
        if len(instances) > 1:
            unusable.append(
                "MIG instances, of which CUDA shows one to a process (CUDA_VISIBLE_DEVICES chooses)"
            )
        visible = _num_visible(num_nvidia, env, ("CUDA_VISIBLE_DEVICES",))
        return Accelerators(num_gpus=visible, unusable=tuple(unusable))
    if num_amd := _num_amd(root):
        if _torch_is_rocm() if torch_is_rocm is None else torch_is_rocm:
            names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
            visible = _num_visible(num_amd, env, names)
            return Accelerators(num_gpus=visible, unusable=tuple(unusable))
        unusable.insert(0, "an AMD GPU, which needs a torch that is built for ROCm")
    return Accelerators(num_gpus=0, unusable=tuple(unusable))


def _num_nvidia(root: Path) -> int:
    num_files = sum(path.name[6:].isdigit() for path in (root / "dev").glob("nvidia[0-9]*"))
    return num_files or _num_wsl(root)


def _num_wsl(root: Path) -> int:
    """Return the number of NVIDIA GPUs under WSL 2, which has one device file for all GPUs."""
    tool = root / "usr/lib/wsl/lib/nvidia-smi"
    if not (root / "dev/dxg").exists() or not tool.is_file():
        return 0
    try:
        listed = subprocess.run(
            [tool, "--list-gpus"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS_FOR_WSL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _mig_instances(root: Path) -> list[str]:
    """Return the instances of MIG, each as the folder of the GPU that it is a part of."""
    folder = root / "proc/driver/nvidia/capabilities"
    return [path.parents[3].name for path in folder.glob("gpu*/mig/gi*/ci*/access")]


def _num_amd(root: Path) -> int:
    """Return the number of GPUs among the nodes of AMD's kernel driver; CPUs have the id 0."""
    if not (root / "dev/kfd").exists():
        return 0
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    return sum(_read(node) not in ("", "0") for node in nodes)


def _torch_is_rocm() -> bool:
    """Return whether the installed torch is built for ROCm, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = _read(Path(spec.origin).with_name("version.py"))
    return re.search(r"^hip\b.*= *['\"]", version, re.MULTILINE) is not None


def _num_visible(present: int, env: Mapping[str, str], names: Iterable[str]) -> int:
    """Return the number of devices that no variable hides.

    CUDA and HIP read their variables from the left and stop at the first entry that is not a
    device. CUDA shows a process at most one instance of MIG.
    """
    for name in names:
        entries = [entry.strip() for entry in env[name].split(",")] if name in env else None
        if entries is None:
            continue
        usable = 0
        for entry in entries:
            if not entry or entry.startswith("-") or (digits(entry) or 0) >= present:
                break
            usable += 1
            if entry.startswith("MIG-"):
                break
        present = min(usable, present)
    return present


def _others(root: Path) -> Iterable[str]:
    for pattern, name in _DEVICE_FILES.items():
        if any((root / "dev").glob(pattern)):
            yield name
    for driver in (root / "sys/class/accel").glob("accel*/device/driver"):
        if driver.resolve().name == "habanalabs":
            yield _DEVICE_FILES["hl[0-9]*"]
            break
    for device in (root / "sys/bus/pci/devices").glob("*/class"):
        if (
            _read(device).startswith(_DISPLAY_WITHOUT_VGA)
            and _read(device.with_name("vendor")) == _INTEL
        ):
            yield "an Intel GPU"
            break
    if root == Path("/") and platform.system() == "Darwin" and platform.machine() == "arm64":
        yield "an Apple GPU"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
