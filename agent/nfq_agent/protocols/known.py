"""The table of all protocols, and what follows from it. A protocol is added by its module and one line here."""

from __future__ import annotations

from typing import Final

from nfq_agent.protocols import (
    Found,
    Parser,
    Protocol,
    bittorrent,
    dns,
    dot,
    ftp,
    http1,
    imap,
    mqtt,
    ntp,
    openvpn,
    pop3,
    postgresql,
    quic,
    rdp,
    redis,
    smtp,
    socks,
    ssh,
    starttls,
    stun,
    tls,
    wireguard,
    xmpp,
)  # fmt: skip

# The most usual first; no two of them find anything in the same bytes.
PROTOCOLS: Final[tuple[Protocol, ...]] = (
    tls.PROTOCOL, quic.PROTOCOL, http1.PROTOCOL, ssh.PROTOCOL, postgresql.PROTOCOL, redis.PROTOCOL, mqtt.PROTOCOL,
    smtp.PROTOCOL, imap.PROTOCOL, pop3.PROTOCOL, ftp.PROTOCOL, xmpp.PROTOCOL, rdp.PROTOCOL, socks.PROTOCOL, bittorrent.PROTOCOL,
    openvpn.PROTOCOL, wireguard.PROTOCOL, stun.PROTOCOL, ntp.PROTOCOL, dns.PROTOCOL,
    dot.PROTOCOL,
)  # fmt: skip
BY_NAME: Final = {protocol.name: protocol for protocol in PROTOCOLS}
PARSERS: Final[tuple[Parser, ...]] = tuple(protocol.parse for protocol in PROTOCOLS if protocol.parse is not None)
# Of UDP; dns and quic are read message by message, by datagrams.py.
DATAGRAMS: Final = tuple(
    protocol.datagram for protocol in PROTOCOLS if protocol.datagram is not None and protocol is not dns.PROTOCOL
)
# Every fact that a protocol sets, with the protocol that declares it.
OWNERS: Final = {fact: protocol for protocol in PROTOCOLS for fact in protocol.facts}
# Facts that are compared without case (RFC 4343).
HOSTS: Final = frozenset(fact for protocol in PROTOCOLS for fact in protocol.hosts)
# The fact that names a flow in one word, the most telling first.
HEADLINES: Final = tuple(protocol.headline for protocol in PROTOCOLS if protocol.headline)


def lookout_behind(found: Found, opening: bytes) -> Parser | None:
    """What searches the bytes behind the last message that is read; None behind one of TLS."""
    protocol = found.facts.get("protocol", "tls")
    if protocol == "tls" or "ja3" in found.facts:
        return None
    return starttls.lookout(found.facts, opening, "tls" in BY_NAME[protocol].carries)
