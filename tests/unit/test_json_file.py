"""JSON that is written is strict, and JSON that is read is checked."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from damaged_run import WHOLE_FILE

from launcher.errors import RunDirError
from launcher.json_file import (
    decode_json,
    encode_json,
    exact_floats,
    find_json,
    read_json,
    read_lines,
)
from launcher.runs.files import write_json


@dataclass(frozen=True, kw_only=True)
class Value:
    """What the files of these tests hold."""

    step: int
    time: float
    loss: float | None = None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("indent", [None, 2])
def test_written_json_is_strict(tmp_path: Path, value: float, indent: int | None) -> None:
    """NaN and infinities, at any depth, are written as null, which every reader accepts."""
    values: dict[str, Any] = {"a": value, "b": [(value, 1.5)], "c": {"d": {"e": value}}}
    expected = {"a": None, "b": [[None, 1.5]], "c": {"d": {"e": None}}}
    assert msgspec.json.decode(encode_json(values, indent=indent)) == expected
    write_json(tmp_path / "values.json", values)
    assert msgspec.json.decode((tmp_path / "values.json").read_bytes()) == expected


def test_every_float_is_read_as_it_was_written() -> None:
    """With `exact_floats`, NaN and infinities survive strict JSON."""
    values = {"a": [math.inf, -math.inf, 1e300, 0.1], "b": {"c": math.nan}}
    text = encode_json(exact_floats(values))
    read = decode_json(text.encode(), dict[str, Any], exact=True)
    assert read["a"] == values["a"]
    assert math.isnan(read["b"]["c"])


def test_nan_of_earlier_versions_is_read_as_null() -> None:
    """The bare NaN that earlier versions wrote is read, as the null that is written now."""
    value = decode_json(b'{"step": 1, "time": 2, "loss": NaN}', Value)
    assert value == Value(step=1, time=2.0, loss=None)


@pytest.mark.parametrize("damage", WHOLE_FILE.values(), ids=WHOLE_FILE)
def test_a_damaged_file_is_one_error_with_its_name(tmp_path: Path, damage: Any) -> None:
    """Whatever stands in place of a file, reading it ends at once with one short error."""
    path = tmp_path / "value.json"
    path.write_text(json.dumps({"step": 1, "time": 2.5}))
    assert read_json(path, Value) == Value(step=1, time=2.5)
    damage(path)
    for read in (read_json, find_json):
        with pytest.raises(RunDirError) as caught:
            read(path, Value)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 500 + len(str(path))


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    """Lines that are damaged or of another type are skipped, and the others are read."""
    path = tmp_path / "values.jsonl"
    lines = [b'{"step": 1, "time": 1}', b"[" * 100_000, b"\xff", b"{}", b'{"step": 1e999}', b""]
    path.write_bytes(b"\n".join([*lines, b'{"step": 2, "time": 2}', b'{"step": 3']))
    decoder = msgspec.json.Decoder(Value)
    assert [value.step for value in read_lines(path, decoder)] == [1, 2]
    path.unlink()
    os.mkfifo(path)
    assert read_lines(path, decoder) == []
