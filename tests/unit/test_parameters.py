"""Parameters of recipe functions: every type is read alike from each source, and read back."""

# ruff: noqa: ARG001, ANN001, B006, B008

from __future__ import annotations

import enum
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType

import pytest
import yaml
from msgspec import Meta

from launcher import OverrideError, Recipe, cosine, warmup
from launcher.recipe.optimizer import OptimizerSpec, adamw
from launcher.recipe.overrides import BuiltRecipe, Override, build, read_arguments, read_yaml
from launcher.recipe.resolve import Reference
from launcher.recipe.schedules import Schedule

if TYPE_CHECKING:
    from decimal import Decimal

Width = NewType("Width", int)


class Mode(enum.Enum):
    """Members whose values are text."""

    SLOW = "slow"
    FAST = "fast"


class Level(enum.IntEnum):
    """Members whose values are numbers."""

    LOW = 1
    HIGH = 2


class Crossed(enum.Enum):
    """Members whose values are names of others."""

    A = "B"
    B = "A"


class Opaque(enum.Enum):
    """Members whose values are no plain values."""

    LEFT = object()
    RIGHT = ("r", 1)


def nothing(*_: Any) -> Any:
    raise AssertionError


def example(  # type: ignore[no-untyped-def]
    number: int = 1,
    scale: float = 1.0,
    title: str = "x",
    switch: bool = False,
    tag: str | None = "x",
    width: Width = Width(1),
    share: Annotated[float, Meta(ge=0, le=1)] = 0.5,
    size: int | Literal["auto"] = "auto",
    choice: Literal[8, 16, "all", None] = 8,
    rate: float | int = 1,
    folder: Path = Path("x"),
    other: Path | None = None,
    mode: Mode = Mode.SLOW,
    level: Level | None = None,
    crossed: Crossed = Crossed.A,
    opaque: Opaque = Opaque.LEFT,
    cities: list[str] = [],
    files: list[Path] = [],
    modes: tuple[Mode, ...] = (),
    pair: tuple[int, str] = (1, "a"),
    grid: list[list[int]] = [],
    weights: dict[str, float] = {},
    sizes: Sequence[int] = (),
    paths: Mapping[int, list[Path]] = {},
    words: list[str] | None = None,
    one_or_more: str | list[str] = "x",
    decay: Schedule = cosine(),
    update: OptimizerSpec | None = None,
    anything: Any = None,
    unknown: object = None,
    hidden=8,
    dropout=0.1,
    flag=True,
    word="a",
    layers=(32, 64),
    names=["a"],
    untyped_mode=Mode.SLOW,
    untyped=None,
) -> Recipe:
    """Return a recipe whose function has a parameter of each kind."""
    return Recipe(
        name="example",
        model=nothing,
        data=nothing,
        loss=nothing,
        batch_size=256,
        lr=0.1,
        lr_batch_size=256,
        epochs=10,
    )


EXAMPLE = Reference(location="tests:example", function=example)

CASES: list[tuple[str, Any]] = [
    ("number=1_024", 1024),
    ("number=1e3", 1000),
    ("number=-3", -3),
    ("scale=.1", 0.1),
    ("scale=1.", 1.0),
    ("scale=+0.1", 0.1),
    ("scale=1e-05", 1e-05),
    ("title=New York", "New York"),
    ("title=12", "12"),
    ("title=[a, b]", "[a, b]"),
    ("title=", ""),
    ("switch=on", True),
    ("tag=none", None),
    ("tag=a,b", "a,b"),
    ("width=7", 7),
    ("share=1", 1.0),
    ("size=auto", "auto"),
    ("size=12", 12),
    ("choice=16", 16),
    ("choice=all", "all"),
    ("choice=none", None),
    ("rate=3", 3),
    ("rate=.5", 0.5),
    ("folder=/data/a b", Path("/data/a b")),
    ("folder=~/x", Path("~/x").expanduser()),
    ("other=none", None),
    ("other=none.txt", Path("none.txt")),
    ("mode=fast", Mode.FAST),
    ("mode=FAST", Mode.FAST),
    ("mode=Fast", Mode.FAST),
    ("level=2", Level.HIGH),
    ("level=high", Level.HIGH),
    ("level=none", None),
    ("crossed=A", Crossed.B),
    ("opaque=RIGHT", Opaque.RIGHT),
    ("cities=New York,Los Angeles", ["New York", "Los Angeles"]),
    ("cities=['Washington, D.C.', Paris]", ["Washington, D.C.", "Paris"]),
    ("cities=", []),
    ("cities=[]", []),
    ("files=a.txt,b.txt", [Path("a.txt"), Path("b.txt")]),
    ("modes=fast, slow", (Mode.FAST, Mode.SLOW)),
    ("pair=3,4", (3, "4")),
    ("grid=[1,2],[3]", [[1, 2], [3]]),
    ("grid=[[1,2],[3]]", [[1, 2], [3]]),
    ("weights=a: 1, b: .5", {"a": 1.0, "b": 0.5}),
    ('weights={"a": 1}', {"a": 1.0}),
    ("sizes=(1, 2)", [1, 2]),
    ("paths={1: [a, b], 2: [c]}", {1: [Path("a"), Path("b")], 2: [Path("c")]}),
    ("words=none", None),
    ("words=a", ["a"]),
    ("one_or_more=a", "a"),
    ("one_or_more=a,b", ["a", "b"]),
    ("decay=warmup(cosine(), fraction=.1)", warmup(cosine(), fraction=0.1)),
    ("update=adamw", adamw()),
    ("update=none", None),
    ("anything=12", 12),
    ("anything='12'", "12"),
    ("anything=yes", True),
    ("anything=2024-01-02", "2024-01-02"),
    ("anything=[1, {a: [b, 2.5]}]", [1, {"a": ["b", 2.5]}]),
    ("anything=Hello: world", "Hello: world"),
    ("unknown=1.5", 1.5),
    ("hidden=32", 32),
    ("dropout=.25", 0.25),
    ("flag=no", False),
    ("word=12", "12"),
    ("layers=8,16", (8, 16)),
    ("names=b,c d", ["b", "c d"]),
    ("untyped_mode=fast", Mode.FAST),
    ("untyped=32", 32),
    ("untyped=a b", "a b"),
]


def same(built: BuiltRecipe, name: str, value: Any) -> bool:
    """Return whether a parameter has a value of the same type, the types of its items included."""
    return repr(built.parameters[name]) == repr(value) and built.parameters[name] == value


@pytest.mark.parametrize(("argument", "value"), CASES)
def test_a_value_is_read_back_from_what_run_yaml_holds(argument: str, value: Any) -> None:
    """Planning, each rank and a resumption of the run call the function with the same value."""
    (override,) = read_arguments([argument])
    built = build(EXAMPLE, [override])
    assert same(built, override.name, value)
    of_rank = build(EXAMPLE, [pickle.loads(pickle.dumps(override))])
    assert same(of_rank, override.name, value)
    record = yaml.safe_load(yaml.safe_dump(dict(built.overrides)))
    resumed = build(
        EXAMPLE,
        [Override(name=name, value=item, source="run.yaml") for name, item in record.items()],
    )
    assert same(resumed, override.name, value)
    assert resumed.overrides == built.overrides


FROM_YAML: list[tuple[str, Any]] = [
    ("number: 1e3", 1000),
    ("scale: .1", 0.1),
    ("scale: 1", 1.0),
    ("folder: /data", Path("/data")),
    ("mode: fast", Mode.FAST),
    ("level: 2", Level.HIGH),
    ("cities: [New York, Los Angeles]", ["New York", "Los Angeles"]),
    ("files: [a.txt, b.txt]", [Path("a.txt"), Path("b.txt")]),
    ("grid: [[1, 2], [3]]", [[1, 2], [3]]),
    ("weights: {a: 1}", {"a": 1.0}),
    ("anything: '12'", "12"),
    ("anything: 12", 12),
    ("anything: 2024-01-02", "2024-01-02"),
    ("hidden: 32", 32),
    ("layers: [8, 16]", (8, 16)),
    ("untyped: 32", 32),
    ("untyped: [1, a]", [1, "a"]),
]


@pytest.mark.parametrize(("line", "value"), FROM_YAML)
def test_a_file_gives_the_same_value(tmp_path: Path, line: str, value: Any) -> None:
    """A YAML file gives a parameter the value that the command line gives it."""
    file = tmp_path / "values.yaml"
    file.write_text(line)
    assert same(build(EXAMPLE, read_yaml(file)), line.partition(":")[0], value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("number=1.5", "expected a whole number"),
        ("number=²", "expected a whole number"),
        ("number=" + "9" * 400, "limited to 2**63"),
        ("number=" + "9" * 9999, "characters left out"),
        ("scale=1e999", "expected a number"),
        ("scale=nan", "expected a number"),
        ("title=\udcff", "not valid UTF-8"),
        ("folder=", "expected a path"),
        ("folder=a\0b", "NUL"),
        ("folder=~nobody-of-this-name/x", "there is no user"),
        ("mode=fastest", "expected SLOW or FAST"),
        ("opaque=top", "expected LEFT or RIGHT"),
        ("files=a,\udcff", "not valid UTF-8"),
        ("pair=1", "a list of 2: a whole number, text"),
        ("pair=1,2,3", "the number of values is 3"),
        ("grid=[1,[2", "a closing ] is missing"),
        ("weights=a", "`key: value`"),
        ("weights=a: 1, a: 2", "a key is given twice"),
        ("anything=" + "[" * 3000 + "]" * 3000, "nested too deep"),
        ("anything=2024-02-31", "date that does not exist"),
        ("anything=.inf", "not a finite number"),
        ("hidden=.5", "expected a whole number"),
        ("decay=one_cycle(one_cycle())", "expected a number greater than 0"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(argument: str, message: str) -> None:
    """A value that does not fit is one error, with the parameter and a text of bounded length."""
    with pytest.raises(OverrideError) as caught:
        build(EXAMPLE, read_arguments([argument]))
    assert str(caught.value).startswith(argument.partition("=")[0])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "value", [pytest.param(10**5000, id="huge"), float("inf"), {1: {2}}, object(), b"x", [object()]]
)
def test_a_value_of_python_that_is_not_plain_is_refused(value: Any) -> None:
    """What run.yaml could not hold is refused before a run starts."""
    with pytest.raises(OverrideError, match=r"^anything="):
        build(EXAMPLE, [Override(name="anything", value=value, source="Python")])


@pytest.mark.parametrize(
    "name", ["device_type", "amount", "when", "callback", "args", "kwargs", "first"]
)
def test_a_parameter_of_another_type_is_refused_by_name(name: str) -> None:
    """One message names a parameter that no text stands for; its default still works."""

    def function(  # type: ignore[no-untyped-def]
        first: int = 0,
        /,
        *args: int,
        device_type: complex = 0j,
        amount: Decimal | None = None,
        when: set[int] | None = None,
        callback=print,
        **kwargs: int,
    ) -> Recipe:
        return example()

    reference = Reference(location="tests:function", function=function)
    build(reference)
    with pytest.raises(OverrideError) as caught:
        build(reference, read_arguments([f"{name}=1"]))
    assert name in str(caught.value)
