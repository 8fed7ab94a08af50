"""The flow table: both directions in one, bounded, and forgetting what was idle longest."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.flow_table import FlowTable
from nfq_agent.packet import FiveTuple


def five_tuple(number: int) -> FiveTuple:
    return FiveTuple(6, number.to_bytes(4, "big"), number % 65536, socket.inet_aton("192.0.2.1"), 80)


def test_both_directions_are_one_flow() -> None:
    table = FlowTable()
    there = five_tuple(1)
    flow = table.observe(there, 10.0)
    flow.facts["name"] = "value"
    assert table.observe(there.reversed(), 11.0) is flow
    assert (flow.origin, flow.first, flow.last, flow.packets) == (there, 10.0, 11.0, 2)
    assert len(table) == 1


def test_what_has_no_ports_is_a_flow_too() -> None:
    table = FlowTable()
    ping = FiveTuple(1, b"\x01" * 4, None, b"\x02" * 4, None)
    assert table.observe(ping, 0.0) is table.observe(ping.reversed(), 0.0)


def test_the_longest_idle_goes_when_it_is_full() -> None:
    table = FlowTable(limit=3)
    for number in (1, 2, 3):
        table.observe(five_tuple(number), 0.0)
    first = table.observe(five_tuple(1), 1.0)
    table.observe(five_tuple(4), 1.0)
    assert len(table) == 3
    assert table.evicted == 1
    assert table.observe(five_tuple(1), 2.0) is first
    assert table.observe(five_tuple(2), 2.0).packets == 1


def test_the_idle_are_forgotten() -> None:
    table = FlowTable(limit=1000, max_idle=60.0)
    for number in range(100):
        table.observe(five_tuple(number), 0.0)
    for number in range(100, 200):
        table.observe(five_tuple(number), 100.0)
    assert len(table) <= 101


def test_a_clock_that_is_set_back_makes_nothing_old() -> None:
    table = FlowTable(max_idle=60.0)
    table.keep_forgotten()
    flow = table.observe(five_tuple(1), 100.0)
    assert table.take_forgotten(99.0) == []
    assert table.observe(five_tuple(1), 99.0) is flow
    assert [each for each, _ in table.take_forgotten(200.0)] == [flow]


def test_a_flood_of_half_open_flows_makes_no_other_go() -> None:
    table = FlowTable(limit=64)
    answered = table.observe(five_tuple(1), 0.0)
    table.observe(five_tuple(1).reversed(), 0.0)
    one_way = table.observe(five_tuple(2), 0.0)
    for _ in range(2):
        table.observe(five_tuple(2), 0.0)
    for number in range(100, 1000):
        table.observe(five_tuple(number), 1.0)
        table.observe(five_tuple(number), 1.0)
    assert table.find(five_tuple(1).reversed()) is answered
    assert table.find(five_tuple(2)) is one_way
    assert len(table) == 64


def test_half_open_flows_have_an_eighth_of_a_full_table() -> None:
    table = FlowTable(limit=64)
    for number in range(100):
        table.observe(five_tuple(number), 0.0)
        table.observe(five_tuple(number).reversed(), 0.0)
    for number in range(200, 300):
        table.observe(five_tuple(number), 1.0)
    assert sum(table.find(five_tuple(number)) is not None for number in range(200, 300)) == 8
    assert len(table) == 64


def test_a_table_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        FlowTable(limit=0)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=200), st.integers(1, 10))
def test_it_never_holds_more_than_its_limit(packets: list[tuple[int, bool]], limit: int) -> None:
    table = FlowTable(limit=limit)
    for now, (number, back) in enumerate(packets):
        there = five_tuple(number)
        flow = table.observe(there.reversed() if back else there, float(now))
        assert flow.last == now
        assert len(table) <= limit


def test_more_bytes_than_32_bits_tell_are_counted() -> None:
    table = FlowTable()
    flow = table.observe(five_tuple(1), 1.0, 3_000_000_000)
    for number in range(3):
        table.observe(five_tuple(1), 1.0, 3_000_000_000)
        table.observe(five_tuple(1).reversed(), 1.0, 5 + number)
    account = table.account(flow)
    assert account is not None
    assert (account.packets_sent, account.bytes_sent) == (4, 12_000_000_000)
    assert (account.packets_received, account.bytes_received) == (3, 18)
