"""The decisions of the launcher that holds the meeting: who takes part in a round, and when.

A run that restarts goes through rounds. In each, some of the launchers in the meeting start their
ranks; the others are spares. When a rank fails or a launcher disappears, the round is over: all end
their ranks, and the next round starts from the newest checkpoint with those that are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from launcher.engine.ranks.round_messages import (
    Done,
    End,
    FolderMade,
    Hello,
    Message,
    Over,
    RanksFailed,
    Ready,
    Roster,
    Standing,
    Start,
    Successor,
    Welcome,
)
from launcher.errors import EXIT_FAILED, EXIT_USAGE, EXIT_WITHOUT
from launcher.runs.job import Cause, Loss

FAILURES_TO_LEAVE_OUT = 2
"""After so many failures a node is left out, if the others are enough."""

_NUM_SUCCESSORS = 8
"""Launchers that can become the host; with few, messages stay short in large runs."""

_LAST_CALL_SECONDS = 30.0
"""How long a first round that could start waits for another launcher after the last one came."""

_SECONDS_FOR_SPARES = 5.0
"""How long a first round that has all of its nodes waits for spares, so that the last ones of the
launchers are the spares."""

_SECONDS_TO_GET_READY = 60.0
"""How long a launcher may take to end its ranks before the others go on without it."""

_SECONDS_BETWEEN_LOOKS = 1.0
"""Interval of the looks for a new checkpoint while a launcher waits to join."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the rounds of a run may be."""

    low: int
    """The smallest number of nodes."""

    high: int
    """The largest number of nodes; further launchers are spares."""

    launchers: int
    """Launchers that are started; a first round waits for them."""

    max_restarts: int
    """How many rounds may fail and be followed by another."""

    join_timeout: float
    """Seconds within which a first round has to start."""


@dataclass
class _Seat:
    name: str
    host: str
    port: int
    state: Literal["ready", "training", "ending", "done"] = "ready"
    index: int = 0


@dataclass(kw_only=True)
class RoundHost:
    """The state of a meeting. It does no input or output, and reads no clock of its own.

    Whoever holds the meeting passes what happens, calls `advance` often, and sends the messages
    that it finds in `outbox`, those to its own seat included.
    """

    own: int
    """The host's own seat."""

    terms: Terms
    agreement: dict[str, object]
    """Values that every launcher must have."""

    open_store: Callable[[], int]
    """Opens the store of a new round, and returns its port."""

    newest: Callable[[], int | None]
    """Returns the step of the newest checkpoint; None if there is none."""

    standing: Standing = field(default_factory=Standing)
    loss: Loss | None = None
    """How the last round ended."""

    folder: str | None = None
    """The run folder, once it is known."""

    outbox: list[tuple[int, Message]] = field(default_factory=list)
    ended: End | None = None
    """Set when the run is over."""

    timed_out: bool = False
    """Whether too few launchers came in time."""

    mismatch: str = ""
    """How a launcher differs that wanted to join before the first round."""

    is_running: bool = False
    """Whether ranks train."""

    hands_over: bool = False
    """Whether the host's own node is to be left out, so that a successor holds the meeting."""

    _seats: dict[int, _Seat] = field(default_factory=dict)
    _deadline: float | None = None
    _last_joined: float = 0.0
    _waits: bool = True
    """Whether launchers that have not joined are waited for."""

    _names: set[str] = field(default_factory=set)
    _next_seat: int = 0
    _has_changed: bool = False
    """Whether launchers have come or gone since the roster was sent."""

    _next_look: float = 0.0
    _step_before: int | None = None

    @property
    def missing(self) -> list[int]:
        """The seats, of those that are started, that nobody has taken."""
        return [seat for seat in range(self.terms.launchers) if seat not in self._seats]

    @property
    def is_complete(self) -> bool:
        """Whether every launcher of the round has finished, or is lost."""
        return all(seat.state in ("done", "ready") for seat in self._seats.values())

    def take_over(self, roster: Roster, loss: Loss) -> None:
        """Continue the meeting of a host that has been lost.

        Args:
            roster: The last roster that the lost host has sent.
            loss: The loss of the host, or the failure after which it has left.
        """
        self.standing = roster.standing
        self._next_seat = roster.next_seat
        self._count(loss, gone=True)
        self.loss = loss
        standing = self.standing
        is_often = standing.failures.get(loss.node, 0) >= FAILURES_TO_LEAVE_OUT
        if is_often and loss.node not in standing.left_out:
            left_out = (*standing.left_out, loss.node)
            self.standing = msgspec.structs.replace(standing, left_out=left_out)

    def join(self, seat: int | None, hello: Hello, host: str, now: float) -> int | None:
        """Give a launcher a seat; return it, or None if the launcher is refused.

        Args:
            seat: The seat that it has asked for; None takes the next one.
            hello: What it has sent.
            host: Its address.
            now: The time, in seconds of any clock.
        """
        seat = self._next_seat if seat is None else seat
        self._next_seat = max(self._next_seat, seat + 1)
        refusal = self._refusal(hello)
        if refusal is not None:
            self.outbox.append((seat, refusal))
            return None
        if seat in self._seats:  # the launcher was started again before its loss was noticed
            self.lose(seat)
        is_taken = hello.name in self._names  # by another launcher on the same machine
        name = f"{hello.name} ({seat})" if is_taken else hello.name
        self._names.add(name)
        self._seats[seat] = _Seat(name, host, hello.port)
        self._last_joined = now
        welcome = Welcome(seat=seat, name=name, host=self._seats[self.own].name)
        self.outbox.append((seat, welcome))
        if self.folder is not None:
            self.outbox.append((seat, FolderMade(path=self.folder)))
        self._step_before = self.newest()
        self._has_changed = True
        return seat

    def receive(self, seat: int, message: Message) -> None:
        """Take a message from a launcher."""
        if seat not in self._seats:
            return
        taken = self._seats[seat]
        if isinstance(message, Ready):
            if message.round < self.standing.round:
                return
            if taken.state == "training":  # its ranks could not start
                self._end_round(taken, "rank", EXIT_FAILED)
            taken.state = "ready"
        elif isinstance(message, Done):
            taken.state = "done"
        elif isinstance(message, RanksFailed):
            is_current = taken.state == "training" and message.round == self.standing.round
            taken.state = "ending"
            if is_current:
                self._end_round(taken, message.cause, message.exit_code)

    def lose(self, seat: int) -> None:
        """Take note that the connection to a launcher has ended."""
        lost = self._remove(seat)
        self._has_changed = True
        if lost is not None and lost.state == "training":
            self._end_round(lost, "node", None)

    def announce_folder(self, path: str) -> None:
        """Tell all launchers, also those that join later, which folder the run has."""
        self.folder = path
        self._send_all(FolderMade(path=path))

    def end(self, end: End) -> None:
        """End the meeting, unless it has ended."""
        if self.ended is None:
            self.ended, self.is_running = end, False
            self._send_all(end)

    def advance(self, now: float) -> None:
        """Start a round if it is time."""
        if self.ended is not None or self.timed_out or self.hands_over:
            return
        if self.is_running:
            if self._has_changed:
                self._has_changed = False
                self._send_all(self._roster())
            self._look_for_growth(now)
            return
        if self._deadline is None:
            patience = self.terms.join_timeout if self._waits else _SECONDS_TO_GET_READY
            self._deadline = now + patience
        is_late = now > self._deadline
        if is_late:
            self._drop_those_that_end()
        if any(seat.state != "ready" for seat in self._seats.values()):
            return
        if self._has_enough(now, is_late=is_late):
            self._start_round()
        elif is_late or not self._waits:
            if self.loss is not None:
                self._end_for_lack_of_nodes()
            self.timed_out = self.loss is None

    def _has_enough(self, now: float, *, is_late: bool) -> bool:
        """Return whether the launchers that are here start a round without waiting for others."""
        count = len(self._seats)
        if not self._waits:
            return count >= self.terms.low
        if count >= max(self.terms.low, self.terms.launchers):
            return True
        patience = _LAST_CALL_SECONDS if count < self.terms.high else _SECONDS_FOR_SPARES
        return count >= self.terms.low and (is_late or now > self._last_joined + patience)

    def _remove(self, seat: int) -> _Seat | None:
        removed = self._seats.pop(seat, None)
        if removed is not None:
            self._names.discard(removed.name)
        return removed

    def _refusal(self, hello: Hello) -> End | None:
        if self.ended is not None:
            return self.ended
        if hello.name in self.standing.left_out:
            return end_without(hello.name)
        for key, value in self.agreement.items():
            if hello.agreement.get(key) != value:
                text = f"the same {key}: {{first}} has {value}, {hello.name} has "
                text += f"{hello.agreement.get(key)}"
                if self.standing.round == 0:
                    self.mismatch = text
                return End(exit_code=EXIT_USAGE, node=hello.name, reason=text)
        return None

    def _start_round(self) -> None:
        self._waits, self._deadline, self.is_running = False, None, True
        self.standing = msgspec.structs.replace(self.standing, round=self.standing.round + 1)
        port, step = self.open_store(), self.newest()
        self._has_changed = False
        order, roster = self._order(), self._roster()
        members = order[: self.terms.high]
        for place, seat in enumerate(order):
            is_member = place < len(members)
            if is_member:
                self._seats[seat].state, self._seats[seat].index = "training", place
            start = Start(
                index=place if is_member else None,
                count=len(members),
                port=port,
                resumes=step is not None,
                roster=roster,
                loss=self.loss,
            )
            self.outbox.append((seat, start))

    def _order(self) -> list[int]:
        """Return the seats, the host's first."""
        return sorted(self._seats, key=lambda seat: (seat != self.own, seat))

    def _roster(self) -> Roster:
        return Roster(
            standing=self.standing,
            launchers=len(self._seats),
            next_seat=self._next_seat,
            successors=tuple(
                Successor(seat=seat, name=taken.name, host=taken.host, port=taken.port)
                for seat in self._order()[1 : 1 + _NUM_SUCCESSORS]
                for taken in [self._seats[seat]]
            ),
        )

    def _end_round(
        self,
        failed: _Seat,
        cause: Cause,
        exit_code: int | None,
    ) -> None:
        own = self._seats.get(self.own)
        if not self.is_running or (own is not None and own.state == "done" and cause == "node"):
            return  # rank 0 has written the end of the run
        self.is_running = False
        self.loss = Loss(
            node=failed.name,
            cause=cause,
            exit_code=exit_code,
            index=failed.index,
            time=time.time(),
        )
        if any(seat.state == "done" for seat in self._seats.values()):
            self.end(End(exit_code=exit_code, node=failed.name))
            return
        for seat, taken in self._seats.items():
            if taken.state == "training":
                taken.state = "ending"
                self.outbox.append((seat, Over(round=self.standing.round, loss=self.loss)))
        if cause != "joined":
            self._count(self.loss, gone=cause in ("node", "health"))
        self._deadline = None

    def _count(self, loss: Loss, *, gone: bool) -> None:
        """Count a failure, and end the run if it may not go on.

        Args:
            loss: The failure.
            gone: Whether its node is no longer in the meeting.
        """
        standing = self.standing
        failures = {**standing.failures, loss.node: standing.failures.get(loss.node, 0) + 1}
        restarts = standing.restarts + 1
        if loss.exit_code == EXIT_USAGE or restarts > self.terms.max_restarts:
            self.end(End(exit_code=loss.exit_code, node=loss.node))
            return
        left_out = standing.left_out
        others = sum(seat.name != loss.node for seat in self._seats.values())
        is_own = any(s.name == loss.node and n == self.own for n, s in self._seats.items())
        failed_often = failures[loss.node] >= FAILURES_TO_LEAVE_OUT and others >= self.terms.low
        if failed_often and is_own:
            self._hand_over(loss)
            return
        if (failed_often or loss.cause == "health") and loss.node not in left_out:
            left_out = (*left_out, loss.node)
        self.standing = Standing(
            round=standing.round, restarts=restarts, failures=failures, left_out=left_out
        )
        for seat, taken in list(self._seats.items()):
            if taken.name in left_out and not gone and seat != self.own:
                self.outbox.append((seat, end_without(taken.name)))
                self._remove(seat)

    def _hand_over(self, loss: Loss) -> None:
        """Leave the host's own node out: all others learn how the round has ended.

        The host counts nothing more. The successor counts this failure, as that of a lost host.
        """
        self.hands_over = True
        over = Over(round=self.standing.round, loss=loss)
        self.outbox += [
            (seat, over) for seat, taken in self._seats.items() if taken.state == "ready"
        ]

    def _look_for_growth(self, now: float) -> None:
        """End the round after the next checkpoint if a launcher waits that it has room for."""
        waiting = [seat for seat in self._seats.values() if seat.state == "ready"]
        has_room = len(self._seats) - len(waiting) < self.terms.high
        has_finished = any(seat.state == "done" for seat in self._seats.values())
        if not waiting or not has_room or has_finished or now < self._next_look:
            return
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        step = self.newest()
        if step is not None and step > (self._step_before or 0):
            self._end_round(waiting[0], "joined", None)

    def _drop_those_that_end(self) -> None:
        for seat, taken in list(self._seats.items()):
            if taken.state != "ready" and seat != self.own:
                late = f"its ranks within {_SECONDS_TO_GET_READY:.0f} s, and the others do not wait"
                reason = f"{taken.name} has not ended {late} for it"
                end = End(exit_code=EXIT_WITHOUT, node=taken.name, reason=reason)
                self.outbox.append((seat, end))
                self._remove(seat)

    def _end_for_lack_of_nodes(self) -> None:
        loss = self.loss
        assert loss is not None
        reason = f"{len(self._seats)} of at least {self.terms.low} nodes are left"
        self.end(End(exit_code=loss.exit_code, node=loss.node, reason=reason))

    def _send_all(self, message: Message) -> None:
        self.outbox += [(seat, message) for seat in self._seats]


def end_without(name: str) -> End:
    """Return the message that tells a launcher that the run goes on without its node."""
    reason = f"{name} has failed {FAILURES_TO_LEAVE_OUT} times, and the run goes on without it"
    return End(exit_code=EXIT_WITHOUT, node=name, reason=reason)
