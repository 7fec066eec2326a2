"""The meeting of the launchers of a run that restarts, as one of them takes part in it.

The launcher of the first node holds the meeting and is its host; the others are connected to it as
guests. If the host is lost, the first of its successors becomes the host, and the others connect to
that one. `launcher.engine.ranks.held_meeting` has the connections of the host.
"""

from __future__ import annotations

import contextlib
import platform
import selectors
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from launcher.engine.ranks.held_meeting import HeldMeeting
from launcher.engine.ranks.lifelines import Lifeline, connect, listen
from launcher.engine.ranks.rendezvous import SAME_COMMAND, can_resolve, is_this_machine
from launcher.engine.ranks.round_host import RoundHost, Terms, end_without
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
    Start,
    Successor,
    Welcome,
)
from launcher.environment.nodes import Nodes
from launcher.errors import EXIT_RESUMABLE, PeerError, WorldError
from launcher.runs.job import Cause, Loss

_POLL_SECONDS = 0.1
_SECONDS_BETWEEN_MESSAGES = 15.0
"""Interval of the messages that name the nodes that have not arrived."""

_SECONDS_TO_ANSWER = 120.0
"""How long a launcher whose ranks have ended waits for the host, which may take half as long for
the others, before it counts the host as lost: its process may be stopped."""

_SECONDS_TO_LEAVE = 6.0
"""How long the host waits for the guests to leave before it does."""


class MeetingEndedError(Exception):
    """The run has ended, or goes on without this launcher.

    Args:
        end: What the host has said.
    """

    def __init__(self, end: End) -> None:
        super().__init__(end.reason)
        self.end = end


class Meeting:
    """The place of this launcher in the meeting of all launchers of a run.

    Args:
        nodes: The nodes, and the address at which they meet.
        agreement: Values that must be the same on every node, by the names that messages use.
        max_restarts: How many rounds may fail and be followed by another.
        open_store: Opens the store of a new round on this node, and returns its port.
        newest: Returns the step of the newest checkpoint in a run folder; None if there is none.
        report: Called with messages for the user.
        seconds_to_answer: How long this launcher waits for the host after a round.

    Raises:
        WorldError: The first node cannot be reached or cannot listen.
    """

    def __init__(
        self,
        nodes: Nodes,
        agreement: Mapping[str, Any],
        *,
        max_restarts: int,
        open_store: Callable[[], int],
        newest: Callable[[str], int | None],
        report: Callable[[str], None],
        seconds_to_answer: float = _SECONDS_TO_ANSWER,
    ) -> None:
        index = nodes.index
        self.name = platform.node()
        if index is not None and index < len(nodes.names):
            self.name = nodes.names[index].rpartition("@")[2]
        self.nodes, self._agreement, self._report = nodes, dict(agreement), report
        self._open_store, self._newest = open_store, newest
        self._seconds_to_answer = seconds_to_answer
        self._terms = Terms(
            low=nodes.min_count or nodes.count,
            high=nodes.count,
            launchers=nodes.launchers,
            max_restarts=max_restarts,
            join_timeout=nodes.join_timeout,
        )
        self._selector = selectors.DefaultSelector()
        self._inbox: list[Message] = []
        self._held: HeldMeeting | None = None
        """The meeting, if this launcher is its host."""

        self._to_host: Lifeline | None = None
        self._seat = nodes.index
        self._start: Start | None = None
        """The last message that a round starts."""

        self._roster: Roster | None = None
        """Who was in the meeting last."""

        self._successors: list[Successor] = []
        """Those that may hold the meeting after the present host, the next one first."""

        self._welcome_deadline: float | None = None
        """When a successor that does not answer is given up."""

        self._start_deadline = 0.0
        """When the host is given up that starts no round."""

        self._over: Loss | None = None
        """How the present round has ended; None while it goes on."""

        self._end: End | None = None
        self._is_done = self._is_closed = self._was_host = False
        self._is_welcome = False
        """Whether this launcher has a seat in the meeting."""

        self.has_held = False
        """Whether this launcher has been the host."""

        self.folder: str | None = None
        """The run folder, once it is known."""

        self.host_address = self.host_name = nodes.host
        """Address and name of the host's node."""

        self._join()

    @property
    def is_host(self) -> bool:
        """Whether this launcher holds the meeting, or did when it left it."""
        return self._was_host if self._is_closed else self._held is not None

    @property
    def _host(self) -> RoundHost | None:
        return None if self._held is None else self._held.host

    @property
    def _is_spare(self) -> bool:
        waits = self._start is None or self._start.index is None
        return waits and self._roster is not None and self._host is None

    def next_round(self, is_stopped: Callable[[], bool] = lambda: False) -> Start:
        """Wait until this launcher takes part in a round.

        Args:
            is_stopped: Returns whether this launcher is asked to stop. One that waits for the
                first round ends the run, as it can be resumed; a spare leaves; another starts its
                ranks, which then save a checkpoint.

        Raises:
            MeetingEndedError: The run has ended, or goes on without this launcher.
            WorldError: Too few launchers come in time, or one of them runs something else.
            PeerError: The host is lost, and no successor can be reached.
        """
        before = self._start
        self._hand_over()
        if self._end is not None:
            raise MeetingEndedError(self._end)
        if before is not None and before.index is not None:
            self._send(Ready(round=before.number))
        message_at = time.monotonic() + _SECONDS_BETWEEN_MESSAGES
        self._start_deadline = time.monotonic() + self._seconds_to_answer
        while self._start is before or self._start is None or self._start.index is None:
            self._poll(_POLL_SECONDS)
            if self._end is not None:
                raise MeetingEndedError(self._end)
            if is_stopped():
                self._stop_waiting()
            if self._is_left_waiting(before):
                self._leave_host()
            if self._host is None and self._to_host is None:
                self._find_host()
            if self._host is not None:
                self._check_arrivals(self._host)
                if time.monotonic() > message_at and not self._host.is_running:
                    message_at += _SECONDS_BETWEEN_MESSAGES
                    self._report(f"launcher: waiting for {self._missing(self._host)}")
        return self._start

    def check(self) -> None:
        """Take what has arrived, without waiting.

        Raises:
            PeerError: The present round is over.
        """
        self._poll(0)
        if self._end is not None and self._end.node:
            raise PeerError(self._end.node, self._end.exit_code)
        if self._over is not None:
            raise PeerError(self._over.node, self._over.exit_code)

    def wait_for_folder(self) -> str:
        """Wait until the host has told the run folder, and return it.

        Raises:
            PeerError: The present round is over.
        """
        while self.folder is None:
            self.check()
            if self.folder is None:
                self._poll(_POLL_SECONDS)
        return self.folder

    def announce_folder(self, path: str) -> None:
        """Tell all launchers which folder the run has, as the host."""
        assert self._host is not None
        self.folder = path
        self._host.announce_folder(path)
        self._poll(0)

    def fail(self, exit_code: int, cause: Cause = "rank") -> None:
        """Tell the others that the ranks of this node have failed, or that it is not fit."""
        assert self._start is not None
        number = self._start.number
        self._send(RanksFailed(round=number, exit_code=exit_code, cause=cause))
        self._poll(0)

    def end(self, exit_code: int) -> None:
        """Tell the others that nothing can be started on this node, so that the run ends."""
        if self._host is not None:
            self._host.end(End(exit_code=exit_code, node=self.name))
        elif self._start is not None:
            self.fail(exit_code)

    def finish(self, exit_code: int) -> None:
        """Leave the meeting after the ranks of this node have finished or stopped.

        The host leaves last, when all others of the round have finished as well.

        Raises:
            PeerError: Another node has failed meanwhile.
        """
        self._is_done = True
        self._send(Done(exit_code=exit_code))
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        while self._end is None and time.monotonic() < deadline:
            self._poll(_POLL_SECONDS / 2)
            if self._host is None and self._to_host is None:
                return  # the host has finished before
            if self._host is not None and self._host.is_complete:
                break
        if self._host is not None:
            self._host.end(End(exit_code=exit_code))
        self.leave()
        if self._end is not None and self._end.node:
            raise PeerError(self._end.node, self._end.exit_code)

    def leave(self) -> None:
        """Close the connections; the host first waits until the guests have theirs closed."""
        if self._held is not None and self._held.host.ended is not None and not self._is_closed:
            deadline = time.monotonic() + _SECONDS_TO_LEAVE
            self._poll(0)
            while self._held.has_guests and time.monotonic() < deadline:
                self._poll(_POLL_SECONDS / 2)
        self.close()

    def close(self) -> None:
        """Close all connections at once."""
        if self._is_closed:
            return
        self._is_closed, self._was_host = True, self._held is not None
        for each in (self._held, self._to_host, self._listener, self._selector):
            if each is not None:
                each.close()
        self._to_host = self._held = None

    def _join(self) -> None:
        """Hold the meeting, or connect to the launcher that does.

        Raises:
            WorldError: That launcher cannot be reached in time, or the port cannot be opened here.
        """
        nodes = self.nodes
        self._deadline = time.monotonic() + nodes.join_timeout
        if nodes.index == 0:  # the name may be published after this process has started
            self._wait_until(lambda: can_resolve(nodes.host), f"the name {nodes.host}")
        if nodes.index == 0 if nodes.index is not None else is_this_machine(nodes.host):
            try:
                self._listener = listen(nodes.port)
            except OSError as error:
                if nodes.index is not None:
                    raise WorldError(
                        f"Cannot listen on port {nodes.port} of {platform.node()} for the other "
                        f"nodes: {error.strerror}"
                    ) from None
                # Another launcher on this machine opened the port first and holds the meeting.
            else:
                self._hold(0, self._terms)
                return
        self._listener = listen()

        def connected() -> bool:
            self._to_host = connect(nodes.host, nodes.port, nodes.node_timeout)
            return self._to_host is not None

        self._wait_until(connected, f"{nodes.host}:{nodes.port}")
        self._greet()

    def _hold(self, seat: int, terms: Terms) -> HeldMeeting:
        self._seat, self.has_held = seat, True
        host = RoundHost(
            own=seat,
            terms=terms,
            agreement=self._agreement,
            open_store=self._open_store,
            newest=self._newest_step,
            folder=self.folder,
        )
        host.join(seat, self._hello(), self.host_address, time.monotonic())
        self._held = HeldMeeting(host, seat, self._selector, self.nodes.node_timeout)
        self._held.listen(self._listener)
        return self._held

    def _newest_step(self) -> int | None:
        return None if self.folder is None else self._newest(self.folder)

    def _hello(self) -> Hello:
        return Hello(
            name=self.name,
            port=self._listener.getsockname()[1],
            agreement=self._agreement,
            seat=self._seat,
        )

    def _greet(self) -> None:
        assert self._to_host is not None
        self._selector.register(self._to_host, selectors.EVENT_READ, self._to_host)
        self._to_host.send(self._hello())

    def _stop_waiting(self) -> None:
        """Leave the meeting if this launcher need not take part in a round.

        Raises:
            MeetingEndedError: It is a spare, or no round has started.
        """
        if self._is_spare:
            raise MeetingEndedError(End(exit_code=0))
        if self._start is None:
            end = End(exit_code=EXIT_RESUMABLE)
            if self._host is not None:
                self._host.end(end)
            raise MeetingEndedError(end)

    def _is_left_waiting(self, before: Start | None) -> bool:
        """Return whether the host lets this launcher wait for too long.

        Args:
            before: The last round; ranks of this launcher have run in it if it has an index there.
        """
        now = time.monotonic()
        if self._welcome_deadline is not None and now > self._welcome_deadline:
            return True
        is_member = before is not None and before.index is not None
        return is_member and self._host is None and now > self._start_deadline

    def _connect_again(self) -> None:
        """Connect to the first node once more: what was there was not the meeting.

        The launcher of an earlier run may still be leaving at the same address.

        Raises:
            WorldError: The deadline passes.
        """
        where = f"{self.nodes.host}:{self.nodes.port}"
        if time.monotonic() > self._deadline:
            raise WorldError(self._late_text(where))
        time.sleep(_POLL_SECONDS)
        self._over = None
        self._to_host = connect(self.nodes.host, self.nodes.port, self.nodes.node_timeout)
        if self._to_host is not None:
            self._greet()

    def _find_host(self) -> None:
        """Become the host in place of the one that is lost, or connect to the one that does.

        Raises:
            PeerError: No successor can be reached.
            WorldError: There is no meeting at the rendezvous address.
        """
        if not self._is_welcome:
            self._connect_again()
            return
        self._start_deadline = time.monotonic() + self._seconds_to_answer
        roster, lost = self._roster, self._over or self._loss_of_host()
        while self._successors and roster is not None:
            successor = self._successors.pop(0)
            if successor.seat == self._seat:
                self._succeed(successor, roster, lost)
                return
            link = connect(successor.host, successor.port, self.nodes.node_timeout)
            if link is not None:
                self._to_host, self.host_address = link, successor.host
                self._welcome_deadline = time.monotonic() + 2 * self.nodes.node_timeout
                self._greet()
                return
        raise PeerError(lost.node, None)

    def _hand_over(self) -> None:
        """Leave the meeting to a successor if this launcher holds it and is to be left out."""
        if self._held is None or not self._held.host.hands_over:
            return
        self._poll(0)
        self._end = end_without(self.name)
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        while not self._held.flush():
            if time.monotonic() > deadline:
                break
            self._poll(_POLL_SECONDS / 2)
        self.close()
        self._was_host = False

    def _leave_host(self) -> None:
        """Give up a launcher that does not hold the meeting: it has not lost the host."""
        self._welcome_deadline = None
        if self._to_host is not None:
            self._selector.unregister(self._to_host)
            self._to_host.close()
            self._to_host = None

    def _succeed(self, own: Successor, roster: Roster, lost: Loss) -> None:
        self.host_address = own.host
        grace = 2 * self.nodes.node_timeout
        terms = replace(self._terms, launchers=roster.launchers - 1, join_timeout=grace)
        held = self._hold(own.seat, terms)
        held.host.take_over(roster, lost)
        with contextlib.suppress(OSError):  # where another launcher may look for the meeting
            held.listen(listen(self.nodes.port))

    def _loss_of_host(self) -> Loss:
        return Loss(node=self.host_name, cause="node", time=time.time())

    def _wait_until(self, is_done: Callable[[], bool], what: str) -> None:
        """Poll until `is_done` returns True; Python handles Ctrl-C between the polls.

        Raises:
            WorldError: The deadline passes.
        """
        message_at = time.monotonic() + _SECONDS_BETWEEN_MESSAGES
        while not is_done():
            if time.monotonic() > self._deadline:
                raise WorldError(self._late_text(what))
            if time.monotonic() > message_at:
                message_at += _SECONDS_BETWEEN_MESSAGES
                self._report(f"launcher: waiting for {what}")
            time.sleep(_POLL_SECONDS)

    def _late_text(self, missing: str) -> str:
        return (
            f"Waited {self.nodes.join_timeout:.0f} s for {missing} to join this run of "
            f"{self.nodes.launchers} launchers. Check that every node was started and can be "
            f"reached from {platform.node()}, or give a longer --join-timeout."
        )

    def _missing(self, host: RoundHost) -> str:
        names = [self.nodes.names[seat] for seat in host.missing if seat < len(self.nodes.names)]
        return ", ".join(names) or f"{len(host.missing)} of {self.nodes.launchers} nodes"

    def _check_arrivals(self, host: RoundHost) -> None:
        text = ""
        if host.mismatch:
            text = (
                f"The nodes of a run need {host.mismatch.format(first=self.name)}. {SAME_COMMAND}"
            )
        elif host.timed_out:
            text = self._late_text(self._missing(host))
        if text:
            host.end(End(exit_code=WorldError.exit_code, node=self.name, reason=text))
            self.leave()
            raise WorldError(text)

    def _send(self, message: Message) -> None:
        """Send a message to the host, which may be this launcher."""
        if self._host is not None:
            assert self._seat is not None
            self._host.receive(self._seat, message)
        elif self._to_host is not None:
            self._to_host.send(message)

    def _poll(self, timeout: float) -> None:
        """Handle all that has arrived; wait for it up to `timeout` seconds."""
        if self._held is not None:
            self._advance(self._held)
        for key, _ in self._selector.select(0 if self._inbox else timeout):
            if key.data is self._to_host and self._to_host is not None:
                self._read_host(self._to_host)
            elif self._held is not None:
                self._held.handle(key.data)
        if self._held is not None:
            self._advance(self._held)
        elif self._to_host is not None:
            self._to_host.flush()
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            self._take(message)

    def _read_host(self, link: Lifeline) -> None:
        self._inbox += link.receive()
        if not link.is_open:
            self._selector.unregister(link)
            link.close()
            self._to_host = None
            if self._over is None and self._end is None and not self._is_done:
                self._over = self._loss_of_host()

    def _advance(self, held: HeldMeeting) -> None:
        self._inbox += held.advance()
        if held.host.ended is not None and self._end is None:
            self._end = held.host.ended

    def _take(self, message: Message) -> None:
        match message:
            case Start():
                self._start = message
                self._take(message.roster)
                if message.index is not None:
                    self._over = None
            case Roster():
                self._roster, self._successors = message, list(message.successors)
            case Over():
                self._over = message.loss
            case Welcome():
                self._seat, self._welcome_deadline, self._is_welcome = message.seat, None, True
                self.host_name, self.name = message.host, message.name
            case FolderMade():
                self.folder = message.path
            case End():
                self._end = message
