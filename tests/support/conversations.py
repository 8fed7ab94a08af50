"""Random conversations, honest and hostile, as packets in the order in which a queue might see them. By a seed: repeatable."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from functools import cache

from openings import client_hello, dns_query, over_tcp

from nfq_agent.checksum import internet_checksum, mend
from nfq_agent.packet import Hook, Packet

HOSTS = (
    "www.good.test",
    "good.test",
    "bad.test",
    "x.bad.test",
    "other.test",
    "WWW.Good.Test",
    "good.test.",
    "[fd00::1]",
    "a_b-c.good.test",
)
_FIN, _SYN, _RST, _PSH, _ACK, _URG = 1, 2, 4, 8, 16, 32


@cache
def _hello(name: str | None) -> bytes:
    return client_hello(name)


def ip(src: bytes, dst: bytes, protocol: int, rest: bytes) -> bytes:
    """A packet of either family, with the checksum of IP alone."""
    if len(src) == 4:
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(rest), 0, 0x4000, 64, protocol, 0, src, dst)
        return head[:10] + internet_checksum(head).to_bytes(2, "big") + head[12:] + rest
    return struct.pack("!IHBB16s16s", 6 << 28, len(rest), protocol, 64, src, dst) + rest


def segment(
    src: tuple[bytes, int], dst: tuple[bytes, int], flags: int, seq: int, ack: int, data: bytes = b"", options: bytes = b""
) -> bytes:
    """A TCP segment."""
    size = 5 + len(options) // 4 << 4
    header = struct.pack("!HHIIBBHHH", src[1], dst[1], seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, size, flags, 64240, 0, 0)
    return ip(src[0], dst[0], 6, header + options + data)


def datagram(src: tuple[bytes, int], dst: tuple[bytes, int], data: bytes) -> bytes:
    """A UDP datagram."""
    return ip(src[0], dst[0], 17, struct.pack("!HHHH", src[1], dst[1], 8 + len(data), 0) + data)


def request(source: random.Random, host: str) -> bytes:
    """An HTTP request, mostly in the usual form."""
    path = source.choice((b"/", b"/index.html", b"/a?b=c", b"*", b"http://%s/x" % host.encode(), b"//x"))
    if source.random() < 0.7:
        path = b"/p%d" % source.randrange(1000)
    method = source.choice((b"GET", b"GET", b"GET", b"HEAD", b"POST", b"OPTIONS", b"CONNECT", b"get"))
    fields = [
        source.choice((b"Host: ", b"host:", b"HOST:  ", b"Host:\t")) + host.encode() + source.choice((b"", b"", b":80", b" "))
    ]
    if source.random() < 0.3:
        fields += [b"User-Agent: x/%d" % source.randrange(9), b"Accept: */*", b"Cookie: " + b"c" * source.randrange(300)]
    body = b""
    kind = source.random()
    if kind < 0.1:
        body = b"b" * source.randrange(200)
        fields.append(b"Content-Length: %d" % len(body))
    elif kind < 0.15:
        fields.append(b"Transfer-Encoding: chunked")
        body = b"5\r\nhello\r\n0\r\n\r\n"
    elif kind < 0.18:
        fields.append(b"Host: " + source.choice(HOSTS).encode())
    elif kind < 0.2:
        fields.append(
            source.choice((b" folded", b"Bad Field: x", b"Upgrade: websocket", b"X: \x01", b"Host : bad.test", b":empty"))
        )
    elif kind < 0.22:
        fields.clear()
    source.shuffle(fields)
    end = source.choice((b"\r\n",) * 20 + (b"\n",))
    version = source.choice((b"HTTP/1.1",) * 12 + (b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b""))
    line = method + b" " + path + b" " + version
    prefix = source.choice((b"",) * 30 + (b"\r\n", b"\n"))
    return prefix + end.join([line.rstrip(), *fields, b"", b""]) + body


def opening(source: random.Random) -> bytes:
    """The first bytes of a client."""
    host = source.choice(HOSTS)
    kind = source.random()
    if kind < 0.6:
        return request(source, host)
    if kind < 0.8:
        hello = _hello(source.choice((*HOSTS[:5], None)))
        return hello + (b"\x14\3\3\0\1\1" + b"\x17\3\3\0\x20" + bytes(32) if source.random() < 0.3 else b"")
    if kind < 0.86:
        return over_tcp(dns_query(host.strip("[]:")))
    if kind < 0.9:
        return source.choice(
            (b"SSH-2.0-OpenSSH_9\r\n", b"EHLO x\r\n", b"*1\r\n$4\r\nPING\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        )
    return source.randbytes(source.randrange(1, 80))


class TcpTalk:
    """One TCP conversation; each call of `step` gives the packets that come next."""

    def __init__(self, source: random.Random, client: tuple[bytes, int], server: tuple[bytes, int]) -> None:
        self.source = source
        self.client, self.server = client, server
        self.start = source.choice((source.randrange(1 << 32), 0xFFFFFFF0, 0))
        self.peer = source.randrange(1 << 32)
        self.said = 1
        self.answered = 1
        self.sent: list[tuple[int, bytes]] = []
        self.stamp = source.choice((0, source.randrange(1, 1 << 32)))
        self.signs = source.random() < 0.02
        self.host = source.choice(HOSTS)

    def options(self, flags: int) -> bytes:
        """The options of a segment: a timestamp, now and then one that is old, or others."""
        odd = self.source.random()
        if odd < 0.01 or (self.signs and odd < 0.5):
            return b"\1\1\x13\x12" + bytes(16)
        if odd < 0.02:
            return b"\x1e\x04\0\0"
        if not self.stamp or odd < 0.03:
            return b""
        self.stamp = self.stamp + self.source.randrange(3) & 0xFFFFFFFF or 1
        value = self.stamp if odd > 0.05 or flags & _SYN else self.stamp - 100 & 0xFFFFFFFF
        return b"\1\1\x08\n" + value.to_bytes(4, "big") + bytes(4)

    def up(self, flags: int, at: int, data: bytes = b"") -> bytes:
        """From the client; at: offset to its initial number."""
        return segment(self.client, self.server, flags, self.start + at, self.peer + self.answered, data, self.options(flags))

    def down(self, flags: int, at: int, data: bytes = b"") -> bytes:
        """From the server."""
        return segment(self.server, self.client, flags, self.peer + at, self.start + self.said, data, self.options(flags))

    def say(self, data: bytes) -> Iterator[bytes]:
        """The client's next bytes: in one segment, or in several, repeated, overlapping, out of order."""
        source = self.source
        pieces = [data]
        if source.random() < 0.2 and len(data) > 1:
            cuts = sorted(source.sample(range(1, len(data)), min(len(data) - 1, source.randrange(1, 4))))
            pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        placed = []
        for piece in pieces:
            placed.append((self.said, piece))
            self.said += len(piece)
        self.sent += placed
        if source.random() < 0.1:
            source.shuffle(placed)
        if source.random() < 0.1 and self.sent:
            at, old = source.choice(self.sent)
            placed.insert(source.randrange(len(placed) + 1), (at, old if source.random() < 0.7 else source.randbytes(len(old))))
        if source.random() < 0.03:
            placed.insert(0, (source.randrange(-50, 5000), request(source, source.choice(HOSTS))))
        for at, piece in placed:
            flags = _PSH | _ACK
            if source.random() < 0.01:
                flags |= source.choice((_URG, _FIN, _RST))
            yield self.up(flags, at, piece)
            if len(placed) > 1 and source.random() < 0.2:
                yield self.down(_ACK, self.answered) if source.random() < 0.7 else self.up(_ACK, at + len(piece))

    def answer(self) -> Iterator[bytes]:
        """Bytes of the server, and what acknowledges them."""
        data = self.source.choice(
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"\x16\3\3\0\4\2\0\0\0", b"220 smtp ready\r\n", b"x" * 90)
        )
        yield self.down(_PSH | _ACK, self.answered, data)
        self.answered += len(data)
        if self.source.random() < 0.8:
            yield self.up(_ACK, self.said)

    def packets(self) -> Iterator[bytes]:
        """All of it."""
        source = self.source
        kind = source.random()
        if kind < 0.05:
            yield self.down(_SYN | _ACK, 0)
        elif kind < 0.95:
            fast = request(source, source.choice(HOSTS)) if source.random() < 0.04 else b""
            yield self.up(_SYN, 0, fast)
            self.said += len(fast)
            if source.random() < 0.08:
                yield self.up(_SYN, 0)
            if source.random() < 0.05:
                yield self.up(_SYN, source.randrange(1, 9000))
            if source.random() < 0.92:
                yield self.down(_SYN | _ACK, 0)
            if source.random() < 0.05:
                yield self.down(_SYN | _ACK, source.randrange(2))
            if source.random() < 0.9:
                yield self.up(_ACK, 1)
        if source.random() < 0.05:
            yield from self.answer()
        yield from self.say(request(source, self.host) if source.random() < 0.3 else opening(source))
        for _ in range(source.choice((0, 0, 1, 1, 2, 3, 5))):
            if source.random() < 0.9:
                yield from self.answer()
            if source.random() < 0.8:
                more = request(source, self.host if source.random() < 0.7 else source.choice(HOSTS))
                if source.random() < 0.15:
                    more += request(source, source.choice(HOSTS))
            else:
                more = opening(source)
            yield from self.say(more)
        if source.random() < 0.8:
            yield self.down(source.choice((_FIN | _ACK, _RST, _ACK)), self.answered)
            yield self.up(source.choice((_FIN | _ACK, _RST | _ACK, _ACK)), self.said)
            yield self.down(_ACK, self.answered + 1)


def udp_talk(source: random.Random, client: tuple[bytes, int], server: tuple[bytes, int]) -> Iterator[bytes]:
    """Datagrams: DNS on its port and elsewhere, and what is nothing."""
    junk = source.randbytes(source.randrange(1, 60))
    for _ in range(source.choice((1, 2, 3, 10, 40))):
        name = source.choice(HOSTS[:5])
        query = dns_query(name, source.choice((1, 28)), source.randrange(1 << 16))
        kind = source.random()
        if kind < 0.5:
            data = query if server[1] == 53 or source.random() < 0.1 else junk
        elif kind < 0.7:
            data = junk
        elif kind < 0.8:
            data = source.randbytes(source.randrange(0, 100))
        elif kind < 0.9:
            at = source.randrange(len(query))
            data = query[:at] + source.randbytes(1) + query[at + 1 :]
        else:
            data = query + source.randbytes(source.randrange(4))
        if source.random() < 0.7:
            yield datagram(client, server, data)
        else:
            yield datagram(server, client, data[:2] + b"\x81\x80" + data[4:] if len(data) > 12 else data)


def packets(seed: int, talks: int, tuples: int) -> Iterator[tuple[float, Packet]]:
    """Conversations that are interleaved, with the second at which each packet comes. tuples: five-tuples that they are of."""
    source = random.Random(seed)
    now = 1000.0
    running: list[Iterator[bytes]] = []
    left = talks
    identity = 0
    while running or left:
        while left and len(running) < 4:
            left -= 1
            number = source.randrange(tuples)
            client = bytes((10, 0, number >> 8, number & 255)), 1024 + number
            server = bytes((192, 0, 2, 1)), source.choice((80, 80, 443, 53))
            if number % 3 == 0:
                client, server = (bytes(12) + client[0], client[1]), (bytes(12) + server[0], server[1])
            running.append(
                TcpTalk(source, client, server).packets() if source.random() < 0.75 else udp_talk(source, client, server)
            )
        talk = source.choice(running)
        data = next(talk, None)
        if data is None:
            running.remove(talk)
            continue
        identity += 1
        now += source.choice((0.0, 0.001, 0.001, 0.01)) if source.random() < 0.995 else source.choice((3.0, 11.0, 400.0))
        ready = source.random() < 0.3
        if ready and source.random() < 0.9:
            data = mend(data)
        yield now, Packet(data, id=identity, hook=Hook.OUTPUT, time=now, checksum_ready=ready)
