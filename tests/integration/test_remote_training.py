"""Training from object stores: S3 that restarts in the middle, and Google Cloud Storage."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_store import serve_s3
from support import ROOT, Commands, read_lines, wait_until

pytest.importorskip("pyarrow")

NUM_FILES, ROWS = 6, 64
SETTINGS = ("-n", "2", "--out", "out")


def parquet_files() -> dict[str, bytes]:
    """Return Parquet files with digits, by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from launcher.recipes.digits import read_digits

    images, labels = read_digits()
    files = {}
    for number in range(NUM_FILES):
        part = slice(number * ROWS, (number + 1) * ROWS)
        pixels = images[part].flatten(1).tolist()
        table = pa.table({"pixels": pixels, "label": labels[part].tolist()})
        content = io.BytesIO()
        pq.write_table(table, content)
        files[f"part-{number}.parquet"] = content.getvalue()
    return files


def losses(folder: Path) -> list[float]:
    """Return the loss of each step of a run."""
    return [row["loss"] for row in read_lines(folder / "metrics.jsonl") if "loss" in row]


def take_recipe(folder: Path) -> None:
    """Put the recipe and its gates into a folder."""
    for name in ("gated.py", "remote_digits.py"):
        shutil.copy(ROOT / "tests/recipes" / name, folder / name)


@pytest.fixture(scope="module")
def expected(module_run: Commands) -> list[float]:
    """Return the losses of a training with the files on the local disk."""
    files = parquet_files()
    for name, content in files.items():
        (module_run.folder / name).write_bytes(content)
    take_recipe(module_run.folder)
    done = module_run("launcher", "run", "remote_digits.py", f"files={' '.join(files)}", *SETTINGS)
    assert done.exit_code == 0, done.stderr
    return losses(module_run.folder / "out")


def test_a_training_waits_for_a_store_that_restarts(run: Commands, expected: list[float]) -> None:
    """While S3 is down, ranks try again; the losses are those with local files."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    pytest.importorskip("flask_cors")
    files = parquet_files()
    take_recipe(run.folder)
    assert len(expected) == NUM_FILES * ROWS // 32
    (run.folder / "gates").mkdir()
    with serve_s3() as store:
        urls = " ".join(store.put(name, content) for name, content in files.items())
        process = run.start(
            "launcher", "run", "remote_digits.py", f"files={urls}", "gates=gates", *SETTINGS,
            env=store.environment,
        )  # fmt: skip
        wait_until((run.folder / "out/checkpoints/step-00000002").exists, process)
        store.stop()
        (run.folder / "gates/all").touch()
        wait_until(lambda: store.proxy.num_refused, process)
        assert process.poll() is None
        store.start()
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert losses(run.folder / "out") == expected


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, dict[str, str]]]:
    """Run a server that speaks as Google Cloud Storage does; yield its files and variables."""
    # Otherwise gcsfs asks Google over gRPC what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        address = f"http://localhost:{server._api._httpd.server_port}"
        env = {
            "STORAGE_EMULATOR_HOST": address,
            "FSSPEC_GS_TOKEN": "anon",
        }
        yield gcsfs.GCSFileSystem(token="anon", endpoint_url=address), env
    finally:
        server.stop()


def test_google_cloud_storage_holds_data_and_runs(
    run: Commands, expected: list[float], bucket: tuple[Any, dict[str, str]]
) -> None:
    """Data and the run folder lie in a bucket, and the run is resumed from there."""
    system, env = bucket
    files = parquet_files()
    take_recipe(run.folder)
    for name, content in files.items():
        system.pipe_file(f"bucket/data/{name}", content)
    urls = " ".join(f"gs://bucket/data/{name}" for name in files)
    done = run(
        "launcher", "run", "remote_digits.py", f"files={urls}", "-n", "2",
        "--out", "gs://bucket/runs/one", env=env,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert system.exists("bucket/runs/one/checkpoints/step-00000010/checkpoint.json")
    shutil.rmtree(run.folder / "runs")
    done = run("launcher", "resume", "gs://bucket/runs/one", "--from", "step-00000010", env=env)
    assert done.exit_code == 0, done.stderr
    (folder,) = (run.folder / "runs").iterdir()
    assert losses(folder) == expected
