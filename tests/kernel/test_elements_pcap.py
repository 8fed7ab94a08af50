"""Captures, read back by tshark; their rotation; and what happens when they cannot be written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent import Agent, until
from namespace import Namespace

from nfq_agent.capture.recording import Recorded, RecordingError, packets
from nfq_agent.packet import Hook, Packet
from nfq_agent.testing import Bench, icmp, tcp, udp

SERVER = Path(__file__).parent.parent / "support" / "tcp_server.py"


def read(path: Path, *fields: str) -> list[tuple[str, ...]]:
    """What tshark reads in a file; fails at anything that it does not like."""
    argv = ["tshark", "-n", "-r", str(path), "-T", "fields", *(word for field in fields for word in ("-e", field))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert "cut short" not in done.stderr
    assert "damaged" not in done.stderr
    return [tuple(line.split("\t")) for line in done.stdout.splitlines()]


def bench(folder: Path, **options: Any) -> Bench:
    rule = [{"action": "drop", "dport": 9}]
    return Bench("pcap", before=[("policy", {"rule": rule})], directory=str(folder), **options)


def test_packets_with_their_verdicts(tmp_path: Path) -> None:
    with bench(tmp_path) as chain:
        chain.decide(tcp("192.0.2.1:40000", "192.0.2.2:80", b"GET / HTTP/1.0\r\n\r\n", time=1700000000.123456, indev=1))
        chain.decide(udp("[2001:db8::1]:5353", "[2001:db8::2]:9", b"odd", hook=Hook.OUTPUT, time=1700000001.0))
        chain.decide(icmp("192.0.2.1", "192.0.2.2", b"ping"))
    (path,) = tmp_path.glob("*.pcapng")
    assert path.name == "packets-0-000001.pcapng"
    assert read(path, "frame.time_epoch", "frame.comment", "ip.dst", "ipv6.dst", "tcp.dstport", "udp.dstport", "frame.len") == [
        ("1700000000.123456000", "INPUT accept in lo", "192.0.2.2", "", "80", "", "58"),
        ("1700000001.000000000", "OUTPUT drop", "", "2001:db8::2", "", "9", "51"),
        ("1000.000000000", "INPUT accept", "192.0.2.2", "", "", "", "32"),
    ]
    assert read(path, "http.request.method", "frame.packet_flags_direction")[:2] == [("GET", "0x00000001"), ("", "0x00000002")]


def test_a_packet_that_was_cut_keeps_its_length(tmp_path: Path) -> None:
    whole = tcp("192.0.2.1:40000", "192.0.2.2:80", bytes(1000))
    # No element in front of it reads headers: what cannot be read is captured too.
    with Bench("pcap", directory=str(tmp_path), snap=96) as chain:
        chain.decide(whole)
        chain.decide(Packet(whole.payload[:64], length=1040))
        chain.decide(Packet(b""))
    (path,) = tmp_path.glob("*.pcapng")
    assert read(path, "frame.len", "frame.cap_len") == [("1040", "96"), ("1040", "64"), ("0", "0")]


def test_files_rotate_by_size_and_number(tmp_path: Path) -> None:
    for _ in range(2):
        with bench(tmp_path, size="10kB", files=3, name="ring") as chain:
            for number in range(100):
                chain.decide(tcp("192.0.2.1:40000", f"192.0.2.2:{number + 1}", bytes(900)))
    names = sorted(path.name for path in tmp_path.glob("*.pcapng"))
    assert len(names) == 3
    assert names[-1] == "ring-0-000020.pcapng"
    assert [read(tmp_path / name, "tcp.dstport") for name in names][-1][-1] == ("100",)
    assert all(10_000 <= (tmp_path / name).stat().st_size < 11_100 for name in names[:-1])


def test_two_workers_do_not_write_into_one_file(tmp_path: Path) -> None:
    with bench(tmp_path) as first, bench(tmp_path) as second:
        for chain, port in ((first, 1), (second, 2), (first, 3)):
            chain.decide(tcp("192.0.2.1:40000", f"192.0.2.2:{port}"))
    assert read(tmp_path / "packets-0-000001.pcapng", "tcp.dstport") == [("1",), ("3",)]
    assert read(tmp_path / "packets-1-000001.pcapng", "tcp.dstport") == [("2",)]


def test_what_was_written_is_on_disk_a_second_later(tmp_path: Path) -> None:
    with bench(tmp_path) as chain:
        for number in range(3):
            chain.now = 1000.0 + number * 0.6
            chain.decide(tcp("192.0.2.1:40000", f"192.0.2.2:{number + 1}"))
        (path,) = tmp_path.glob("*.pcapng")
        assert read(path, "tcp.dstport") == [("1",), ("2",), ("3",)]


def test_a_folder_that_is_not_there_costs_packets_and_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    chain = bench(folder)
    for number in range(1, 101):
        chain.assert_accepted(tcp("192.0.2.1:40000", f"192.0.2.2:{number + 100}"))
    assert chain.lines == [f"pcap: {folder}: cannot write: No such file or directory; 1 packets missed; next try in 10 s"]
    folder.mkdir()
    chain.now += 11
    chain.decide(tcp("192.0.2.1:40000", "192.0.2.2:80"))
    chain.stop()
    assert chain.lines[-1] == "pcap: 100 packets are not in the files"
    (path,) = folder.glob("*.pcapng")
    assert read(path, "tcp.dstport") == [("80",)]


def ends(path: Path) -> list[Recorded]:
    """The packets of a file so far that end one side of a connection."""
    found: list[Recorded] = []
    # It may end within a packet.
    with path.open("rb") as file, contextlib.suppress(RecordingError):
        found.extend(each for each in packets(file) if each.payload and (Packet(each.payload).headers.tcp_flags or 0) & 1)
    return found


@pytest.mark.kernel
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_real_connection(netns: Namespace, tmp_path: Path, host: str) -> None:
    folder = tmp_path / "captures"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in (tmp_path, *tmp_path.parents):
        if os.stat(parent).st_uid == os.getuid() and str(parent) not in ("/", "/tmp"):
            parent.chmod(0o755)
    text = (
        '[queue.main]\nelements = ["pcap"]\n[element.pcap]\n'
        f'directory = "{folder}"\n[rules.app]\nqueue = "main"\ntcp_ports = [11000]\n'
    )
    agent = Agent(netns, tmp_path, text).ready()
    server = netns.start(sys.executable, str(SERVER), "echo", host, "11000", stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    netns.run("nc", "-N", host, "11000", input="x" * 5000)
    # No packet comes any more, and the agent runs: the whole connection is in the file soon, each packet on its way out and in.
    (path,) = until(lambda: list(folder.glob("*.pcapng")), "the file")
    until(lambda: len(ends(path)) == 4, "both ends of the connection are in the file")
    assert agent.stop() == 0
    rows = read(path, "frame.comment", "tcp.len", "tcp.dstport")
    assert {row[0] for row in rows} == {"OUTPUT accept out lo", "INPUT accept in lo"}
    # Each packet is seen on its way out and in.
    assert sum(int(length) for _, length, port in rows if port == "11000") == 10_000
