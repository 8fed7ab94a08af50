"""`replay` lends the elements what a worker does: the mode for connections that began before, what was decided, names of DNS."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from mmdb import write_database
from openings import client_hello, dns_query
from recorded import BEGIN, connection, write

from nfq_agent.cli import replay
from nfq_agent.cli.flags import Flags
from nfq_agent.packet import Packet
from nfq_agent.testing import tcp, udp

CONFIG = """
agent.resolvers = ["192.0.2.53"]
[queue.main]
num = 7
elements = ["dpi", "allow"]
midstream = "{midstream}"
[rules.web]
queue = "main"
hooks = ["output", "input"]
all = true
[element.allow]
type = "policy"
default = "drop"
[[element.allow.rule]]
action = "accept"
protocol = "dns"
[[element.allow.rule]]
action = "accept"
tls_sni = ["*.good.test"]
{verify}
"""
CLIENT, SERVER, RESOLVER = "10.0.0.1:40001", "192.0.2.7:443", "192.0.2.53:53"
HELLO = client_hello("a.good.test")


def answer(name: str, address: str, seconds: int = 60) -> bytes:
    """An answer with one address."""
    message = dns_query(name, flags=0x8180)
    record = struct.pack("!HHHIH", 0xC00C, 1, 1, seconds, 4) + ip_address(address).packed
    return message[:6] + b"\0\1" + message[8:] + record


def asked(name: str, address: str) -> list[Packet]:
    return [udp("10.0.0.1:5353", RESOLVER, dns_query(name)), udp(RESOLVER, "10.0.0.1:5353", answer(name, address))]


def flows(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    packets: Iterable[tuple[float, Packet]],
    midstream: str = "accept",
    verify: str = "",
) -> list[tuple[str, bool]]:
    """The fate of each flow of TCP, and whether the capture lacks its beginning."""
    config = folder / "agent.toml"
    config.write_text(CONFIG.format(midstream=midstream, verify=verify))
    write(folder / "seen.pcap", packets)
    replay.replay(Flags(config), folder / "seen.pcap", None, False, True)
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return [(flow["after"], flow["midstream"]) for flow in told["flows"] if flow["flow"].startswith("tcp")]


def apart(packets: Iterable[Packet], begin: float = 0.0) -> list[tuple[float, Packet]]:
    return [(BEGIN + begin + number / 1000, packet) for number, packet in enumerate(packets)]


@pytest.mark.parametrize(("midstream", "fate"), [("accept", "accept"), ("judge", "drop"), ("drop", "drop")])
def test_a_connection_that_began_before_the_capture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], midstream: str, fate: str
) -> None:
    late = apart(tcp(CLIENT, SERVER, b"\x17\x03\x03\0\x10" + bytes(16), seq=1 + 21 * number) for number in range(12))
    assert flows(tmp_path, capsys, late, midstream) == [(fate, True)]


def test_a_person_reads_that_flows_began_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(CONFIG.format(midstream="accept", verify=""))
    write(tmp_path / "seen.pcap", apart([tcp(CLIENT, SERVER, b"\0\1", seq=5)]))
    replay.replay(Flags(config), tmp_path / "seen.pcap", None, False, False)
    assert "1 flow began before the capture; `midstream` of its queue says how it is judged" in capsys.readouterr().out


def test_a_decided_connection_is_known_when_it_goes_on_after_an_hour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = apart(connection(CLIENT, SERVER, HELLO))
    on = apart([tcp(CLIENT, SERVER, b"\x17\x03\x03\0\1x", seq=2 + len(HELLO), ack=2)], 3600.0)
    assert flows(tmp_path, capsys, begun + on, "drop") == [("accept", False)]


def test_a_name_counts_as_far_as_an_answer_of_the_capture_proves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = apart([*asked("a.good.test", "192.0.2.7"), *connection(CLIENT, SERVER, HELLO)])
    assert flows(tmp_path, capsys, said, verify='verify = "dns"') == [("accept", False)]
    other = apart([*asked("a.good.test", "192.0.2.8"), *connection(CLIENT, SERVER, HELLO)])
    assert flows(tmp_path, capsys, other, verify='verify = "dns"') == [("drop", False)]
    # The answer holds for a time.
    late = apart(asked("a.good.test", "192.0.2.7")) + apart(connection(CLIENT, SERVER, HELLO), 3600.0)
    assert flows(tmp_path, capsys, late, verify='verify = "dns"') == [("drop", False)]


def test_places_of_a_database_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_database(tmp_path / "places.mmdb", {"192.0.2.0/24": {"country": "DE", "asn": "AS64500"}})
    config = tmp_path / "agent.toml"
    text = CONFIG.format(midstream="accept", verify="").partition("[element.allow]")[0]
    config.write_text(
        f"""{text}[element.allow]
type = "policy"
geo = "places.mmdb"
default = "drop"
rule = [{{ action = "accept", dst_country = "DE" }}, {{ action = "accept", src_asn = 64500 }}]
"""
    )
    elsewhere = "198.51.100.7:443"
    write(tmp_path / "seen.pcap", apart([*connection(CLIENT, SERVER, HELLO), *connection(CLIENT, elsewhere, HELLO)]))
    replay.replay(Flags(config), tmp_path / "seen.pcap", None, False, True)
    told = json.loads(capsys.readouterr().out)
    assert {flow["flow"].partition(" -> ")[2]: flow["after"] for flow in told["flows"]} == {SERVER: "accept", elsewhere: "drop"}
