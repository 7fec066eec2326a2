"""What a rank does with the exception that ends it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from launcher.engine.ranks.failures import fail, is_out_of_memory
from launcher.engine.ranks.output import Log, Output, Terminal, open_output
from launcher.environment.world import World
from launcher.runs.failure_record import FAILURE_FILE_VARIABLE, read_failure
from launcher.runs.rundir import RunDir


class MuteError(BaseException):
    """An exception without words."""

    def __str__(self) -> str:
        raise SystemExit("no words")


@dataclass
class Rank:
    """A rank with streams in memory."""

    errors: io.StringIO = field(default_factory=io.StringIO)
    log: io.StringIO = field(default_factory=io.StringIO)

    def fail(self, error: BaseException, folder: Path) -> int:
        """Let the rank fail; return its exit code."""
        output = Output(terminal=io.StringIO(), errors=self.errors, log=self.log)
        return fail(error, World(rank=1, world_size=2), RunDir(folder), output=output, shows=False)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """Return a rank that no launcher has started."""
    monkeypatch.delenv(FAILURE_FILE_VARIABLE, raising=False)
    return Rank()


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ValueError("caf\udce9.jpg \x1b[2J"), "ValueError"),
        (MuteError(), "MuteError"),
        (SystemExit(0), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("x\x1b" * 5_000_000), "ValueError"),
        (type("Odd\x1b" * 1000, (Exception,), {})(), "Odd\\x1bOdd"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_any_exception_is_recorded(
    tmp_path: Path, rank: Rank, error: BaseException, name: str
) -> None:
    """failure.json and the log hold the class and the place of any exception, in bounded texts."""
    assert rank.fail(error, tmp_path) == 1
    failure = read_failure(RunDir(tmp_path))
    assert failure is not None
    assert failure.error.startswith(name)
    assert failure.rank == 1
    assert RunDir(tmp_path).failure.stat().st_size < 200_000
    for text in (failure.error, failure.message, failure.traceback):
        assert "\x1b" not in text
        assert len(text.encode()) < 64_000
    assert failure.traceback in rank.log.getvalue()
    assert rank.errors.getvalue() == "", "the launcher shows it"


def test_a_failure_that_no_file_can_hold_is_shown(tmp_path: Path, rank: Rank) -> None:
    """A rank that can write to neither the run folder nor the launcher's shows its error itself."""
    assert rank.fail(ValueError("the cause"), tmp_path / "gone") == 1
    assert "ValueError: the cause" in rank.errors.getvalue()


def test_a_report_that_fails_ends_the_rank(tmp_path: Path, rank: Rank) -> None:
    """An error while the failure is reported is shown with the failure, and raises nothing."""
    rank.log.close()
    assert rank.fail(ValueError("the cause"), tmp_path) == 1
    assert "rank 1 failed: ValueError: the cause" in rank.errors.getvalue()


def test_a_log_takes_any_text(tmp_path: Path) -> None:
    """Characters that UTF-8 cannot encode are written to a log as escapes."""
    with Log(tmp_path / "log", pytest.fail) as log:
        print("caf\udce9", file=log)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "caf\\udce9\n"


def test_a_log_that_cannot_be_opened_or_written_is_reported_once(tmp_path: Path) -> None:
    """A full disk costs the log, not the rank, and the first loss is reported."""
    for path in (tmp_path / "gone/log", Path("/dev/full")):
        losses: list[str] = []
        with Log(path, losses.append) as log:
            print("one", file=log)
            print("two", file=log, flush=True)
        assert len(losses) == 1
        assert str(path) in losses[0]


def test_a_terminal_takes_any_text() -> None:
    """A terminal with another encoding shows escapes, and further text as well."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    terminal = Terminal(stream)
    terminal.write("café \udce9\n")
    terminal.write("more\n")
    assert isinstance(stream.buffer, io.BytesIO)
    assert stream.buffer.getvalue() == b"caf\\xe9 \\udce9\nmore\n"


def test_output_without_a_folder_for_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank whose log cannot be made says so and goes on."""
    (tmp_path / "logs").write_text("a file in the place of the folder", encoding="utf-8")
    output = open_output(tmp_path / "logs/rank0.log", own_terminal=False, on_terminal=False)
    print("lost", file=output.log, flush=True)
    output.log.close()
    assert capsys.readouterr().err.count("cannot write the log") == 1


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] can't allocate memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_forms_of_exhausted_memory_are_known(error: BaseException, *, ran_out: bool) -> None:
    """Every form in which torch and its libraries report exhausted memory counts as such."""
    assert is_out_of_memory(error) is ran_out
