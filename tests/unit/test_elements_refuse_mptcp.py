"""`refuse-mptcp`: the option goes, and nothing else; and what `dpi` makes of MPTCP where it stays."""

from __future__ import annotations

import pytest
from forged import ALLOWED, ISN, PEER, POLICIES, made

from nfq_agent.checksum import mend
from nfq_agent.packet import Packet
from nfq_agent.soundness import MPTCP, tcp_options
from nfq_agent.testing import Bench, udp
from nfq_agent.verdict import ACCEPT

MSS = b"\2\4\5\xb4"
CAPABLE = b"\x1e\x04\x01\x00"
JOIN = b"\x1e\x0c\x10\x01" + bytes(8)
DSS = b"\x1e\x14\x20\x06" + bytes(16)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("options", [MSS + CAPABLE, CAPABLE + MSS, MSS + JOIN + b"\1\1\4\2", CAPABLE + MSS + CAPABLE])
@pytest.mark.parametrize("flags", ["S", "SA"])
def test_the_option_goes_and_nothing_else(family: int, options: bytes, flags: str) -> None:
    packet = made(b"", ISN, flags=flags, options=options, family=family)
    before = tcp_options(packet, packet.headers)
    changed = Bench("refuse-mptcp").assert_accepted(packet).payload
    assert changed is not None
    assert len(changed) == len(packet.payload)
    after = Packet(mend(changed))
    assert tcp_options(after, after.headers) == {kind: value for kind, value in before.items() if kind != MPTCP}
    assert after.headers == packet.headers


@pytest.mark.parametrize("options", [MSS, b"", b"\1\1\1", MSS + b"\x1e", MSS + b"\x1e\x01\1\1", b"\0" + CAPABLE])
def test_what_has_no_option_stays(options: bytes) -> None:
    assert Bench("refuse-mptcp").assert_accepted(made(b"", ISN, flags="S", options=options)) is ACCEPT


def test_only_connection_requests_change_and_no_verdict_does() -> None:
    assert Bench("refuse-mptcp").assert_accepted(made(b"x", ISN, options=DSS)) is ACCEPT
    assert Bench("refuse-mptcp").assert_accepted(udp("192.0.2.1:1", "192.0.2.2:2", b"x")) is ACCEPT
    assert Bench("refuse-mptcp").assert_accepted(Packet(b"\x45")) is ACCEPT
    Bench("refuse-mptcp", queue_default="drop").assert_dropped(made(b"", ISN, flags="S", options=CAPABLE))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("offer", [CAPABLE, JOIN])
@pytest.mark.parametrize("where", ["in the ACK", "with the data"])
def test_mptcp_is_a_conflict(policy: str, offer: bytes, where: str) -> None:
    bench = Bench("policy", before=[("dpi", {})], **POLICIES[policy])
    bench.assert_accepted(made(b"", ISN, flags="S", options=MSS + offer))
    if where == "in the ACK":
        bench.decide(made(b"", ISN + 1, flags="A", options=DSS))
        bench.assert_dropped(made(ALLOWED, ISN + 1))
    else:
        bench.assert_accepted(made(b"", ISN + 1, flags="A"))
        bench.assert_dropped(made(ALLOWED, ISN + 1, options=DSS))


def test_an_offer_that_is_not_taken_up_is_plain_tcp() -> None:
    bench = Bench("policy", before=[("dpi", {}), ("refuse-mptcp", {})], **POLICIES["allow-list"])
    assert bench.assert_accepted(made(b"", ISN, flags="S", options=MSS + CAPABLE)).payload is not None
    bench.assert_accepted(made(b"", ISN + 1, flags="A", ack=PEER + 1))
    bench.assert_accepted(made(ALLOWED, ISN + 1))
