"""`launcher predict` and `launcher.predict`: the predictions of a run's model in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands, read_lines

from launcher.recipes.digits import read_digits

RECIPES = ROOT / "tests/recipes/held_out.py"


@pytest.fixture(scope="module")
def folder(module_run: Commands) -> Path:
    """Return a folder with a run of each recipe, and a file with 11 images."""
    for name in ("held_out", "predicting"):
        recipe = f"{RECIPES}:{name}"
        done = module_run("launcher", "run", recipe, "-n", "2", "--out", name, "--quiet")
        assert done.exit_code == 0, done.stderr
    images, _ = read_digits()
    lines = [" ".join(map(str, image.flatten().tolist())) for image in images[250:261]]
    (module_run.folder / "images.txt").write_text("\n".join(lines))
    return module_run.folder


def predict(run: Commands, *arguments: str) -> list[dict[str, Any]]:
    """Return what `launcher predict` writes to predictions.jsonl."""
    done = run("launcher", "predict", *arguments, "--out", "predictions.jsonl", "--force")
    assert done.exit_code == 0, done.stderr
    assert not list(run.folder.glob(".launcher-*"))
    return read_lines(run.folder / "predictions.jsonl")


def test_outputs_of_forward_are_the_columns(module_run: Commands, folder: Path) -> None:
    """Without `predict`, outputs are written in the order of the data; they are as accurate."""
    rows = predict(module_run, "held_out", "evaluation")
    assert len(rows) == 70
    assert [len(row["output"]) for row in rows] == [10] * 70
    labels = read_digits()[1][250:320].tolist()
    right = sum(
        row["output"].index(max(row["output"])) == label
        for row, label in zip(rows, labels, strict=True)
    )
    recorded = json.loads((folder / "held_out/result.json").read_text())["evaluation"]
    assert right / 70 == pytest.approx(recorded["accuracy"])


@pytest.mark.usefixtures("folder")
def test_the_file_does_not_depend_on_the_ranks(module_run: Commands) -> None:
    """Any number of ranks, any strategy and any weights of the run give the same rows in order."""
    expected = predict(module_run, "predicting", "evaluation", "-n", "1")
    assert len(expected) == 70
    assert list(expected[0]) == ["label", "name", "probabilities"]
    assert expected[5]["name"] == f"digit {expected[5]['label']}"
    for arguments in (
        ("-n", "2", "--checkpoint", "last"),
        ("-n", "3", "strategy=fsdp", "micro_batch_size=4"),
        ("-n", "3", "strategy=zero3", "num_workers=1", "worker_start=spawn"),
    ):
        rows = predict(module_run, "predicting", "evaluation", *arguments)
        assert [row["name"] for row in rows] == [row["name"] for row in expected]
        for row, other in zip(rows, expected, strict=True):
            assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_file_is_predicted_from_python(module_run: Commands, folder: Path) -> None:
    """The recipe reads a file for `launcher.predict`; more ranks than samples are no trouble."""
    (folder / "predicting.py").write_text(
        "import launcher\n"
        "if __name__ == '__main__':\n"
        "    done = launcher.predict('predicting', 'images.txt', out='images.jsonl',\n"
        "                            nproc_per_node=3, micro_batch_size=5)\n"
        "    print(done.path.name, done.num_samples, *done.columns, done.weights, done.step)\n"
    )
    done = module_run("python", folder / "predicting.py")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "images.jsonl 11 label name probabilities model.safetensors 10\n"
    of_file = read_lines(folder / "images.jsonl")
    of_data = predict(module_run, "predicting", "evaluation")[:11]
    assert [row["name"] for row in of_file] == [row["name"] for row in of_data]


def test_parquet_holds_the_same_rows(module_run: Commands, folder: Path) -> None:
    """A Parquet file has the columns of the JSON lines, with the same values and their types."""
    parquet = pytest.importorskip("pyarrow.parquet")
    done = module_run(
        *("launcher", "predict", "predicting", "train", "--out", "train.parquet", "--json"),
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["num_samples"] == 250
    table = parquet.read_table(folder / "train.parquet")
    assert table.column("label").type == "int64"
    assert str(table.column("probabilities").type.value_type) == "float"
    assert table.to_pylist() == predict(module_run, "predicting", "train")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nothing", "evaluation"), "nothing"),
        (("held_out", "missing.txt"), "missing.txt"),
        (("held_out", "images.txt"), "predict_data"),
        (("held_out", "dev"), "evaluation and train"),
        (("held_out", "evaluation", "--out", "there.jsonl"), "--force"),
        (("held_out", "evaluation", "--out", "there.txt"), ".parquet"),
        (("held_out", "evaluation", "--out", "no/folder.jsonl"), "no/folder.jsonl"),
        (
            ("held_out", "evaluation", "--out", "held_out.jsonl", "--checkpoint", "5"),
            "step-00000008",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_predicted_is_refused(
    module_run: Commands, folder: Path, arguments: tuple[str, ...], named: str
) -> None:
    """A run, input or output that is wrong ends with exit code 2, and nothing is written."""
    (folder / "there.jsonl").write_text("mine")
    options = () if "--out" in arguments else ("--out", "refused.jsonl")
    done = module_run("launcher", "predict", *arguments, *options)
    assert done.exit_code == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "there.jsonl").read_text() == "mine"
    assert not (folder / "refused.jsonl").exists()
    assert not list(folder.glob(".launcher-*"))
