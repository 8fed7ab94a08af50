"""Every parser on every opening, whole and cut anywhere: the right one finds it, no other claims it, nothing is guessed early."""

from __future__ import annotations

import time

import pytest
from examples import EXAMPLES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openings import OPENINGS, dns_query

from nfq_agent.protocols import MORE, NO, Found, dns, quic
from nfq_agent.protocols.known import PARSERS

IDS = list(OPENINGS)


@pytest.mark.parametrize("name", IDS)
def test_one_parser_finds_it(name: str) -> None:
    client, server, wanted = OPENINGS[name]
    results = [result for parser in PARSERS if isinstance(result := parser(client, server), Found)]
    assert len(results) == 1
    facts = results[0].facts
    assert {key: facts.get(key) for key in wanted} == wanted
    assert results[0].decided


@pytest.mark.parametrize("name", IDS)
def test_every_prefix_is_open_and_says_nothing_else(name: str) -> None:
    client, server, wanted = OPENINGS[name]
    (right,) = [parser for parser in PARSERS if isinstance(parser(client, server), Found)]
    pieces = [(client[:end], server) for end in range(len(client))] or [(b"", server[:end]) for end in range(len(server))]
    for early, answer in pieces:
        result = right(early, answer)
        assert result is not NO, (early, answer)
        if isinstance(result, Found):
            # What is said early stays true.
            assert {key: value for key, value in result.facts.items() if key in wanted}.items() <= wanted.items()
        for other in PARSERS:
            if other is not right:
                assert not isinstance(other(early, answer), Found), (other.__module__, early)


NOISE = st.binary(max_size=600)
SHAPED = st.builds(
    lambda opening, cut, put, at: opening[:at] + put + opening[at + cut :],
    st.sampled_from([client for client, _, _ in OPENINGS.values() if client]),
    st.integers(0, 8),
    st.binary(max_size=8),
    st.integers(0, 600),
)


@settings(max_examples=EXAMPLES * 4)
@given(NOISE | SHAPED, NOISE | SHAPED)
def test_no_bytes_make_a_parser_raise(client: bytes, server: bytes) -> None:
    for parser in PARSERS:
        result = parser(client, server)
        assert result in (MORE, NO) or result.facts["protocol"]


@settings(max_examples=EXAMPLES * 4)
@given(NOISE, st.booleans())
@example(dns_query("a" * 63 + ".test"), True)
def test_no_datagram_makes_dns_raise(data: bytes, known: bool) -> None:
    result = dns.datagram(data, known)
    assert result is NO or (isinstance(result, Found) and result.facts["dns_name"] is not None)


@settings(max_examples=EXAMPLES * 2)
@given(st.binary(max_size=64), st.integers(0, 255))
def test_no_datagram_makes_quic_raise(head: bytes, first: int) -> None:
    datagram = bytes((first | 0xC0,)) + b"\0\0\0\1\x08" + head + bytes(1300 - len(head))
    assert quic.Connections().add(datagram, 1.0) == []


# What costs most for its bytes, in each format that has lists, lines or pointers.
WORST = {
    "records of one byte": b"\x16\3\1\0\1\1" + b"\x16\3\1\0\1\0" * 2700,
    "empty lines": b"\r\n" * 8192,
    "fields without end": b"GET / HTTP/1.1\r\n" + b"a:\n" * 5450,
    "hosts": b"GET / HTTP/1.1\r\n" + b"Host: a\r\n" * 1800 + b"\r\n",
    "one long token": b"A" * 16384,
    "a long target": b"GET " + b"/" * 16380,
    "lines before a banner": b"x\r\n" * 5461,
    "dots": b"EHLO " + b"a." * 8000,
    "parameters": b"\0\0\x27\x10\0\3\0\0" + b"a\0" * 4996,
    "stars": b"*" * 16384,
    "pointers": b"\x3f\xfe\0\1\1\0\0\1\xff\xff\0\0\0\0" + b"\1a" * 126 + b"\0\0\1\0\1" + b"\xc0\x0c\0\1\0\1\0\0\0\0\0\0" * 1340,
}


@pytest.mark.parametrize("name", list(WORST))
def test_the_worst_bytes_cost_little(name: str) -> None:
    data = WORST[name][:16384]
    for parser in PARSERS:
        for client, server in ((data, b""), (b"", data)):
            costs = []
            for _ in range(3):
                start = time.process_time()
                parser(client, server)
                costs.append(time.process_time() - start)
            # Measured: at most 3 ms of CPU; quadratic work over 16 KiB would be seconds.
            assert min(costs) < 0.05, parser.__module__
