"""Entries of legacy tables by their bytes: which are ours, and which rule an entry is that the agent never writes."""

from __future__ import annotations

import ctypes
import struct

import pytest

from nfq_agent.host.xtables.entries import EntryCodec
from nfq_agent.host.xtables.image import Entry
from nfq_agent.host.xtables.python_iptables import import_iptc
from nfq_agent.rules.model import Family

# struct ipt_entry and ip6t_entry: where their offsets are, and their size before the matches.
SIZES: dict[Family, tuple[int, int]] = {"inet": (88, 112), "inet6": (140, 168)}
EXTENSION = struct.Struct("H29sB")


def extension(name: bytes, data: bytes) -> bytes:
    data += bytes(-len(data) & 7)
    return EXTENSION.pack(EXTENSION.size + len(data), name, 0) + data


def entry(family: Family, *matches: bytes, target: bytes = b"") -> bytes:
    """An entry with these matches, and a standard target that jumps."""
    target = target or extension(b"", struct.pack("i4x", 0))
    offsets, size = SIZES[family]
    head = bytearray(size)
    behind = size + sum(map(len, matches))
    struct.pack_into("HH", head, offsets, behind, behind + len(target))
    return bytes(head) + b"".join(matches) + target


def comment(text: bytes) -> bytes:
    return extension(b"comment", text.ljust(256, b"\0"))


@pytest.mark.parametrize("family", ["inet", "inet6"])
def test_a_rule_is_ours_by_its_comment_alone(family: Family) -> None:
    codec = EntryCodec(import_iptc(), family, "default")
    mark = extension(b"mark", bytes(16))
    ours = entry(family, mark, comment(b"nfq-agent:default:open"))
    for data, expected in (
        (ours, True),
        (entry(family, comment(b"nfq-agent:default:open"), mark), True),
        (entry(family, comment(b"nfq-agent:default2:open")), False),
        (entry(family, comment(b"x nfq-agent:default:open")), False),
        (entry(family, mark), False),
        # A target of that name is no match.
        (entry(family, target=comment(b"nfq-agent:default:open")), False),
    ):
        assert codec.is_tagged(data) is expected
        kept = ctypes.create_string_buffer(data, len(data))
        assert codec.is_tagged_at(ctypes.addressof(kept)) is expected


@pytest.mark.parametrize("family", ["inet", "inet6"])
def test_an_entry_without_a_match_is_read_with_its_counters(family: Family) -> None:
    data = bytearray(entry(family))
    offsets, _ = SIZES[family]
    # struct xt_counters follows the offsets and comefrom, aligned to 8 bytes.
    struct.pack_into("QQ", data, offsets + 15 & ~7, 3, 180)
    found = EntryCodec(import_iptc(), family, "default").installed(Entry(b"OUTPUT", 2, bytes(data), b"NFQA-default-OUTPUT"))
    assert (str(found.rule), found.number, found.packets, found.bytes) == ("-A OUTPUT -j NFQA-default-OUTPUT", 2, 3, 180)


def test_an_entry_that_the_agent_never_writes_has_a_digest_of_its_own() -> None:
    codec = EntryCodec(import_iptc(), "inet", "default")
    from_address = bytearray(entry("inet"))
    from_address[0:4] = bytes((192, 0, 2, 1))
    from_another = bytearray(entry("inet"))
    from_another[0:4] = bytes((192, 0, 2, 2))
    counted = bytearray(from_address)
    struct.pack_into("QQ", counted, 96, 3, 180)
    rules = [
        codec.installed(Entry(b"OUTPUT", 1, bytes(data), b"NFQA-default-OUTPUT")).rule
        for data in (from_address, from_another, counted)
    ]
    assert rules[0] == rules[2] != rules[1]
    assert all("--undecoded" in str(rule) for rule in rules)
