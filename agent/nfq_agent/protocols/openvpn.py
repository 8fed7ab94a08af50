"""OpenVPN: the client's first packet (OpenVPN's doc/doc_protocol_overview.h and src/openvpn/ssl_pkt.h), and its ClientHello.

It has an opcode, a session id of 8 bytes, and either in clear, or behind a digest (tls-auth), no acknowledgement and the
packet number 0; with tls-crypt these two are encrypted, behind a packet counter that begins with 1. Over TCP the packets
behind it are followed, because they carry the ClientHello in parts. Steps: a fixed number, and one for each packet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from nfq_agent.protocols import MORE, NO, Found, Parser, Protocol, Result, starttls, tls

# Opcodes << 3, key 0: P_CONTROL_HARD_RESET_CLIENT_V2, P_CONTROL_V1, P_ACK_V1
_RESET: Final = 0x38
_CONTROL: Final = 0x20
_ACKNOWLEDGE: Final = 0x28
_OPCODES: Final = frozenset((_RESET, _CONTROL, _ACKNOWLEDGE))
# Opcode and session id.
_HEAD: Final = 9
# RELIABLE_ACK_SIZE: acknowledgements in one packet, at most.
_ACKNOWLEDGED: Final = 8
_PLAIN: Final = 14
# Digests of 16 (MD5), 20 (SHA-1), 32 (SHA-256) and 64 bytes (SHA-512), with a packet counter and the time.
_WITH_DIGEST: Final = frozenset(_PLAIN + 8 + digest for digest in (16, 20, 32, 64))
_CRYPT: Final = _PLAIN + 8 + 32
_FIRST: Final = bytes(5)
_FACTS: Final = {"protocol": "openvpn"}
_CONFLICT: Final = "a ClientHello in OpenVPN that servers may read in different ways"


def datagram(data: bytes) -> Result:
    """The opening over UDP."""
    if data[:1] != bytes((_RESET,)):
        return NO
    if _is_clear(data) or (len(data) == _CRYPT and data[9:13] == b"\0\0\0\1"):
        return Found(dict(_FACTS))
    return NO


def _is_clear(opening: bytes) -> bool:
    return (len(opening) == _PLAIN or len(opening) in _WITH_DIGEST) and opening.endswith(_FIRST)


def parse(client: bytes, server: bytes) -> Result:
    """The same over TCP, two bytes of length before it; tls_* follow from the ClientHello behind it, if it is not encrypted."""
    size = int.from_bytes(client[:2], "big")
    if (len(client) >= 2 and not _PLAIN <= size <= max(_WITH_DIGEST)) or client[2:3] not in (b"", bytes((_RESET,))):
        return NO
    end = 2 + size
    if len(client) < end or len(client) < 3:
        return MORE
    opening = client[2:end]
    if datagram(opening) is NO:
        return NO
    if not _is_clear(opening) or starttls.HELLO.search(opening):
        return Found(dict(_FACTS), then=starttls.lookout(_FACTS, opening, carries=False))
    packets = _Packets(opening[1:_HEAD], size - len(_FIRST), before=opening[-starttls.HELLO_START :])
    return Found(dict(_FACTS), used=end, then=packets)


@dataclass(frozen=True, slots=True)
class _Packets:
    """Reads the client's packets behind the opening: a Parser that keeps where the connection is.

    session: the id. head: bytes before the acknowledgements. number: of the next packet. read: reads the bytes that the packets
    carry. carried: of these bytes, what was not read yet. before: the last bytes of the packets that were read, which may begin
    a ClientHello that is in no packet.
    """

    session: bytes
    head: int
    number: int = 1
    read: Parser = tls.parse
    carried: bytes = b""
    before: bytes = b""

    def __call__(self, client: bytes, _server: bytes = b"") -> Result:
        """Read up to the end of a ClientHello. What is not OpenVPN is searched for one."""
        at, number, carried, read = 0, self.number, self.carried, self.read
        while at < len(client):
            size = int.from_bytes(client[at : at + 2], "big")
            packet = client[at + 2 : at + 2 + size]
            if packet and (packet[0] not in _OPCODES or not self.session.startswith(packet[1:_HEAD])):
                return self._search(client)
            if len(client) < at + 2 or len(client) < at + 2 + size:
                break
            body = self._body(packet)
            if body is None:
                return self._search(client)
            at += 2 + size
            if packet[0] != _CONTROL:
                continue
            got = int.from_bytes(packet[body : body + 4], "big")
            if got > number:
                return self._search(client)
            if got < number:
                # Sent again: the server has it already.
                continue
            number += 1
            carried += packet[body + 4 :]
            result, read, carried = _read(read, carried)
            if result is NO:
                return self._search(client)
            if isinstance(result, Found) and result.decided:
                behind = replace(self, number=number, carried=carried[result.used :], before=b"")
                return self._found(result, (self.before + client[:at]), at, behind)
        if carried or not at:
            return MORE
        data = self.before + client[:at]
        if starttls.HELLO.search(data):
            return self._search(client)
        return Found({}, used=at, then=replace(self, number=number, read=read, before=data[-starttls.HELLO_START :]))

    def _body(self, packet: bytes) -> int | None:
        """Where the number of a packet is, behind the acknowledgements; None if it is not a whole packet."""
        if len(packet) <= self.head or packet[self.head] > _ACKNOWLEDGED:
            return None
        count = packet[self.head]
        body = self.head + 1 + (4 * count + 8 if count else 0)
        whole = len(packet) == body if packet[0] == _ACKNOWLEDGE else len(packet) >= body + 4
        return body if whole else None

    def _search(self, client: bytes) -> Result:
        """Search bytes that are not OpenVPN. Behind a ClientHello nothing more is read."""
        if self.read is not tls.parse:
            return Found({})
        search = starttls.lookout(_FACTS, bytes((_RESET,)), carries=False, before=self.before)
        return search(client, b"")

    def _found(self, inner: Found, data: bytes, used: int, behind: _Packets) -> Found:
        """The facts of a ClientHello in packets. data: all that was read for it."""
        if not inner.facts:
            return Found({}, used=used)
        facts = {**inner.facts, **_FACTS}
        if "conflict" not in facts and any(_differs(data[hit.start() :], facts) for hit in starttls.HELLO.finditer(data)):
            facts = {**_FACTS, "conflict": _CONFLICT}
        then = None if "conflict" in facts or inner.then is None else replace(behind, read=inner.then)
        return Found(facts, used=used, then=then or starttls.ended)


def _read(read: Parser, carried: bytes) -> tuple[Result, Parser, bytes]:
    """What the carried bytes say, with the reader and the bytes that are left; records that say nothing are passed over."""
    while carried:
        result = read(carried, b"")
        if not isinstance(result, Found) or result.facts or result.then is None:
            return result, read, carried
        if len(carried) < result.used + result.skip:
            return MORE, read, carried
        read, carried = result.then, carried[result.used + result.skip :]
    return MORE, read, carried


def _differs(data: bytes, facts: dict[str, object]) -> bool:
    """Whether a server that takes no packets reads another name here, or may read one in what follows."""
    plain = tls.parse(data, b"")
    if not isinstance(plain, Found) or not plain.decided:
        return True
    if "conflict" in plain.facts:
        # The head of a packet within a hello of one record makes it malformed, as in each that OpenVPN sends in parts.
        return int.from_bytes(data[3:5], "big") != 4 + int.from_bytes(data[6:9], "big")
    return plain.facts.get("tls_sni") != facts.get("tls_sni")


PROTOCOL: Final = Protocol("openvpn", parse=parse, datagram=datagram, carries=("tls",))
