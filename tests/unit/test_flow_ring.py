"""The ring between a worker and its supervisor, what a worker reports about its flows, and what the verbs make of it."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from nfq_agent.cli.flow_records import seconds_of
from nfq_agent.cli.trace import way
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements.policy import Policy
from nfq_agent.flow_ring import SLOTS, FlowRing, RingPlace
from nfq_agent.policy_options import PolicyOptions
from nfq_agent.service.flow_stream import answer
from nfq_agent.service.flow_watch import PACKETS_PER_SECOND, FlowWatch
from nfq_agent.service.watch_share import FLOWS, PACKETS, WatchShare
from nfq_agent.testing import tcp, udp
from nfq_agent.verdict import ACCEPT, REJECT

SECOND = 1_000_000_000


def test_records_come_in_order_and_wrap() -> None:
    ring, place = FlowRing(4096), RingPlace()
    for number in range(500):
        ring.write(f"record {number}".encode())
        found, place, missed = ring.read(place)
        assert (found, missed) == ([f"record {number}".encode()], 0)


def test_what_was_overwritten_is_counted() -> None:
    ring = FlowRing(4096)
    for _ in range(1000):
        ring.write(b"x" * 20)
    found, place, missed = ring.read(RingPlace())
    assert (found, missed) == ([], 1000)
    ring.write(b"new")
    ring.write(b"y" * 4096)
    assert ring.read(place)[0::2] == ([b"new"], 1)


def test_the_filters_reach_the_worker_until_their_time_is_over() -> None:
    ring = FlowRing()
    assert (ring.until, ring.flows_until, ring.filters(0)) == (0, 0, {})
    assert ring.want_packets(7, "unit = ä", 1) == 0
    assert (ring.until, ring.flows_until, ring.filters(1)) == (7, 0, {0: "unit = ä"})
    ring.want_flows(8)
    assert (ring.want_packets(9, "", 2), ring.want_packets(9, "unit = ä", 2)) == (1, 0)
    assert (ring.flows_until, ring.filters(2)) == (8, {0: "unit = ä", 1: ""})
    assert ring.want_packets(20, "dport = 1", 9) == 0
    assert ring.filters(9) == {0: "dport = 1"}


def test_one_filter_more_than_there_is_room_for_is_refused() -> None:
    watched = Watched()
    for number in range(SLOTS):
        assert watched.ask(SECOND, f"dport = {number}")["ok"]
    assert watched.ask(SECOND, "dport = 99") == {
        "ok": False, "message": f"{SLOTS} other filters are traced now; allowed: {SLOTS} at the same time",
    }  # fmt: skip
    assert watched.ask(SECOND, "dport = 3")["ok"]
    assert watched.ask(7 * SECOND, "dport = 99")["ok"]


class Watched:
    """A chain with a policy, watched; and a client of the supervisor."""

    def __init__(self, most: int = 1000) -> None:
        """most: steps of its share."""
        options = PolicyOptions.from_table({"rule": [{"action": "drop", "dport": 23, "name": "telnet"}]})
        self.chain = ElementChain([Policy("ports", options, print)], ACCEPT)
        self.worker: Any = SimpleNamespace(title="worker", ring=FlowRing())
        self.watch = FlowWatch(self.worker.ring, self.chain, {"queue": 7}, WatchShare(most))
        self.places: dict[str, Any] = {}

    def ask(self, clock: int, packets: str | None = None, client: str = "") -> dict[str, Any]:
        said = answer([self.worker], {"places": self.places.get(client, {}), "packets": packets}, clock)
        self.places[client] = json.loads(json.dumps(said.get("places", {})))
        return said

    def pass_through(self, port: int, sport: int = 5) -> None:
        packet = udp(f"10.0.0.1:{sport}", f"10.0.0.2:{port}")
        self.watch.saw(packet, None, self.chain.decide(packet, None), 1.0)


def test_without_a_watcher_nothing_is_told() -> None:
    watched = Watched()
    assert watched.watch.tend(SECOND, None) is False
    watched.pass_through(23)
    assert watched.worker.ring.read(RingPlace())[0] == []


def test_a_client_that_begins_is_told_of_flows_without_a_change() -> None:
    watched = Watched()
    for client in ("first", "second"):
        watched.ask(SECOND, client=client)
        watched.watch.tend(SECOND, None)
        if client == "first":
            watched.pass_through(80)
            watched.watch.tend(SECOND, None)
        assert [record["dport"] for record in watched.ask(SECOND, client=client)["records"]] == [80]
    # Without a change and a new client nothing more is told.
    watched.watch.tend(SECOND, None)
    assert watched.ask(SECOND, client="second")["records"] == []


def test_flows_are_told_while_they_are_watched() -> None:
    watched = Watched()
    watched.ask(SECOND)
    assert watched.watch.tend(SECOND, None)
    for port in (23, 23, 80):
        watched.pass_through(port)
    watched.watch.tend(SECOND, None)
    dropped, accepted = watched.ask(SECOND)["records"]
    assert dropped.items() >= {
        "kind": "flow", "queue": 7, "src": "10.0.0.1", "dport": 23,
        "verdict": "drop", "reason": "ports: rule 1 (telnet)", "packets": 2,
    }.items()  # fmt: skip
    assert (accepted["verdict"], accepted["reason"]) == ("accept", "default")
    # Nothing new: nothing is told again. No question comes: it ends.
    watched.watch.tend(SECOND, None)
    assert watched.ask(SECOND)["records"] == []
    assert not watched.watch.tend(9 * SECOND, None)


def test_a_reset_that_passes_does_not_turn_what_was_rejected() -> None:
    watched = Watched()
    watched.ask(SECOND)
    watched.ask(SECOND, "verdict = accept", client="trace")
    watched.watch.tend(SECOND, None)
    client, server = "10.0.0.1:5", "10.0.0.2:23"
    for packet, verdict in ((tcp(client, server, flags="S"), REJECT), (tcp(server, client, flags="RA"), ACCEPT)):
        watched.chain.decide(packet, None)
        watched.watch.saw(packet, None, verdict, 1.0)
    watched.watch.tend(SECOND, None)
    (flow,) = watched.ask(SECOND)["records"]
    assert (flow["verdict"], flow["packets"]) == ("reject", 2)
    # The packet itself passed.
    (traced,) = watched.ask(SECOND, "verdict = accept", client="trace")["records"]
    assert (traced["verdict"], traced["src"]) == ("accept", "10.0.0.1")


def test_a_traced_packet_shows_its_way() -> None:
    watched = Watched()
    watched.ask(SECOND, "verdict = drop")
    watched.watch.tend(SECOND, None)
    watched.pass_through(23)
    watched.pass_through(80)
    (record,) = watched.ask(SECOND, "verdict = drop")["records"]
    assert [*way(record)] == ["udp 10.0.0.1:5 -> 10.0.0.2:23 INPUT, 28 bytes, udp", "  ports: drop by rule 1 (telnet)"]
    watched.ask(SECOND, "dport = 80")
    watched.watch.tend(SECOND, None)
    watched.pass_through(80)
    (record,) = [each for each in watched.ask(SECOND, "dport = 80")["records"] if each["kind"] == "packet"]
    assert [*way(record)][1:] == ["  ports: no answer", "  default: accept"]


def test_each_client_is_told_what_its_own_filter_matches() -> None:
    watched = Watched()
    clients = ("verdict = drop", "dport = 80", "verdict = accept", None)
    for what in clients:
        watched.ask(SECOND, what, str(what))
    watched.watch.tend(SECOND, None)
    for port in (23, 80, 443):
        watched.pass_through(port)
    watched.watch.tend(SECOND, None)
    told = {what: watched.ask(SECOND, what, str(what))["records"] for what in clients}
    assert [[(record["kind"], record["dport"]) for record in told[what]] for what in clients] == [
        [("packet", 23)], [("packet", 80)], [("packet", 80), ("packet", 443)], [("flow", 23), ("flow", 80), ("flow", 443)],
    ]  # fmt: skip
    # A client that asks no more ends its own trace only.
    for _ in range(2):
        watched.watch.tend(5 * SECOND, None)
        assert watched.ask(5 * SECOND, "dport = 80", "dport = 80")["ok"]
    watched.watch.tend(8 * SECOND, None)
    watched.pass_through(23)
    watched.pass_through(80)
    assert len(watched.ask(8 * SECOND, "dport = 80", "dport = 80")["records"]) == 1
    assert watched.ask(8 * SECOND, "verdict = drop", "verdict = drop")["records"] == []


def test_packets_that_are_left_out_count_for_their_client_alone() -> None:
    watched = Watched()
    for what in ("dport = 80", "dport = 23"):
        watched.ask(SECOND, what, what)
    watched.watch.tend(SECOND, None)
    watched.pass_through(23)
    for _ in range(PACKETS_PER_SECOND + 5):
        watched.pass_through(80)
    told = {what: watched.ask(SECOND, what, what) for what in ("dport = 80", "dport = 23")}
    assert {what: (len(said["records"]), said["missed"]) for what, said in told.items()} == {
        "dport = 80": (PACKETS_PER_SECOND, 5), "dport = 23": (1, 0),
    }  # fmt: skip


def test_traced_packets_beyond_the_rate_are_missed_and_counted() -> None:
    watched = Watched()
    watched.ask(SECOND, "")
    watched.watch.tend(SECOND, None)
    for _ in range(PACKETS_PER_SECOND + 5):
        watched.pass_through(80)
    said = watched.ask(SECOND, "")
    assert (len(said["records"]), said["missed"]) in ((PACKETS_PER_SECOND, 5), (0, PACKETS_PER_SECOND + 5))


def test_flows_beyond_what_the_worker_has_time_for_are_not_shown_and_counted() -> None:
    watched = Watched(most=1)
    watched.ask(SECOND)
    watched.watch.tend(SECOND, None)
    for port in range(FLOWS + 3):
        watched.pass_through(80, 1000 + port)
    watched.watch.tend(SECOND, None)
    watched.watch.follow([])
    said = watched.ask(SECOND)
    assert [record["sport"] for record in said["records"]] == [1000 + port for port in range(FLOWS)]
    assert (said["unshown"], said["missed"]) == (3, 0)
    # They are shown with a later packet, in time. When nothing is asked any more, nothing is counted.
    watched.pass_through(80, 1000 + FLOWS)
    watched.watch.tend(SECOND, None)
    watched.watch.follow([])
    assert watched.ask(SECOND)["unshown"] == 2
    watched.watch.tend(9 * SECOND, None)
    assert watched.worker.ring.unshown == 0


def test_packets_beyond_what_the_worker_has_time_for_are_not_traced_and_counted() -> None:
    watched = Watched(most=1)
    before = watched.ask(SECOND, "dport = 80")["unlooked"]
    watched.watch.tend(SECOND, None)
    assert watched.watch.has_time
    for _ in range(PACKETS):
        watched.pass_through(80)
    assert not watched.watch.has_time
    watched.watch.leave_unlooked(5)
    said = watched.ask(SECOND, "dport = 80")
    assert (len(said["records"]), said["missed"], said["unlooked"] - before) == (PACKETS, 0, 5)


def test_a_wrong_filter_is_refused() -> None:
    assert Watched().ask(SECOND, "nam = x") == {"ok": False, "message": "character 1: 'nam' is not a field; like it: name"}


def test_times() -> None:
    assert [seconds_of(text) for text in ("60", "60s")] == [60.0, 60.0]


@pytest.mark.parametrize("record", [b"", b"no JSON", b"[" * 50000, b"[1]", b"1" * 5000, b"\xff"])
def test_a_record_that_is_none_is_counted_as_missed(record: bytes) -> None:
    """A worker that was taken over writes what it likes into the ring, which the supervisor reads."""
    watched = Watched()
    watched.ask(SECOND)
    watched.worker.ring.write(record)
    watched.worker.ring.write(b'{"kind": "flow"}')
    said = watched.ask(SECOND)
    assert (said["records"], said["missed"]) == ([{"kind": "flow"}], 1)


def test_noise_in_the_ring_is_no_records() -> None:
    watched = Watched()
    watched.ask(SECOND)
    memory = watched.worker.ring._memory  # noqa: SLF001  # as a worker writes there that was taken over
    for seed in range(50):
        memory[:] = random.Random(seed).randbytes(len(memory))
        said = watched.ask(SECOND)
        assert said["ok"]
        assert watched.ask(SECOND, "dport = 80", "another")["ok"] in (True, False)
        assert all(isinstance(each, dict) for each in said["records"])
