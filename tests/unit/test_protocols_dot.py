"""DNS over TLS: TLS with the fact `dot`, by what the client offers or by the server's port."""

from __future__ import annotations

import pytest
from openings import client_hello

from nfq_agent.testing import Bench, tcp
from nfq_agent.verdict import Action

CLIENT = "192.0.2.1:40000"


@pytest.mark.parametrize(
    ("server", "alpn", "found"),
    [
        ("198.51.100.1:853", (), True), ("198.51.100.1:853", ("dot",), True), ("198.51.100.1:4430", ("dot",), True),
        ("198.51.100.1:443", (), False), ("198.51.100.1:443", ("h2",), False),
    ],
)  # fmt: skip
def test_dns_over_tls(server: str, alpn: tuple[str, ...], found: bool) -> None:
    rule = [{"action": "drop", "dot": True}, {"action": "accept", "protocol": "tls"}]
    bench = Bench("policy", before=[("dpi", {})], default="drop", rule=rule)
    bench.decide(tcp(CLIENT, server, flags="S", seq=0))
    hello = tcp(CLIENT, server, client_hello("dns.good.test", alpn=alpn), seq=1)
    assert (bench.decide(hello).action is Action.DROP) is found
    flow = bench.flows.find(hello.headers.five_tuple)
    assert flow is not None
    assert (flow.facts["protocol"], flow.facts.get("dot")) == ("tls", found or None)


def test_it_is_no_protocol_of_its_own() -> None:
    with pytest.raises(ValueError, match="not a known protocol"):
        Bench("policy", before=[("dpi", {})], rule=[{"action": "drop", "protocol": "dot"}])
