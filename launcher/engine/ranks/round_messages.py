"""What the launchers of a run that restarts tell each other, as lines of JSON.

A launcher that joins (a guest) and the one that holds the meeting (the host) exchange:

    guest                              host
    Hello        joins                 Welcome     has been given a seat
    Ready        has ended its ranks   Roster      who is in the meeting
    RanksFailed  its ranks failed      Start       a round begins; spares get no index
    Done         its ranks are done    FolderMade  the run folder
                                       Over        the round is over; end the ranks, get ready
                                       End         leave the meeting
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from launcher.runs.job import Cause, Loss

MAX_LINE_BYTES = 1 << 16
"""Largest message; a connection that sends more is closed."""


class Standing(Struct, frozen=True, kw_only=True):
    """What a new host has to know of the rounds before."""

    round: int = 0
    """Number of rounds that have started."""

    restarts: int = 0
    """Restarts that count against `--max-restarts`."""

    failures: dict[str, int] = {}
    """Failures of each node, by its name."""

    left_out: tuple[str, ...] = ()
    """Names of nodes that take no further part."""


class Successor(Struct, frozen=True, kw_only=True):
    """A launcher that can hold the meeting after the present host."""

    seat: int
    name: str
    host: str
    """Its address, as the present host sees it."""

    port: int


class Hello(Struct, tag=True, frozen=True, kw_only=True):
    """A launcher joins."""

    name: str
    """Name of its node."""

    port: int
    """The port at which it can hold the meeting."""

    agreement: dict[str, Any]
    """Values that have to be equal on all nodes."""

    seat: int | None = None
    """Its place among the launchers; None takes the next one that is free."""


class Ready(Struct, tag=True, frozen=True, kw_only=True):
    """No rank of this launcher runs any more, and it can start others."""

    round: int
    """The round in which they ran."""


class RanksFailed(Struct, tag=True, frozen=True, kw_only=True):
    """The ranks of this launcher have failed, or its node is not fit."""

    round: int
    exit_code: int
    cause: Cause = "rank"


class Done(Struct, tag=True, frozen=True, kw_only=True):
    """The ranks of this launcher have finished, or have stopped with a checkpoint."""

    exit_code: int


class Welcome(Struct, tag=True, frozen=True, kw_only=True):
    """The guest has a seat."""

    seat: int
    name: str = ""
    """Name of the guest's node, which no other launcher has."""

    host: str = ""
    """Name of the host's node."""


class Roster(Struct, tag=True, frozen=True, kw_only=True):
    """Who is in the meeting."""

    standing: Standing
    successors: tuple[Successor, ...]
    launchers: int
    """Launchers in the meeting, spares and the host included."""

    next_seat: int
    """The seat of the next launcher that comes without one."""


class Start(Struct, tag=True, frozen=True, kw_only=True):
    """A round begins."""

    index: int | None
    """Index of the guest's node in the round; None if it is a spare."""

    count: int
    """Number of nodes in the round."""

    port: int
    """Port of the round's store on the host."""

    resumes: bool
    """Whether there is a checkpoint to resume from."""

    roster: Roster
    loss: Loss | None = None
    """How the round before ended; None for the first."""

    @property
    def number(self) -> int:
        """Number of the round, counted from 1."""
        return self.roster.standing.round


class Over(Struct, tag=True, frozen=True, kw_only=True):
    """A round is over."""

    round: int
    loss: Loss


class FolderMade(Struct, tag=True, frozen=True, kw_only=True):
    """The run folder."""

    path: str


class End(Struct, tag=True, frozen=True, kw_only=True):
    """The guest leaves the meeting."""

    exit_code: int | None
    """Exit code of the run; None if a lost node has ended it."""

    node: str = ""
    """Name of the node that has ended the run; empty if it has finished."""

    reason: str = ""
    """Why, for the user of a run that ends early; may be empty."""


Message = Hello | Ready | RanksFailed | Done | Welcome | Roster | Start | Over | FolderMade | End
"""A line between two launchers."""

_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message as one line."""
    return _ENCODER.encode(message) + b"\n"


def decode(line: bytes) -> Message:
    """Return the message in a line.

    Raises:
        ValueError: The line is no message.
    """
    return _DECODER.decode(line)
