"""The recipes that come along: each learns something real, and says what it needs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from support import Commands, needs_fashion_mnist

from launcher import RecipeError
from recipes.fashion_mnist import read_idx

IDX = bytes((0, 0, 8, 2)) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big")


@needs_fashion_mnist
def test_fashion_mnist_learns(run: Commands) -> None:
    """One pass over the training images recognises most of those held out."""
    done = run(
        *("launcher", "run", "fashion_mnist", "-n", "2", "epochs=1", "batch_size=512"),
        *("lr_rule=sqrt", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads((run.folder / "out/result.json").read_text())
    assert result["evaluation"]["accuracy"] > 0.82


def test_an_idx_file_is_read(tmp_path: Path) -> None:
    """The bytes come back in the shape that the header gives."""
    path = tmp_path / "some.gz"
    path.write_bytes(gzip.compress(IDX + bytes(range(6))))
    assert read_idx(path, dimensions=2).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "some.gz is missing. Install Debian's package dataset-fashion-mnist"),
        (b"<html>not found</html>", "Not a gzipped file"),
        (gzip.compress(IDX + bytes(6))[:-9], "Get the file anew"),
        (gzip.compress(IDX + bytes(5)), "is no whole IDX file of bytes in 2 dimensions"),
        (gzip.compress(b"something else"), "is no whole IDX file of bytes in 2 dimensions"),
    ],
    ids=["missing", "other", "cut", "short", "text"],
)
def test_a_file_that_is_none_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    """With the name of the file and how to get it."""
    path = tmp_path / "some.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_idx(path, dimensions=2)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
