"""The meeting of the launchers of a run that restarts: its connections, and who holds it.

The launcher of the first node holds the meeting and is its host; the others are connected to it as
guests. If the host is lost, the first of its successors becomes the host, and the others connect to
that one. `launcher.engine.ranks.round_host` has the decisions of the host.
"""

from __future__ import annotations

import contextlib
import platform
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from launcher.engine.ranks.lifelines import Lifeline, accept, connect, listen
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

_OWN, _PUBLIC = -1, -2
"""The keys of the listeners among the sockets: that of this launcher, and the one at the rendezvous
address after it has become the host."""


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
        self._links: dict[int, Lifeline] = {}
        """The host's connections, by seats."""

        self._strangers: set[Lifeline] = set()
        """Connections that have not said who they are."""

        self._public_listener: socket.socket | None = None
        self._inbox: list[Message] = []
        self._host: RoundHost | None = None
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
        return self._was_host if self._is_closed else self._host is not None

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
        if self._host is not None and self._host.ended is not None and not self._is_closed:
            deadline = time.monotonic() + _SECONDS_TO_LEAVE
            self._poll(0)
            while self._links and time.monotonic() < deadline:
                self._poll(_POLL_SECONDS / 2)
        self.close()

    def close(self) -> None:
        """Close all connections at once."""
        if self._is_closed:
            return
        self._is_closed, self._was_host = True, self._host is not None
        for link in (*self._links.values(), *self._strangers, self._to_host):
            if link is not None:
                link.close()
        self._listener.close()
        if self._public_listener is not None:
            self._public_listener.close()
        self._selector.close()
        self._links, self._to_host, self._host = {}, None, None
        self._strangers.clear()

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

    def _hold(self, seat: int, terms: Terms) -> RoundHost:
        self._seat, self.has_held = seat, True
        self._host = RoundHost(
            own=seat,
            terms=terms,
            agreement=self._agreement,
            open_store=self._open_store,
            newest=self._newest_step,
            folder=self.folder,
        )
        self._host.join(seat, self._hello(), self.host_address, time.monotonic())
        self._selector.register(self._listener, selectors.EVENT_READ, _OWN)
        return self._host

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
        if self._host is None or not self._host.hands_over:
            return
        self._poll(0)
        self._end = end_without(self.name)
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        while not all(link.flush() for link in self._links.values()):
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
        host = self._hold(own.seat, terms)
        host.take_over(roster, lost)
        with contextlib.suppress(OSError):  # where another launcher may look for the meeting
            self._public_listener = listen(self.nodes.port)
            self._selector.register(self._public_listener, selectors.EVENT_READ, _PUBLIC)

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
        if self._host is not None:
            self._advance(self._host)
        for key, _ in self._selector.select(0 if self._inbox else timeout):
            if key.data == _OWN:
                self._accept(self._listener)
            elif key.data == _PUBLIC and self._public_listener is not None:
                self._accept(self._public_listener)
            elif key.data is self._to_host and self._to_host is not None:
                self._read_host(self._to_host)
            elif self._host is not None:
                self._read_guest(self._host, key.data)
        if self._host is not None:
            self._advance(self._host)
        elif self._to_host is not None:
            self._to_host.flush()
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            self._take(message)

    def _accept(self, listener: socket.socket) -> None:
        for link in accept(listener, self.nodes.node_timeout):
            self._strangers.add(link)
            self._selector.register(link, selectors.EVENT_READ, link)

    def _read_host(self, link: Lifeline) -> None:
        self._inbox += link.receive()
        if not link.is_open:
            self._selector.unregister(link)
            link.close()
            self._to_host = None
            if self._over is None and self._end is None and not self._is_done:
                self._over = self._loss_of_host()

    def _read_guest(self, host: RoundHost, link: Lifeline) -> None:
        if not link.is_open:  # another launcher has taken its seat
            return
        for message in link.receive():
            if link.seat is not None:
                host.receive(link.seat, message)
            elif isinstance(message, Hello):
                self._seat_guest(host, link, message)
            else:
                link.is_open = False
        if not link.is_open:
            self._drop(host, link)

    def _seat_guest(self, host: RoundHost, link: Lifeline, hello: Hello) -> None:
        self._strangers.discard(link)
        before = len(host.outbox)
        link.seat = host.join(hello.seat, hello, link.peer, time.monotonic())
        if link.seat is None:
            for _, message in host.outbox[before:]:
                link.send(message)
            del host.outbox[before:]
            link.is_open = False
            return
        earlier = self._links.get(link.seat)
        self._links[link.seat] = link
        if earlier is not None:
            self._selector.unregister(earlier)
            earlier.close()

    def _drop(self, host: RoundHost, link: Lifeline) -> None:
        self._selector.unregister(link)
        link.close()
        self._strangers.discard(link)
        if link.seat is not None:
            del self._links[link.seat]
            host.lose(link.seat)

    def _advance(self, host: RoundHost) -> None:
        host.advance(time.monotonic())
        outbox, host.outbox = host.outbox, []
        for seat, message in outbox:
            if seat == self._seat:
                self._inbox.append(message)
            elif seat in self._links:
                self._links[seat].send(message)
        if not outbox:
            for link in self._links.values():
                link.flush()
        if host.ended is not None and self._end is None:
            self._end = host.ended

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
