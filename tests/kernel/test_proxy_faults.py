"""The faults that toxiproxy has, as curl and netcat see them between themselves and a web server."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest
from namespace import Namespace
from proxied import configuration
from proxy_process import Run
from tcp_client import server

pytestmark = pytest.mark.kernel

# What curl says of a connection that was reset: while it sends, or while it receives.
_RESET = (55, 56)
_PAGE = bytes(range(250)) * 8000
_FAULTS = """
[element.timeout]
after = "300ms"
[element.at-once]
type = "reset-after"
[element.reset-after]
after = "300ms"
[element.limit-bytes]
bytes = 1000
way = "response"
[element.slicer]
size = 50000
[element.slow-close]
by = "300ms"
way = "response"
[element.limit]
bytes_per_second = 1_000_000
way = "response"
"""


@pytest.fixture
def page(netns: Namespace, tmp_path: Path) -> Path:
    """A page of two megabytes on port 8080, from Python's web server, which writes its log beside it."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "page").write_bytes(_PAGE)
    with (tmp_path / "served").open("w") as log:
        netns.start(sys.executable, "-m", "http.server", "-d", str(folder), "8080", stdout=-3, stderr=log)
    netns.shell("until ss -ltnH sport = :8080 | grep -q .; do sleep 0.05; done")
    return tmp_path / "served"


def fetch(netns: Namespace, into: Path) -> tuple[int, bytes, float]:
    """curl's exit code, what it got with the head of the answer, and how long that took."""
    began = time.monotonic()
    done = netns.run(
        "curl", "-sS", "-i", "--max-time", "90", "--noproxy", "*", "-o", str(into), "http://127.0.0.1:8080/page", check=False
    )
    got = into.read_bytes() if into.exists() else b""
    return done.returncode, got, time.monotonic() - began


def test_timeout(netns: Namespace, run: Run, page: Path, tmp_path: Path) -> None:
    run(configuration(proxy='elements = ["timeout"]', rest=_FAULTS))
    code, got, seconds = fetch(netns, tmp_path / "got")
    assert code in _RESET
    assert got == b""
    assert seconds >= 0.3
    assert "GET" not in page.read_text()


def test_limit_bytes(netns: Namespace, run: Run, page: Path, tmp_path: Path) -> None:
    run(configuration(proxy='elements = ["limit-bytes"]', rest=_FAULTS))
    code, got, _ = fetch(netns, tmp_path / "got")
    assert code in _RESET
    assert len(got) == 1000
    assert got.startswith(b"HTTP/1.0 200 ")


def test_reset_after_a_time(netns: Namespace, run: Run, page: Path, tmp_path: Path) -> None:
    """A page that takes two seconds is cut: what came before the reset is whole, and the server is told, too."""
    proxy = run(configuration(proxy='elements = ["limit", "reset-after"]', rest=_FAULTS))
    code, got, seconds = fetch(netns, tmp_path / "got")
    assert code in _RESET
    assert seconds >= 0.3
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 ")
    assert 0 < len(body) < len(_PAGE)
    assert body == _PAGE[: len(body)]
    proxy.wait_count("reset", 1)


def test_reset_at_once(netns: Namespace, run: Run, page: Path, tmp_path: Path) -> None:
    """With after = "0" the server sees no connection."""
    proxy = run(configuration(proxy='elements = ["at-once"]', rest=_FAULTS))
    code, got, _ = fetch(netns, tmp_path / "got")
    # The reset may come before curl looks whether it is connected.
    assert code in (7, *_RESET)
    assert got == b""
    proxy.wait_count("connections", 1)
    assert page.read_text() == ""


def test_reset_after_while_nothing_is_said(netns: Namespace, run: Run) -> None:
    """A connection that is idle is reset in time, at both ends."""
    run(configuration(proxy='elements = ["reset-after"]', rest=_FAULTS))

    def play() -> tuple[str, str, float]:
        with socket.create_server(("127.0.0.1", 8080)) as listener:
            began = time.monotonic()
            client = socket.create_connection(("127.0.0.1", 8080), timeout=60)
            there, _ = listener.accept()
            there.settimeout(60)
            with client, there:
                ends = []
                for end in (client, there):
                    try:
                        ends.append(f"end after {end.recv(1)!r}")
                    except ConnectionResetError:
                        ends.append("reset")
                return ends[0], ends[1], time.monotonic() - began

    first, second, seconds = netns.call(play)
    assert (first, second) == ("reset", "reset")
    assert seconds >= 0.3


def test_slicer(netns: Namespace, run: Run, page: Path, tmp_path: Path) -> None:
    run(configuration(proxy='elements = ["slicer"]', rest=_FAULTS))
    code, got, seconds = fetch(netns, tmp_path / "got")
    assert code == 0
    assert got.partition(b"\r\n\r\n")[2] == _PAGE
    # Forty pieces, a millisecond between two.
    assert seconds >= 0.039


def test_slicer_sends_each_piece_by_itself(netns: Namespace, run: Run) -> None:
    """What goes to the server, segment by segment: each is one piece, and ten of them take nine delays."""
    small = '[element.small]\ntype = "slicer"\nsize = 10\ndelay = "20ms"\nway = "request"\n'
    run(configuration(proxy='elements = ["small"]', rest=small))
    sent = bytes(range(100))

    def play() -> tuple[bytes, list[int], float]:
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        wire.bind(("lo", 0))
        with socket.create_server(("127.0.0.1", 8080)) as listener, wire:
            began = time.monotonic()
            client = socket.create_connection(("127.0.0.1", 8080), timeout=60)
            client.sendall(sent)
            there, _ = listener.accept()
            there.settimeout(60)
            got, lengths = b"", []
            port = there.getpeername()[1]
            while len(got) < len(sent):
                got += there.recv(1000)
            seconds = time.monotonic() - began
            wire.setblocking(False)
            while True:
                try:
                    packet, where = wire.recvfrom(65536)
                except BlockingIOError:
                    break
                head = (packet[0] & 15) * 4
                data = packet[head + (packet[head + 12] >> 4) * 4 :]
                # Each packet of the loopback is seen going out and coming in.
                if data and where[2] == 0 and packet[9] == 6 and int.from_bytes(packet[head : head + 2]) == port:
                    lengths.append(len(data))
            client.close()
            there.close()
            return got, lengths, seconds

    got, lengths, seconds = netns.call(play)
    assert got == sent
    # One may be sent again.
    assert set(lengths) == {10}
    assert seconds >= 0.18


def test_slow_close(netns: Namespace, run: Run) -> None:
    """netcat waits for the end, which comes later than the last byte."""
    server(netns, "echo")
    run(configuration(proxy='elements = ["slow-close"]', rest=_FAULTS))
    began = time.monotonic()
    assert netns.shell("echo hello | nc -N 127.0.0.1 8080") == "hello\n"
    assert time.monotonic() - began >= 0.3
