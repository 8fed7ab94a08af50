"""What a worker tells its elements besides packets, and what those that keep records hear of it."""

from __future__ import annotations

from typing import Any

from failing import Fails, Said

from nfq_agent.counters import Counters
from nfq_agent.element import PacketElement
from nfq_agent.element_chain import ElementChain
from nfq_agent.elements.record import FlowRecord, RecordOptions
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.testing import udp
from nfq_agent.verdict import ACCEPT, DROP, Verdict

CLIENT, SERVER = "10.0.0.1:5000", "192.0.2.7:53"


def record(said: Said) -> FlowRecord:
    return FlowRecord("record", RecordOptions(per_second=0), said)


def judge(said: Said, *elements: PacketElement, on_error: Verdict = DROP, **more: Any) -> PacketJudge:
    chain = ElementChain(elements, ACCEPT)
    return PacketJudge(chain, WorkerSettings(1, ACCEPT, on_error, False), Counters(), said, lambda *_: None, **more)


def test_a_flow_that_is_dropped_since_an_element_failed_has_its_record() -> None:
    said = Said()
    judged = judge(said, Fails("broken", None, said), record(said))
    assert judged.verdict(udp(CLIENT, SERVER, b"fail")) is DROP
    (begin,) = said.where(event="begin")
    assert (begin.verdict, begin.reason, begin.element) == ("drop", "on_error", "on_error")
    # The next packet is judged.
    assert judged.verdict(udp(CLIENT, SERVER, b"good")) is ACCEPT
    (change,) = said.where(event="change")
    assert (change.verdict, change.reason) == ("accept", "default")


def test_the_time_of_a_packet_is_that_of_its_source() -> None:
    said = Said()
    judged = judge(said, record(said), moment=lambda packet: (packet.time or 0.0) - 900.0)
    judged.now = 100.2
    for time in (1000.0, 1000.015):
        judged.verdict(udp(CLIENT, SERVER, time=time))
    judged.end_flows()
    (end,) = said.where(event="end")
    assert (end.duration, end.start) == (0.015, "1970-01-01T00:16:40.000Z")
