"""Run folders with a damaged file: commands name the damage, or go on without the file."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from damaged_run import (
    FILES,
    VALUES,
    WHOLE_FILE,
    damaged_documents,
    write_document,
    write_failure,
    write_finished_run,
)
from fuzz.harness import call, invoke

from launcher.console.run_table import read_row, row_values
from launcher.console.watch_screen import status_line, status_values
from launcher.launch.prepare import ResumeRequest, prepare_resume
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.history import History
from launcher.runs.rundir import RunDir, open_run_dir
from launcher.runs.status import read_run_state

MANIFEST = next(name for name in FILES if name.endswith("checkpoint.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run that has finished, long ago."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    write_finished_run(folder)
    _age(folder)
    return folder


@pytest.fixture(scope="module")
def failed(finished: Path) -> Path:
    """Write a run that has failed, long ago."""
    folder = finished.with_name("failed")
    shutil.copytree(finished, folder)
    write_failure(RunDir(folder))
    _age(folder)
    return folder


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a run that has the given file beside an undamaged run."""

    def make(name: str) -> Path:
        source = "failed" if name == "failure.json" else "finished"
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(request.getfixturevalue(source), run)
        other = tmp_path / "other"
        if not other.exists():
            other.symlink_to(request.getfixturevalue("finished"))
        return run

    return make


def _age(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))


def strict(text: str) -> Any:
    """Return the value of JSON; fail if it holds NaN or an infinity, which JSON lacks."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def runs(folder: Path) -> None:
    ended = invoke(["runs", "."], folder)
    assert ended.exit_code == 0
    assert "other" in ended.stdout


def runs_as_json(folder: Path) -> None:
    ended = invoke(["runs", ".", "--json"], folder)
    assert ended.exit_code == 0
    assert "other" in [row["run"] for row in strict(ended.stdout)]


def status(folder: Path) -> None:
    ended = invoke(["status", "run", "--json"], folder)
    assert ended.exit_code in (0, 2)
    if ended.exit_code == 0:
        strict(ended.stdout)


def statuses(folder: Path) -> None:
    ended = invoke(["status"], folder)
    assert ended.exit_code == 0
    assert "other" in ended.stdout


def logs(folder: Path) -> None:
    assert invoke(["logs", "run"], folder).exit_code in (0, 2)


def cancel(folder: Path) -> None:
    assert invoke(["cancel", "run"], folder).exit_code == 2


def estimate(folder: Path) -> None:
    assert invoke(["plan", "digits", "--estimate", "run"], folder).exit_code == 2


def watch(folder: Path) -> None:
    def show() -> None:
        run_dir = open_run_dir(folder / "run")
        history, state = History(run_dir), read_run_state(run_dir)
        assert status_line(history, state)
        assert status_values(history, state)

    call(show, folder)


def list_run(folder: Path) -> None:
    def read() -> None:
        row = read_row(RunDir(folder / "run"))
        assert row is None or row_values(row)

    call(read, folder)


def resume(folder: Path) -> None:
    call(lambda: prepare_resume(ResumeRequest(run_dir=folder / "run", fall_back=True)), folder)


def verify(folder: Path) -> None:
    def read_checkpoints() -> None:
        for checkpoint in list_checkpoints(open_run_dir(folder / "run")):
            manifest = checkpoint.read_manifest()
            assert not list(checkpoint.find_unlisted(manifest))
            assert not list(checkpoint.find_damage(list(manifest.files), manifest))

    call(read_checkpoints, folder)


READERS: dict[str, list[Callable[[Path], None]]] = {
    "run.yaml": [runs_as_json, status, watch, resume, estimate],
    "events.jsonl": [runs, watch],
    "metrics.jsonl": [runs_as_json, watch, estimate],
    "result.json": [runs, runs_as_json, statuses, watch, resume],
    "failure.json": [runs, status, watch],
    "submission.json": [runs, status, statuses, logs, cancel],
    "health/rank0.json": [runs, status, watch],
    MANIFEST: [resume, verify],
    "owner.lock": [resume],
}
"""What reads each file, with the error or the outcome that it may have."""

PAIRS = list(itertools.product(READERS, WHOLE_FILE))


@pytest.mark.parametrize(("name", "damage"), PAIRS)
def test_a_damaged_file_is_named_or_skipped(
    copy: Callable[[str], Path], name: str, damage: str
) -> None:
    """Whatever stands in place of a file, each command that reads it ends at once and in order."""
    run = copy(name)
    WHOLE_FILE[damage](run / name)
    for read in READERS[name]:
        read(run.parent)


@pytest.mark.parametrize(
    ("name", "damage"),
    [(FILES[number % len(FILES)], damage) for number, damage in enumerate(WHOLE_FILE)],
)
def test_a_report_is_written_without_a_damaged_file(
    copy: Callable[[str], Path], name: str, damage: str
) -> None:
    """A page about a damaged run is written, or refused with the name of what is damaged."""
    run = copy(name)
    WHOLE_FILE[damage](run / name)
    ended = invoke(["report", "run"], run.parent)
    assert (ended.exit_code == 0) == (run / "report.html").exists()
    if ended.exit_code:
        assert name in ended.stderr


VALUE_READERS: dict[str, list[Callable[[Path], None]]] = {
    "run.yaml": [list_run, watch],
    "events.jsonl": [list_run, watch],
    "metrics.jsonl": [list_run, watch],
    "result.json": [list_run, watch],
    "failure.json": [list_run, watch],
    "submission.json": [statuses, status],
    "health/rank0.json": [list_run, watch],
    MANIFEST: [verify],
}
"""What reads each file after one of its values has been replaced."""


def documents(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content for each value of a file that is replaced by another."""
    values = itertools.cycle(VALUES.values())
    if path.suffix == ".jsonl":
        rows = list(map(json.loads, path.read_text().splitlines()))
        first = {tuple(row): number for number, row in reversed(list(enumerate(rows)))}
        for number in first.values():
            for place, row in damaged_documents(rows[number], next(values)):
                yield f"{number}.{place}", [*rows[:number], row, *rows[number + 1 :]]
        return
    content = path.read_text()
    document = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)
    for number, value in enumerate(VALUES.values()):
        places = list(damaged_documents(document, value))
        yield from places[number :: len(VALUES)]


@pytest.mark.parametrize("name", VALUE_READERS)
def test_a_damaged_value_is_named_or_skipped(copy: Callable[[str], Path], name: str) -> None:
    """Whatever value a file holds in place of the one that was written, it is read in order."""
    run = copy(name)
    for place, document in documents(run / name):
        run = copy(name)
        write_document(run / name, document)
        print(place)  # shown if a reader fails
        for read in VALUE_READERS[name]:
            read(run.parent)


def test_a_damaged_run_is_listed_with_the_file(finished: Path, tmp_path: Path) -> None:
    """The line of a damaged run begins with the name of the damaged file, which is never cut."""
    folder = tmp_path / ("deep" * 20)
    shutil.copytree(finished, folder)
    (folder / "result.json").write_text("[")
    row = read_row(RunDir(folder))
    assert row is not None
    assert row.words.startswith("result.json is damaged")
