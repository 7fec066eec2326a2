"""Whether ranks may be forked after a recipe's code has run."""

from __future__ import annotations

import os

import pytest
import torch

from launcher import forking
from launcher.forking import observed_threads, reason_not_to_fork


def test_cuda_is_asked_for_without_initialising_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that asks for a GPU when it is imported does not call the CUDA driver."""
    calls: list[str] = []

    def call_driver() -> int:
        calls.append("driver")
        return 2

    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", call_driver, raising=False)
    with observed_threads():
        assert torch.cuda.is_available()
    assert calls == []
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
    assert torch.cuda.is_available()
    assert calls == ["driver"], "without the variable torch calls the driver"


def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that the user gave the variable is not changed."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    with observed_threads():
        assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "0"
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "0"


def test_ranks_are_not_forked_after_the_driver_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason not to fork is found in a forked process, where CUDA would fail."""
    monkeypatch.setattr(forking, "_recipe_threads", set())  # without those of other tests
    assert reason_not_to_fork() is None
    parent = os.getpid()
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: os.getpid() != parent)
    assert reason_not_to_fork() == "initialised CUDA"


def test_a_forked_process_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the forked process cannot tell, ranks are not forked."""

    def fail() -> bool:
        raise RuntimeError

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", fail)
    assert reason_not_to_fork() == "initialised CUDA"
