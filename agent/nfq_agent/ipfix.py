"""IPFIX messages of flows (RFC 7011): templates, records and the exporter's statistics. Bytes out; no I/O, no clock.

Both directions of a flow are one record (RFC 5103). What IANA has no element for is under an enterprise number: by default the
one that RFC 5612 reserves for examples, since this project has none of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from nfq_agent.flow_report import FlowReport
from nfq_agent.packet import PROTOCOL_NAMES

# The number of RFC 5612, and that of the reverse direction (RFC 5103, section 6.1).
EXAMPLE: Final = 32473
_REVERSE: Final = 29305
# The longest message that fits into a packet of an Ethernet, behind IPv6 and UDP.
DATAGRAM: Final = 1400
# Ids of the sets (RFC 7011, section 3.3.2) and of our templates.
_TEMPLATES, _OPTIONS = 2, 3
_IPV4, _IPV6, _STATISTICS = 256, 257, 258
_VARIABLE: Final = 0xFFFF
_HEAD: Final = struct.Struct("!HHIII")
_SET: Final = struct.Struct("!HH")
_NUMBERS: Final = {name: number for number, name in PROTOCOL_NAMES.items()}
# forwardingStatus (RFC 7270, section 4.12): forwarded; dropped by an access list.
_FORWARDED, _DENIED, _UNKNOWN = 64, 129, 0
_OURS: Final = -1


def _number(length: int, read: Callable[[FlowReport], float]) -> tuple[int, Callable[[FlowReport], bytes]]:
    return length, lambda report: min(int(read(report)), (1 << 8 * length) - 1).to_bytes(length, "big")


def _text(most: int, read: Callable[[FlowReport], object]) -> tuple[int, Callable[[FlowReport], bytes]]:
    """Of variable length (RFC 7011, section 7); cut between two characters."""

    def encoded(report: FlowReport) -> bytes:
        text = str(read(report) or "").encode(errors="replace")[:most].decode(errors="ignore").encode()
        return bytes((len(text),)) + text

    return _VARIABLE, encoded


def _address(end: str) -> Callable[[FlowReport], bytes]:
    return lambda report: ip_address(report.record[end]).packed


def _protocol(report: FlowReport) -> int:
    name = str(report.record["proto"])
    return _NUMBERS[name] if name in _NUMBERS else int(name.removeprefix("proto-"))


def _forwarding(report: FlowReport) -> int:
    verdict = report.record.get("verdict")
    return _UNKNOWN if verdict is None else _DENIED if verdict in ("drop", "reject") else _FORWARDED


@dataclass(frozen=True, slots=True)
class _Field:
    """number: of IANA, or in the enterprise. length: in bytes."""

    number: int
    enterprise: int
    length: int
    encoded: Callable[[FlowReport], bytes]

    def specifier(self, ours: int) -> bytes:
        """As a template has it."""
        if not self.enterprise:
            return struct.pack("!HH", self.number, self.length)
        return struct.pack("!HHI", self.number | 0x8000, self.length, ours if self.enterprise == _OURS else self.enterprise)


def _fields(source: int, target: int, length: int) -> tuple[_Field, ...]:
    """The fields of a record; the address elements of one version."""
    return (
        _Field(152, 0, *_number(8, lambda report: report.start * 1000)),  # flowStartMilliseconds
        _Field(153, 0, *_number(8, lambda report: report.end * 1000)),  # flowEndMilliseconds
        _Field(source, 0, length, _address("src")),
        _Field(target, 0, length, _address("dst")),
        _Field(7, 0, *_number(2, lambda report: report.record.get("sport", 0))),  # sourceTransportPort
        _Field(11, 0, *_number(2, lambda report: report.record.get("dport", 0))),  # destinationTransportPort
        _Field(4, 0, *_number(1, _protocol)),  # protocolIdentifier
        _Field(2, 0, *_number(8, lambda report: report.passed.packets_sent)),  # packetDeltaCount
        _Field(1, 0, *_number(8, lambda report: report.passed.bytes_sent)),  # octetDeltaCount
        _Field(2, _REVERSE, *_number(8, lambda report: report.passed.packets_received)),
        _Field(1, _REVERSE, *_number(8, lambda report: report.passed.bytes_received)),
        _Field(136, 0, *_number(1, lambda report: report.why)),  # flowEndReason
        _Field(89, 0, *_number(1, _forwarding)),  # forwardingStatus
        # Ours; docs/ipfix.md lists them. A number never changes its meaning.
        _Field(1, _OURS, *_text(32, lambda report: report.instance)),
        _Field(2, _OURS, *_text(48, lambda report: report.point)),
        _Field(3, _OURS, *_text(16, lambda report: report.record.get("verdict"))),
        _Field(4, _OURS, *_text(16, lambda report: report.record.get("would"))),
        _Field(5, _OURS, *_text(200, lambda report: report.record.get("reason"))),
        _Field(6, _OURS, *_text(120, lambda report: report.record.get("unit"))),
        _Field(7, _OURS, *_text(120, lambda report: report.record.get("container"))),
        _Field(8, _OURS, *_text(32, lambda report: report.record.get("protocol"))),
        _Field(9, _OURS, *_text(253, lambda report: report.name)),
    )


# sourceIPv4Address, destinationIPv4Address; sourceIPv6Address, destinationIPv6Address.
_FIELDS: Final = {_IPV4: _fields(8, 12, 4), _IPV6: _fields(27, 28, 16)}
# Scope exportingProcessId; exportedFlowRecordTotalCount and notSentFlowTotalCount (RFC 7011, section 4.3).
_STATISTICS_FIELDS: Final = ((144, 4), (42, 8), (166, 8))


class IpfixSession:
    """The messages of one connection, one file, or one series of datagrams. domain: the observation domain."""

    def __init__(self, domain: int = 1, enterprise: int = EXAMPLE) -> None:
        self._domain = domain
        self._enterprise = enterprise
        self._sequence = 0

    def begin(self, now: float) -> bytes:
        """The templates, at the beginning of a connection or a file. now: seconds since the epoch."""
        self._sequence = 0
        return self.again(now)

    def again(self, now: float) -> bytes:
        """The templates, as datagrams need them from time to time (RFC 7011, section 8.4)."""
        templates = b"".join(
            struct.pack("!HH", number, len(fields)) + b"".join(field.specifier(self._enterprise) for field in fields)
            for number, fields in _FIELDS.items()
        )
        options = struct.pack("!HHH", _STATISTICS, len(_STATISTICS_FIELDS), 1)
        options += b"".join(struct.pack("!HH", *field) for field in _STATISTICS_FIELDS)
        return self._message([_set(_TEMPLATES, templates), _set(_OPTIONS, options)], 0, now)

    def blocks(self, reports: Iterable[FlowReport], now: float, most: int = DATAGRAM) -> Iterator[tuple[bytes, int]]:
        """Messages of limited size, each with its number of records."""
        room = most - _HEAD.size
        sets: list[bytes] = []
        open_set, records, count, size = 0, b"", 0, 0
        for report in reports:
            kind = _IPV6 if ":" in report.record["src"] else _IPV4
            record = b"".join(field.encoded(report) for field in _FIELDS[kind])
            if count and size + _SET.size + len(record) > room:
                yield self._message([*sets, _set(open_set, records)], count, now), count
                sets, open_set, records, count, size = [], 0, b"", 0, 0
            if kind != open_set:
                if records:
                    sets.append(_set(open_set, records))
                open_set, records, size = kind, b"", size + _SET.size
            records, count, size = records + record, count + 1, size + len(record)
        if count:
            yield self._message([*sets, _set(open_set, records)], count, now), count

    def statistics(self, process: int, exported: int, missed: int, now: float) -> bytes:
        """A message with the exporter's own figures. process: its id."""
        return self._message([_set(_STATISTICS, struct.pack("!IQQ", process, exported, missed))], 1, now)

    def _message(self, sets: list[bytes], records: int, now: float) -> bytes:
        body = b"".join(sets)
        head = _HEAD.pack(10, _HEAD.size + len(body), int(now), self._sequence, self._domain)
        # Of data records; templates do not count.
        self._sequence = (self._sequence + records) % (1 << 32)
        return head + body


def _set(number: int, content: bytes) -> bytes:
    return _SET.pack(number, _SET.size + len(content)) + content
