"""DNS answers as they pass: decides which are accepted, and puts their names into the table of names. No I/O, no clock.

An answer is accepted if it comes from port 53 of a trusted resolver, on the flow on which its question was seen, with the
question's number, name and type, once for each question.
"""

from __future__ import annotations

from typing import Final

from nfq_agent.dns_answer import DnsQuestion, answer, question
from nfq_agent.flow import Flow
from nfq_agent.names import NameTable
from nfq_agent.packet import TCP, UDP, Headers, Packet
from nfq_agent.reassembly import Reassembly

_PORT: Final = 53
_SYN: Final = 2
# Questions of one flow that wait for their answers.
_WAITING: Final = 64
# Bytes kept of each direction of a connection: the longest message (RFC 1035 4.2.2), twice.
_KEPT: Final = 2 * 65537


class _Asked:
    """What is kept of a flow. sides: of a TCP connection, the resolver's last."""

    __slots__ = ("questions", "sides")

    def __init__(self) -> None:
        self.questions: dict[DnsQuestion, None] = {}
        self.sides: list[Reassembly | None] = [None, None]


class NameLearner:
    """Reads the questions and answers of flows, and keeps the names that the answers give."""

    def __init__(self, names: NameTable) -> None:
        self._names = names

    def follows(self, flow: Flow) -> bool:
        """Whether questions or answers of this flow may still come."""
        return self in flow.state

    def see(self, packet: Packet, flow: Flow, headers: Headers) -> None:
        """A packet of TCP or UDP, before its verdict is given."""
        protocol, src, sport, dst, dport = headers.five_tuple
        to_resolver = dport == _PORT and dst in self._names.believed
        if not to_resolver and not (sport == _PORT and src in self._names.believed):
            return
        asked: _Asked = flow.state.setdefault(self, _Asked())
        if protocol == UDP:
            if data := packet.data:
                self._message(asked, data, to_resolver, flow.last)
        elif protocol == TCP and headers.transport is not None:
            self._segment(packet, flow, headers, asked, to_resolver)

    def _message(self, asked: _Asked, data: bytes, to_resolver: bool, now: float) -> None:
        if to_resolver:
            if (put := question(data)) is not None:
                asked.questions[put] = None
                if len(asked.questions) > _WAITING:
                    del asked.questions[next(iter(asked.questions))]
        elif asked.questions and (said := answer(data)) is not None and said.question in asked.questions:
            del asked.questions[said.question]
            self._names.learn(said, now)

    def _segment(self, packet: Packet, flow: Flow, headers: Headers, asked: _Asked, to_resolver: bool) -> None:
        assert headers.transport is not None
        sequence = int.from_bytes(packet.payload[headers.transport + 4 : headers.transport + 8], "big")
        if headers.tcp_flags is not None and headers.tcp_flags & _SYN:
            asked.sides[not to_resolver] = Reassembly(sequence + 1 & 0xFFFFFFFF, _KEPT)
            return
        side = asked.sides[not to_resolver]
        data = packet.data
        if side is None or not data or not side.add(sequence, data):
            return
        if side.conflict:
            asked.sides = [None, None]
            return
        while len(side.data) >= 2 and len(side.data) >= (end := 2 + int.from_bytes(side.data[:2], "big")):
            self._message(asked, side.data[2:end], to_resolver, flow.last)
            side.forget(end)
