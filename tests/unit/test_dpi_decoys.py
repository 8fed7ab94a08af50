"""Decoys: what a receiver discards is not believed, and what is sent again has to be the same. Beside them, honest repeats."""

from __future__ import annotations

from typing import Any

import pytest
from examples import EXAMPLES
from forged import ALLOWED, CLIENT, CLIENT6, DENIED, ISN, PEER, POLICIES, SERVER, SERVER6, made, opened, request, stamp
from hypothesis import given, settings
from hypothesis import strategies as st

from nfq_agent.earlier import Belongs, Earlier
from nfq_agent.packet import Packet
from nfq_agent.protocols import quic_keys
from nfq_agent.read_bytes import MOST, ReadBytes
from nfq_agent.soundness import tcp_options
from nfq_agent.testing import Bench, tcp, udp

FORGED: dict[str, dict[str, Any]] = {
    "checksum": {"wrong": True},
    "no flags": {"flags": ""},
    "no ack": {"flags": "P"},
    "reset": {"flags": "RA"},
    "syn and fin": {"flags": "SF"},
    "md5": {"options": b"\x13\x12" + bytes(16)},
    "ao": {"options": b"\x1d\x10" + bytes(14)},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("forged", FORGED)
def test_what_the_receiver_discards_is_not_believed(policy: str, both: bool, family: int, forged: str) -> None:
    bench = opened(policy, family=family, both=both)
    bench.decide(made(ALLOWED, ISN + 1, family=family, **FORGED[forged]))
    bench.assert_dropped(made(DENIED, ISN + 1, family=family))
    # Nor does it harm an honest connection.
    bench = opened(policy, family=family, both=both)
    bench.decide(made(DENIED, ISN + 1, family=family, **FORGED[forged]))
    bench.assert_accepted(made(ALLOWED, ISN + 1, family=family))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("forged", [each for each in FORGED if FORGED[each].get("flags") != "SF"])
def test_a_client_that_offers_mptcp_in_vain_is_believed_no_decoy(policy: str, family: int, forged: str) -> None:
    """MP_CAPABLE in the SYN (RFC 8684 3.1); the server answers without, so that the rest is plain TCP."""
    src, dst = (CLIENT, SERVER) if family == 4 else (CLIENT6, SERVER6)
    for decoy, real in ((ALLOWED, DENIED), (DENIED, ALLOWED)):
        bench = Bench("policy", before=[("dpi", {})], **POLICIES[policy])
        bench.assert_accepted(made(b"", ISN, flags="S", options=b"\x1e\x04\x01\x00", family=family))
        bench.assert_accepted(tcp(dst, src, flags="SA", seq=PEER, ack=ISN + 1))
        bench.assert_accepted(made(b"", ISN + 1, flags="A", family=family))
        bench.decide(made(decoy, ISN + 1, family=family, **FORGED[forged]))
        judged = bench.assert_accepted if real is ALLOWED else bench.assert_dropped
        judged(made(real, ISN + 1, family=family))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("decoy", [ALLOWED, request("a.good.test"), b"\xff\xfe\xfd of no protocol"], ids=["tls", "http", "none"])
@pytest.mark.parametrize("real", [DENIED, request("a.evil.test")], ids=["tls", "http"])
def test_what_is_sent_again_has_to_be_the_same(policy: str, both: bool, decoy: bytes, real: bytes) -> None:
    """A decoy that shows nothing, as with a hop limit that ends on the way, with all that may be of another protocol."""
    bench = opened(policy, both=both)
    bench.decide(made(decoy, ISN + 1))
    bench.decide(made(real[:20], ISN + 1))
    bench.assert_dropped(made(real[20:], ISN + 21))
    bench.assert_dropped(made(real, ISN + 1))


@pytest.mark.parametrize("policy", POLICIES)
def test_old_timestamps_and_none(policy: str) -> None:
    for decoy in (stamp(5_000), b""):
        bench = opened(policy, options=stamp(10_000))
        bench.assert_accepted(made(ALLOWED[:10], ISN + 1, options=stamp(10_005)))
        bench.assert_dropped(made(ALLOWED[10:], ISN + 11, options=decoy))
        bench.assert_dropped(made(DENIED[10:], ISN + 11, options=stamp(10_006)))
    # Segments that overtake each other have stamps in another order, which is not an offence.
    bench = opened(policy, options=stamp(10_000))
    bench.decide(made(ALLOWED[300:], ISN + 301, options=stamp(10_009)))
    bench.assert_accepted(made(ALLOWED[:300], ISN + 1, options=stamp(10_005)))


def test_a_connection_with_signatures_from_its_syn_on_is_read() -> None:
    signature = b"\x13\x12" + bytes(16)
    bench = opened("allow-list", options=signature)
    bench.assert_accepted(made(ALLOWED, ISN + 1, options=signature))
    assert bench.flows.observe(made(b"", 1).headers.five_tuple, 1.0).facts["tls_sni"] == "a.good.test"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("closing", ["", "R", "FA"])
@pytest.mark.parametrize("gap", [1 << 29, len(ALLOWED), len(ALLOWED) + 30, -30])
@pytest.mark.parametrize("before", [b"", ALLOWED])
def test_another_connection_that_no_server_hears_of(policy: str, closing: str, gap: int, before: bytes) -> None:
    """Only the client's packets are seen.

    Where the numbers of the other connection are near the real ones, far off, or after it.
    """
    bench = opened(policy, both=False)
    if before:
        bench.decide(made(before, ISN + 1))
    if closing:
        bench.decide(made(b"", ISN + 1, flags=closing))
    first = ISN + 1 - gap
    bench.decide(made(b"", first - 1, flags="S"))
    bench.decide(made(ALLOWED, first))
    bench.decide(made(DENIED[:40], ISN + 1))
    bench.assert_dropped(made(DENIED[40:], ISN + 41))
    bench.assert_dropped(made(DENIED, ISN + 1))
    bench.assert_dropped(made(DENIED, ISN + 1))
    # Once for the connection, however often its segments come.
    assert sum(line.startswith("dpi") and "overlap differ" in line for line in bench.lines) <= 1


def test_many_connections_on_one_five_tuple_are_honest() -> None:
    """Each number may be anything, and each connection sends much: a number of an earlier one comes up, and says nothing."""
    bench = opened("allow-list", both=False)
    for number in range(1, 60):
        isn = number * 300_000
        bench.assert_accepted(made(b"", isn, flags="S"))
        bench.assert_accepted(made(ALLOWED, isn + 1))
        for at in range(0, 200_000, 20_000):
            bench.assert_accepted(made(b"\x17\3\3\x40" + bytes(19_996), isn + 1 + len(ALLOWED) + at))
        bench.assert_accepted(made(b"", isn + 1 + len(ALLOWED) + 200_000, flags="FA"))


def test_a_server_that_answers_ends_the_doubt() -> None:
    bench = opened("allow-list")
    bench.assert_accepted(made(ALLOWED, ISN + 1))
    bench.assert_accepted(made(b"", ISN + 1 + len(ALLOWED), flags="FA"))
    isn = ISN - 100
    bench.assert_accepted(made(b"", isn, flags="S"))
    bench.assert_accepted(tcp(SERVER, CLIENT, flags="SA", seq=PEER, ack=isn + 1))
    bench.assert_accepted(made(ALLOWED, isn + 1))


def test_what_the_server_acknowledged_is_kept_no_more() -> None:
    bench = opened("allow-list")
    bench.assert_accepted(made(ALLOWED, ISN + 1))
    dpi: Any = bench.elements[0]
    assert len(dpi.kept.compared) == 1
    bench.assert_accepted(tcp(SERVER, CLIENT, flags="A", seq=PEER + 1, ack=ISN + 1 + len(ALLOWED)))
    assert not dpi.kept.compared
    # A wrong checksum acknowledges nothing.
    bench = opened("allow-list")
    bench.assert_accepted(made(ALLOWED, ISN + 1))
    broken = bytearray(tcp(SERVER, CLIENT, flags="A", seq=PEER + 1, ack=ISN + 1 + len(ALLOWED)).payload)
    broken[36] ^= 1
    bench.decide(Packet(bytes(broken)))
    bench.assert_dropped(made(DENIED, ISN + 1))


def test_connections_that_are_compared_are_bounded() -> None:
    bench = Bench("dpi", openings=10)
    dpi: Any = bench.element
    for port in range(1, 31):
        src = f"192.0.2.1:{port}"
        bench.decide(tcp(src, SERVER, flags="S", seq=ISN))
        bench.decide(tcp(src, SERVER, ALLOWED, seq=ISN + 1))
    assert len(dpi.kept.compared) == 10


def test_a_request_that_was_pushed_out_does_not_come_again() -> None:
    """After 16 KiB of requests without an acknowledgement the first cannot be compared any more, and is not let pass."""
    bench = opened("allow-list", both=False)
    one = request("a.good.test")
    for number in range(MOST // len(one) + 2):
        bench.assert_accepted(made(one, ISN + 1 + number * len(one)))
    bench.assert_dropped(made(request("a.evil.test"), ISN + 1))


@settings(max_examples=EXAMPLES * 3 // 5)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 900)), max_size=12), st.integers(0, 0xFFFFFFFF), st.booleans())
@pytest.mark.parametrize("kind", ["tls", "http"])
def test_honest_repeats_are_never_refused(kind: str, again: list[tuple[int, int]], isn: int, both: bool) -> None:
    bench = opened("allow-list", isn=isn, both=both)
    data = ALLOWED + bytes(400) if kind == "tls" else request("a.good.test") * 12
    bench.assert_accepted(made(data, isn + 1))
    for at, size in again:
        bench.assert_accepted(made(data[at : at + size], isn + 1 + at))


def test_fast_open_that_the_server_does_not_take_is_sent_again() -> None:
    bench = Bench("policy", before=[("dpi", {})], **POLICIES["allow-list"])
    bench.assert_accepted(made(ALLOWED, ISN, flags="S"))
    bench.assert_accepted(tcp(SERVER, CLIENT, flags="SA", seq=PEER, ack=ISN + 1))
    bench.assert_accepted(made(ALLOWED, ISN + 1))
    bench = Bench("policy", before=[("dpi", {})], **POLICIES["allow-list"])
    bench.assert_accepted(made(ALLOWED, ISN, flags="S"))
    bench.assert_accepted(tcp(SERVER, CLIENT, flags="SA", seq=PEER, ack=ISN + 1))
    bench.assert_dropped(made(DENIED, ISN + 1))


def test_the_options_of_a_segment() -> None:
    options = b"\2\4\5\xb4" + b"\1\3\3\7" + b"\x13\x12" + bytes(16)
    packet = made(b"x", 1, options=options)
    assert tcp_options(packet, packet.headers) == {2: b"\5\xb4", 3: b"\7", 19: bytes(16)}
    for broken in (b"\2\1", b"\2\xff", b"\2", b"\0\2\4\5\xb4"):
        packet = made(b"", 1, options=b"\1\1" + broken)
        assert tcp_options(packet, packet.headers) == {}


@settings(max_examples=EXAMPLES * 2)
@given(st.binary(min_size=1, max_size=60), st.integers(0, 0xFFFFFFFF), st.integers(-70, 70), st.integers(1, 70), st.data())
def test_read_bytes_against_a_plain_model(data: bytes, first: int, at: int, size: int, draw: st.DataObject) -> None:
    kept = ReadBytes()
    kept.add(first, data)
    segment = bytes(data[at + n] if 0 <= at + n < len(data) else 0 for n in range(size))
    assert not kept.differs(first + at & 0xFFFFFFFF, segment)
    inside = [n for n in range(size) if 0 <= at + n < len(data)]
    if inside:
        place = draw.draw(st.sampled_from(inside))
        changed = segment[:place] + bytes((segment[place] ^ 1,)) + segment[place + 1 :]
        assert kept.differs(first + at & 0xFFFFFFFF, changed)
    kept.acknowledge(first + len(data) & 0xFFFFFFFF)
    assert kept.held == 0


def test_too_many_connections_that_no_server_answers() -> None:
    earlier = Earlier((), 0)
    for number in range(64):
        earlier = earlier.and_then(1, 2, number * 1000)
    assert earlier.of(earlier.places[-1][1] + 500_000, 1) is Belongs.LATEST
    assert earlier.and_then(1, 2, 5).of(6, 1) is Belongs.EARLIER


def test_a_second_quic_flight_with_the_same_connection_id_and_another_name() -> None:
    if not quic_keys.AVAILABLE:
        pytest.skip("the Python package cryptography is not installed")
    from aioquic.quic.configuration import QuicConfiguration  # noqa: PLC0415  # needs cryptography
    from aioquic.quic.connection import QuicConnection  # noqa: PLC0415  # needs cryptography

    def flight(name: str) -> bytes:
        client = QuicConnection(configuration=QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name=name))
        client._peer_cid.cid = client._original_destination_connection_id = b"8 or more"  # noqa: SLF001  # no public way
        client.connect(("192.0.2.1", 443), now=0.0)
        return client.datagrams_to_send(now=0.0)[0][0]

    for options in POLICIES.values():
        bench = Bench("policy", before=[("dpi", {})], **options)
        allowed = flight("a.good.test")
        bench.assert_accepted(udp(CLIENT, SERVER, allowed))
        bench.assert_accepted(udp(CLIENT, SERVER, allowed))
        bench.assert_dropped(udp(CLIENT, SERVER, flight("a.evil.test")))
        # What is of the first name is not let pass any more either: which of them the server took is not known.
        bench.assert_dropped(udp(CLIENT, SERVER, allowed))


def test_early_data_does_not_use_up_what_a_hello_may_take() -> None:
    """As a browser sends it: a hello in two Initial packets, the second of which is late, and much 0-RTT before it."""
    if not quic_keys.AVAILABLE:
        pytest.skip("the Python package cryptography is not installed")
    from aioquic.quic.configuration import QuicConfiguration  # noqa: PLC0415  # needs cryptography
    from aioquic.quic.connection import QuicConnection  # noqa: PLC0415  # needs cryptography

    many = ["h3", *[f"alpn-{number:03}-{'x' * 40}" for number in range(30)]]
    configuration = QuicConfiguration(is_client=True, alpn_protocols=many, server_name="a.good.test")
    client = QuicConnection(configuration=configuration)
    client.connect(("192.0.2.1", 443), now=0.0)
    first, *rest = [datagram for datagram, _ in client.datagrams_to_send(now=0.0)]
    assert rest
    # Type 1 of the long header is 0-RTT (RFC 9000 17.2.3).
    early = bytes((0xD0,)) + first[1 : 7 + first[5]] + b"\0" + b"\x44\xb0" + bytes(1200)
    for options in POLICIES.values():
        bench = Bench("policy", before=[("dpi", {})], **options)
        bench.assert_accepted(udp(CLIENT, SERVER, first))
        for _ in range(60):
            bench.assert_dropped(udp(CLIENT, SERVER, early))
        for datagram in rest:
            bench.assert_accepted(udp(CLIENT, SERVER, datagram))
        for _ in range(60):
            bench.assert_accepted(udp(CLIENT, SERVER, early))


def test_a_datagram_with_a_wrong_checksum_is_not_believed() -> None:
    bench = Bench("dpi")
    packet = bytearray(udp(CLIENT, "198.51.100.1:53", b"\0\7\1\0\0\1\0\0\0\0\0\0\1a\0\0\1\0\1").payload)
    packet[-2] ^= 1
    bench.decide(Packet(bytes(packet)))
    flow = bench.flows.observe(Packet(bytes(packet)).headers.five_tuple, 1.0)
    assert flow.unsound == "a wrong checksum"
    assert flow.facts == {"dpi": "undecided"}
