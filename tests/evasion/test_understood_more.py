"""What a server understood is what we judged, for TLS (OpenSSL) and DNS over UDP (dnsmasq): messages as hypothesis alters them.

As in test_understood.py the policy decides which bytes arrive, and the real server is given exactly those.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from agent import until
from captures import certificate, listening
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from namespace import Namespace
from openings import dns_query, made_hello, numbers, record, server_name

from nfq_agent.testing import Bench, tcp, udp
from nfq_agent.verdict import Action

pytestmark = pytest.mark.kernel

ALLOWED, DENIED = "a.allowed.test", "b.refused.test"
CLIENT = "192.0.2.1:40000"
EXAMPLES = int(os.environ.get("EXAMPLES", "100"))
SETTINGS = settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 100, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = pytest.mark.parametrize("kind", ["allow-list", "block-list"])


def policy(kind: str, fact: str) -> Bench:
    allow = kind == "allow-list"
    # dnsmasq's --address takes the domain itself too.
    rule = [{"action": "accept" if allow else "drop", fact: "*.allowed.test" if allow else ["refused.test", "*.refused.test"]}]
    return Bench("policy", before=[("dpi", {})], default="drop" if allow else "accept", rule=rule)


@st.composite
def altered(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with up to two small changes."""
    whole = bytearray(data)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(whole) - 1))
        whole[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(whole)


# Records that one server or another passes over: empty ones, a ChangeCipherSpec, a warning.
BETWEEN = [b"\x16\3\1\0\0", b"\x14\3\1\0\0", b"\x14\3\1\0\1\1", b"\x15\3\1\0\2\1\x5a", b"\x17\3\1\0\0"]


@st.composite
def hellos(draw: st.DrawFn) -> list[bytes]:
    """A ClientHello in records and segments."""
    names = draw(
        st.lists(st.sampled_from([ALLOWED, DENIED, DENIED.upper(), f"{DENIED}.", f"{DENIED}:80"]), min_size=1, max_size=2)
    )
    others = [numbers(10, 0x1D, 0x17), numbers(13, 0x0403, 0x0804, 0x0401), (0x0A0A, draw(st.binary(max_size=3)))]
    extensions = draw(st.permutations([*others, *(server_name(name.encode()) for name in names)]))
    hello = made_hello((0xC02F, 0xC02B, 0x009C), extensions)
    whole = record(hello[5:], draw(st.sampled_from([16384, 60, 20])))
    size = 5 + int.from_bytes(whole[3:5], "big")
    between = b"".join(draw(st.lists(st.sampled_from(BETWEEN), max_size=2)))
    at = draw(st.sampled_from([0, size]))
    data = draw(altered(whole[:at] + between + whole[at:]))
    cuts = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=3))})
    return [data[start:end] for start, end in pairwise(cuts)]


@pytest.fixture(scope="module")
def openssl(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, list[str]]:
    """OpenSSL as a server, and the names that it was asked for."""
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    asked: list[str] = []
    context.sni_callback = lambda _, name, __: asked.append((name or "").lower().rstrip("."))
    return context, asked


def tells(openssl: tuple[ssl.SSLContext, list[str]], data: bytes) -> list[str]:
    """The names that OpenSSL reads in what arrives."""
    context, asked = openssl
    asked.clear()
    incoming = ssl.MemoryBIO()
    server = context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write(data)
    with contextlib.suppress(ssl.SSLError, ValueError, UnicodeError):
        server.do_handshake()
    return list(asked)


def plain_hello(name: str) -> list[bytes]:
    extensions = [server_name(name.encode()), numbers(10, 0x1D, 0x17), numbers(13, 0x0403, 0x0804, 0x0401)]
    return [made_hello((0xC02F, 0xC02B, 0x009C), extensions)]


def test_openssl_says_what_it_understood(openssl: tuple[ssl.SSLContext, list[str]]) -> None:
    assert tells(openssl, plain_hello(DENIED)[0]) == [DENIED]


@SETTINGS
@given(hellos())
@example(plain_hello(DENIED))
@example([b"\x16\3\5" + plain_hello(DENIED)[0][3:]])
@example([BETWEEN[0] + plain_hello(DENIED)[0]])
@example([BETWEEN[1] + plain_hello(DENIED)[0]])
@KINDS
def test_openssl_reads_no_denied_name(openssl: tuple[ssl.SSLContext, list[str]], kind: str, segments: list[bytes]) -> None:
    bench = policy(kind, "tls_sni")
    bench.decide(tcp(CLIENT, "198.51.100.1:443", flags="S", seq=0))
    passed = b""
    for segment in segments:
        if bench.decide(tcp(CLIENT, "198.51.100.1:443", segment, seq=1 + len(passed))).action is not Action.ACCEPT:
            break
        passed += segment
    assert DENIED not in tells(openssl, passed), passed


@pytest.fixture(scope="module")
def dnsmasq() -> Iterator[Namespace]:
    """dnsmasq on loopback, with an address of its own for the denied names."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with Namespace() as namespace:
        namespace.start(
            "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=",
            "--address=/allowed.test/192.0.2.7", "--address=/refused.test/192.0.2.66", **quiet,
        )  # fmt: skip
        until(partial(listening, namespace, 53, "-u"), "dnsmasq listens")
        yield namespace


def answers(datagrams: list[bytes]) -> bytes:
    """All that dnsmasq sends back; the last query is a plain one, which is always answered."""
    last = dns_query(ALLOWED, number=0xFFFF)
    got = b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", 53))
        client.settimeout(60)
        for datagram in (*datagrams, last):
            client.send(datagram)
        while True:
            data = client.recv(2000)
            if data[:2] == b"\xff\xff":
                return got
            got += data


@st.composite
def queries(draw: st.DrawFn) -> list[bytes]:
    """One to three queries from a port."""
    found = []
    for number in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([ALLOWED, DENIED, DENIED.upper()]))
        query = bytearray(
            dns_query(name, draw(st.sampled_from([1, 28, 255])), number + 1, flags=draw(st.sampled_from([0x0100, 0x0140])))
        )
        if draw(st.booleans()):
            query[draw(st.sampled_from([5, 7, 9, 11]))] = draw(st.integers(0, 2))
        found.append(draw(altered(bytes(query))) + draw(st.sampled_from([b"", b"\0", dns_query(DENIED)])))
    return found


@SETTINGS
@given(queries())
@example([dns_query(DENIED)])
@example([dns_query(ALLOWED), dns_query(DENIED)])
# Two bytes fewer: "b" becomes a part of ARCOUNT, and the name is refused.test.
@example([dns_query(DENIED)[:10] + dns_query(DENIED)[12:]])
@KINDS
def test_dnsmasq_answers_for_no_denied_name(dnsmasq: Namespace, kind: str, datagrams: list[bytes]) -> None:
    bench = policy(kind, "dns_name")
    passed = [each for each in datagrams if bench.decide(udp(CLIENT, "198.51.100.1:53", each)).action is Action.ACCEPT]
    assert socket.inet_aton("192.0.2.66") not in (dnsmasq.call(answers, passed) if passed else b""), passed


def test_dnsmasq_says_what_it_understood(dnsmasq: Namespace) -> None:
    assert socket.inet_aton("192.0.2.66") in dnsmasq.call(answers, [dns_query(DENIED)])
