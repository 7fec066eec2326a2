"""The rounds of a run that restarts on several nodes: who takes part, and when a run ends."""

from __future__ import annotations

import select
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.engine.ranks.lifelines import Lifeline, connect
from launcher.engine.ranks.meeting import Meeting, MeetingEndedError
from launcher.engine.ranks.round_host import RoundHost, Terms
from launcher.engine.ranks.round_messages import (
    Done,
    End,
    Hello,
    Message,
    Over,
    RanksFailed,
    Ready,
    Start,
    encode,
)
from launcher.environment.nodes import Nodes
from launcher.errors import EXIT_USAGE, EXIT_WITHOUT, PeerError, RunDirError
from launcher.launch.restarts import check_round
from launcher.runs.job import Loss
from launcher.runs.rundir import RunDir

AGREEMENT = {"recipe": "digits", "device": "cpu", "ranks": 2}


def hello(name: str, seat: int | None = None, **changes: object) -> Hello:
    """Return the first message of a launcher."""
    return Hello(name=name, port=1, agreement=AGREEMENT | changes, seat=seat)


@dataclass
class Simulated:
    """A host, and launchers that answer its messages in memory."""

    low: int
    high: int
    launchers: int
    max_restarts: int = 3
    step: int | None = None
    """The step of the newest checkpoint."""

    now: float = 0.0
    host: RoundHost = field(init=False)
    sent: Counter[str] = field(default_factory=Counter)
    """Messages by kind, in both directions."""

    largest: int = 0
    """Bytes of the largest message."""

    starts: dict[int, Start] = field(default_factory=dict)
    """The newest start of each seat."""

    ends: dict[int, End] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.host = RoundHost(
            own=0,
            terms=Terms(
                low=self.low,
                high=self.high,
                launchers=self.launchers,
                max_restarts=self.max_restarts,
                join_timeout=100,
            ),
            agreement=dict(AGREEMENT),
            open_store=lambda: 1000 + self.host.standing.round,
            newest=lambda: self.step,
        )

    def join(self, *seats: int) -> None:
        """Let launchers join."""
        for seat in seats:
            self.sent["Hello"] += 1
            self.host.join(seat, hello(f"node{seat}"), "10.0.0.1", self.now)
        self.deliver()

    def receive(self, seat: int, message: Message) -> None:
        """Let a launcher send a message."""
        self.sent[type(message).__name__] += 1
        self.host.receive(seat, message)

    def fail(self, seat: int, exit_code: int = 1) -> None:
        """Let the ranks of a launcher fail."""
        number = self.host.standing.round
        self.receive(seat, RanksFailed(round=number, exit_code=exit_code))
        self.receive(seat, Ready(round=number))
        self.deliver()

    def lose(self, *seats: int) -> None:
        """Let launchers disappear."""
        for seat in seats:
            self.host.lose(seat)
        self.deliver()

    def deliver(self) -> None:
        """Deliver messages until there are none; launchers end their ranks at once."""
        self.host.advance(self.now)
        while self.host.outbox:
            outbox, self.host.outbox = self.host.outbox, []
            for seat, message in outbox:
                self.sent[type(message).__name__] += 1
                self.largest = max(self.largest, len(encode(message)))
                if isinstance(message, Start):
                    self.starts[seat] = message
                elif isinstance(message, End):
                    self.ends[seat] = message
                elif isinstance(message, Over):
                    self.receive(seat, Ready(round=message.round))
            self.host.advance(self.now)

    @property
    def members(self) -> list[int]:
        """The seats of the newest round, by their indices."""
        number = self.host.standing.round
        taken = {
            start.index: seat
            for seat, start in self.starts.items()
            if start.number == number and start.index is not None
        }
        return [taken[index] for index in sorted(taken)]


def started(low: int, high: int, launchers: int, max_restarts: int = 3) -> Simulated:
    """Return a run whose launchers have all joined."""
    simulated = Simulated(low, high, launchers, max_restarts)
    simulated.join(*range(launchers))
    return simulated


def test_spares_take_the_places_of_lost_nodes() -> None:
    """A round has as many nodes as asked for, in the order of their seats, without lost ones."""
    run = started(3, 3, 5)
    assert run.members == [0, 1, 2]
    assert not run.starts[1].resumes
    run.step = 20
    run.lose(1)
    assert run.members == [0, 2, 3]
    assert run.starts[3].resumes
    assert run.starts[3].port == 1002
    run.lose(0 + 2, 4)  # a node of the round and a spare at the same moment
    assert run.host.ended is not None
    assert (run.host.ended.exit_code, run.host.ended.node) == (None, "node2")


def test_a_lost_spare_restarts_nothing() -> None:
    """The loss of a launcher that does not take part changes the roster alone."""
    run = started(2, 2, 3)
    run.join(2)
    run.lose(2)
    assert run.host.standing.round == 1
    assert run.host.standing.restarts == 0
    assert run.sent["Over"] == 0


def test_a_failed_rank_restarts_on_the_same_nodes() -> None:
    """After a rank has failed, the same nodes start again, and the failure is counted."""
    run = started(2, 2, 2, max_restarts=2)
    for restarts in (1, 2):
        run.fail(1)
        assert run.members == [0, 1]
        assert run.starts[0].loss is not None
        assert run.starts[0].loss.cause == "rank"
        assert run.host.standing.restarts == restarts
    run.fail(1, exit_code=9)
    assert (run.ends[0].exit_code, run.ends[0].node) == (9, "node1")
    assert run.host.standing.round == 3


def test_a_mistake_of_the_user_is_not_repeated() -> None:
    """Ranks that refuse what they are asked for end the run, whatever may restart."""
    run = started(2, 2, 3)
    run.fail(0, exit_code=EXIT_USAGE)
    assert {end.exit_code for end in run.ends.values()} == {EXIT_USAGE}
    assert set(run.ends) == {0, 1, 2}


def test_a_node_that_fails_twice_is_left_out() -> None:
    """After its second failure a node is told to leave if a spare is there, and may not return."""
    run = started(2, 2, 3)
    run.fail(1)
    assert run.members == [0, 1]
    run.fail(1)
    assert run.members == [0, 2]
    assert (run.ends[1].exit_code, run.ends[1].node) == (EXIT_WITHOUT, "node1")
    assert run.host.join(7, hello("node1"), "", 0.0) is None


def test_the_last_nodes_are_not_left_out() -> None:
    """A node that fails often stays where the run could not go on without it."""
    run = started(2, 2, 2)
    for _ in range(3):
        run.fail(1)
    assert run.members == [0, 1]
    assert run.host.standing.failures == {"node1": 3}


def test_a_run_goes_on_with_fewer_nodes_and_grows_again() -> None:
    """A range lets a run shrink at once, and grow when a new node has waited for a checkpoint."""
    run = started(2, 4, 4)
    run.step = 10
    run.lose(3)
    assert run.members == [0, 1, 2]
    run.join(4)
    run.now += 5
    run.deliver()
    assert run.members == [0, 1, 2]
    run.step = 20
    run.now += 5
    run.deliver()
    assert run.members == [0, 1, 2, 4]
    assert run.host.standing.restarts == 1
    assert run.starts[0].loss is not None
    assert run.starts[0].loss.cause == "joined"
    run.lose(1, 2)
    assert run.members == [0, 4]
    run.lose(4)
    assert run.host.ended is not None


def test_a_first_round_waits_for_its_nodes() -> None:
    """A run starts when all of its nodes are there; with a range, at the latest after a while."""
    fixed, ranged = Simulated(2, 2, 3), Simulated(1, 3, 3)
    for run in (fixed, ranged):
        run.join(0)
        run.now = 40.0
        run.deliver()
    assert (fixed.members, ranged.members) == ([], [0])
    fixed.now = 101.0
    fixed.deliver()
    assert fixed.host.timed_out
    assert fixed.host.missing == [1, 2]


def test_a_first_round_does_not_wait_long_for_spares() -> None:
    """A run whose spare does not come starts without it soon after its own nodes are there."""
    run = Simulated(2, 2, 3)
    run.join(0, 1)
    assert run.members == []
    run.now = 6.0
    run.deliver()
    assert run.members == [0, 1]


def test_a_node_that_would_run_something_else_is_refused() -> None:
    """A launcher with other ranks is told so, and others that have joined are not affected."""
    run = started(2, 2, 2)
    assert run.host.join(2, hello("other", ranks=4), "", 0.0) is None
    ((_, message),) = run.host.outbox
    assert isinstance(message, End)
    assert message.exit_code == EXIT_USAGE
    assert "the same ranks: {first} has 2, other has 4" in message.reason


def test_the_end_of_a_run_is_not_a_loss() -> None:
    """Launchers that leave after rank 0 has written the result do not restart the run."""
    run = started(2, 2, 3)
    run.receive(0, Done(exit_code=0))
    run.lose(1)
    assert run.host.ended is None
    assert run.host.is_complete
    run.host.end(End(exit_code=0))
    run.deliver()
    assert run.ends[2].exit_code == 0


def test_a_run_that_finishes_does_not_grow() -> None:
    """A launcher that waits for the next checkpoint does not interrupt the end of the run."""
    run = started(1, 3, 2)
    run.now = 40.0
    run.deliver()
    run.join(2)
    run.step = 30
    run.receive(1, Done(exit_code=0))
    run.now += 5
    run.deliver()
    assert run.sent["Over"] == 0
    assert run.host.ended is None


def test_late_messages_of_an_earlier_round_change_nothing() -> None:
    """A failure or a readiness that belongs to the round before is not one of the present round."""
    run = started(2, 2, 3)
    run.lose(1)
    assert run.members == [0, 2]
    run.receive(2, Ready(round=1))
    run.receive(2, RanksFailed(round=1, exit_code=1))
    run.deliver()
    assert run.host.standing.restarts == 1


def test_a_new_host_knows_what_happened() -> None:
    """The launcher that takes over continues the count of restarts, failures and rounds."""
    run = started(2, 2, 3)
    run.fail(1)
    roster = run.starts[2].roster
    assert [each.seat for each in roster.successors] == [1, 2]
    new = Simulated(2, 2, roster.launchers - 1)
    new.host.own = 1
    new.host.join(1, hello("node1"), "", 0.0)
    new.host.take_over(roster, Loss(node="node0", cause="node"))
    new.deliver()
    assert new.members == []
    new.join(2)
    assert new.members == [1, 2]
    standing = new.host.standing
    assert (standing.round, standing.restarts) == (3, 2)
    assert standing.failures == {"node0": 1, "node1": 1}


def test_a_host_that_fails_twice_hands_the_meeting_over() -> None:
    """After its second failure the host starts no round, and its successor goes on without it."""
    run = started(2, 2, 3)
    run.fail(0)
    assert run.members == [0, 1]
    roster = run.starts[2].roster
    run.fail(0)
    assert run.host.hands_over
    assert (run.host.standing.round, run.host.ended, run.ends) == (2, None, {})
    assert run.sent["Over"] == 3, "the spare learns of the second failure"
    new = Simulated(2, 2, roster.launchers - 1)
    new.host.own = 1
    new.host.join(1, hello("node1"), "", 0.0)
    new.host.take_over(roster, Loss(node="node0", cause="rank", exit_code=1))
    new.join(2)
    assert new.members == [1, 2]
    standing = new.host.standing
    assert (standing.restarts, standing.failures) == (2, {"node0": 2})
    assert standing.left_out == ("node0",)


def test_a_host_stays_where_the_others_are_too_few() -> None:
    """A host that fails often holds the meeting while the run could not go on without it."""
    run = started(2, 2, 2)
    for _ in range(3):
        run.fail(0)
    assert run.members == [0, 1]
    assert not run.host.hands_over


@pytest.mark.parametrize(
    ("found", "is_refused"), [("3", False), ("2", False), ("4", True), (None, True), ("?", True)]
)
def test_a_launcher_that_was_cut_off_sees_that_others_went_on(
    tmp_path: Path, found: str | None, is_refused: bool
) -> None:
    """A launcher takes a run over only if no later round has started and the run has not ended."""
    run_dir = RunDir(tmp_path)
    if found is not None:
        run_dir.round.write_text(f"{found}\n")
    if not is_refused:
        check_round(run_dir, 3)
        return
    with pytest.raises(RunDirError, match="without this node"):
        check_round(run_dir, 3)


def messages_of(launchers: int) -> Simulated:
    """Return a run of many launchers that has lost a node and, later, a rank."""
    run = started(launchers - 4, launchers - 4, launchers)
    run.step = 10
    run.lose(launchers // 2)
    run.fail(1)
    assert run.host.standing.round == 3
    assert len(run.members) == launchers - 4
    return run


def test_messages_grow_with_the_number_of_launchers() -> None:
    """With 1,024 launchers each one sends and gets as many messages as with 64, and short ones."""
    few, more, many = map(messages_of, (64, 128, 1024))
    for kind in few.sent:
        per_launcher = (more.sent[kind] - few.sent[kind]) / 64
        assert many.sent[kind] == few.sent[kind] + per_launcher * (1024 - 64), kind
        assert per_launcher <= 3, kind
    assert many.largest < 2500


def open_meeting(
    port: int,
    index: int,
    count: int,
    spares: int = 0,
    *,
    low: int | None = None,
    seconds_to_answer: float = 60.0,
) -> Meeting:
    """Return the place of one launcher in a meeting on this machine."""
    nodes = Nodes(
        count=count,
        min_count=low,
        spares=spares,
        host="127.0.0.1",
        port=port,
        index=index,
        node_timeout=4.0,
    )
    return Meeting(
        nodes,
        AGREEMENT,
        max_restarts=3,
        open_store=lambda: 1,
        newest=lambda _: None,
        report=print,
        seconds_to_answer=seconds_to_answer,
    )


def test_launchers_meet_again_without_the_host(free_port: int) -> None:
    """When the host disappears, the next launcher holds the meeting and takes the spare in."""
    host, first, spare = (open_meeting(free_port, index, 2, spares=1) for index in range(3))
    with ThreadPoolExecutor() as pool:
        rounds = [pool.submit(each.next_round) for each in (host, first, spare)]
        starts = [each.result(timeout=20) for each in rounds[:2]]
        assert [(start.index, start.count) for start in starts] == [(0, 2), (1, 2)]
        host.close()
        with pytest.raises(PeerError):
            first.wait_for_folder()
        again = pool.submit(first.next_round).result(timeout=20)
        taken_in = rounds[2].result(timeout=20)
        assert first.is_host
        assert [(start.index, start.number) for start in (again, taken_in)] == [(0, 2), (1, 2)]
        assert again.loss is not None
        assert again.loss.cause == "node"
        list(pool.map(lambda meeting: meeting.finish(0), (spare, first)))
    with pytest.raises(MeetingEndedError):
        spare.next_round()


def test_launchers_leave_a_host_that_stands_still(free_port: int) -> None:
    """A launcher whose host answers nothing after a round holds the meeting in its place."""
    host, guest = (
        open_meeting(free_port, index, 2, low=1, seconds_to_answer=0.2) for index in range(2)
    )
    with ThreadPoolExecutor() as pool:
        rounds = [pool.submit(each.next_round) for each in (host, guest)]
        assert [each.result(timeout=20).count for each in rounds] == [2, 2]
    guest.fail(1)
    again = guest.next_round()
    assert guest.is_host
    assert (again.index, again.count, again.number) == (0, 1, 2)
    assert again.loss is not None
    assert (again.loss.node, again.loss.cause) == (host.name, "node")
    for each in (host, guest):
        each.close()


def test_what_is_not_the_meeting_is_no_lost_host(free_port: int) -> None:
    """A launcher connects again to an address where something else has closed its connection."""
    with socket.create_server(("127.0.0.1", free_port)) as listener:
        guest = open_meeting(free_port, 1, 2)
        listener.accept()[0].close()
    host = open_meeting(free_port, 0, 2)
    with ThreadPoolExecutor() as pool:
        rounds = [pool.submit(each.next_round) for each in (host, guest)]
        assert [each.result(timeout=20).index for each in rounds] == [0, 1]
    for each in (host, guest):
        each.close()


def test_many_launchers_over_sockets(free_port: int) -> None:
    """Hundreds of launchers that come at once take part in two rounds, and strangers in none."""
    count = 256
    host = open_meeting(free_port, 0, count)
    connected = (connect("127.0.0.1", free_port, 4.0) for _ in range(count + 1))
    stranger, *links = [link for link in connected if link is not None]
    for seat, link in enumerate(links, start=1):
        link.send(hello(f"node{seat}", seat))
    stranger.send(Done(exit_code=0))
    with ThreadPoolExecutor() as pool:
        begun = pool.submit(host.next_round)
        starts = [wait_for(link, Start) for link in links]
        assert begun.result(timeout=20).count == count
        places = [start.index for start in starts]
        assert places == [*range(1, count), None]
        links.pop(0).close()
        with pytest.raises(PeerError):
            host.wait_for_folder()
        again = pool.submit(host.next_round)
        for link in links[:-1]:
            over = wait_for(link, Over)
            link.send(Ready(round=over.round))
        places = [wait_for(link, Start).index for link in links]
        assert places == [*range(1, count)]
        assert again.result(timeout=20).number == 2
    assert wait_for_end(stranger)
    for link in (stranger, *links):
        link.close()
    host.leave()


def wait_for(link: Lifeline, kind: type[Any]) -> Any:
    """Return the next message of a kind that a launcher gets."""
    while True:
        select.select([link], [], [], 20)
        for message in link.receive():
            if isinstance(message, kind):
                return message
        assert link.is_open


def wait_for_end(link: Lifeline) -> bool:
    """Wait until the other end has closed a connection."""
    while link.is_open:
        select.select([link], [], [], 20)
        list(link.receive())
    return not link.is_open
