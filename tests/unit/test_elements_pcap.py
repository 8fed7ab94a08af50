"""The pcap element: its options, and what a full disk costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nfq_agent.capture.recording import packets
from nfq_agent.element import Needs
from nfq_agent.elements.pcap import Pcap, PcapOptions
from nfq_agent.testing import Bench, tcp
from nfq_agent.verdict import ACCEPT


def test_a_full_disk_costs_packets_and_no_verdict() -> None:
    said: list[str] = []
    pcap = Pcap("pcap", PcapOptions(directory="/nowhere"), lambda message, **_: said.append(message))
    pcap._file = open("/dev/full", "wb")  # noqa: SIM115,SLF001  # a full disk; the element closes it
    packet = tcp("192.0.2.1:40000", "192.0.2.2:80", bytes(1000), time=1000.0)
    pcap.judged(packet, None, Bench("log").decide(packet))
    assert said == ["pcap: /nowhere: cannot write: No space left on device; 1 packets missed; next try in 10 s"]


def test_the_last_packet_is_in_the_file_soon_although_no_other_comes(tmp_path: Path) -> None:
    with Bench("pcap", directory=str(tmp_path)) as chain:
        for port in (1, 2):
            chain.decide(tcp("192.0.2.1:40000", f"192.0.2.2:{port}"))
        for _ in range(2):
            chain.wait(0.1)
        (path,) = tmp_path.glob("*.pcapng")
        with path.open("rb") as file:
            assert len(list(packets(file))) == 2


def test_a_disk_that_is_full_on_a_quiet_line_is_said() -> None:
    said: list[str] = []
    pcap = Pcap("pcap", PcapOptions(directory="/nowhere"), lambda message, **_: said.append(message))
    pcap._file, pcap._flushed = open("/dev/full", "wb"), 1000.0  # noqa: SIM115,SLF001  # a full disk; the element closes it
    pcap.judged(tcp("192.0.2.1:40000", "192.0.2.2:80", time=1000.0), None, ACCEPT)
    pcap.tick(1.0, lambda _: None)
    assert said == []
    pcap.tick(2.0, lambda _: None)
    assert said == ["pcap: /nowhere: cannot write: No space left on device; 1 packets missed; next try in 10 s"]


def test_it_needs_what_it_keeps() -> None:
    assert Pcap.needs_of(PcapOptions(directory="/x", snap=128)) is Needs.HEADERS
    assert Pcap.needs_of(PcapOptions(directory="/x")) is Needs.PAYLOAD


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directory": "here"}, "allowed: a path that begins with /"),
        ({"directory": "/x", "name": "a/b"}, "is not a valid file name"),
        ({"directory": "/x", "size": "10"}, "is not a valid size; allowed: a number of bytes"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PcapOptions(**options)
