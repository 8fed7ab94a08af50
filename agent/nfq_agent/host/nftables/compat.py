"""Matches of xtables as nf_tables carries them (nft_compat): the structs that the kernel's modules read."""

from __future__ import annotations

from struct import Struct
from typing import Final

from nfq_agent.host import ipsets
from nfq_agent.host.attributes import attribute
from nfq_agent.host.nftables.netlink import text, u32
from nfq_agent.rules.ipsets import set_name
from nfq_agent.rules.model import Extension, Option

# struct xt_owner_match_info (xt_owner.h), padded as XT_ALIGN does it.
_OWNER: Final = Struct("=IIIIBB6x")
_OWNER_UID, _OWNER_GID = 1, 2
# struct xt_set_info_match_v1 (linux/netfilter/xt_set.h): index, number of directions, flags.
_SET: Final = Struct("=HBB4x")
# IPSET_INV_MATCH; IPSET_DIM_ONE_SRC is 2, the next dimension has the next bit.
_NOT_IN_SET: Final = 1


def owner(match: Extension) -> bytes:
    """The attributes of `match` for `-m owner`."""
    fields = {"--uid-owner": (0, 0), "--gid-owner": (0, 0)}
    match_flags = inverted = 0
    for option in match.options:
        flag = _OWNER_UID if option.name == "--uid-owner" else _OWNER_GID
        fields[option.name] = span(option.value)
        match_flags |= flag
        inverted |= flag if option.negated else 0
    info = _OWNER.pack(*fields["--uid-owner"], *fields["--gid-owner"], match_flags, inverted)
    return _match("owner", 1, info)


def span(value: str) -> tuple[int, int]:
    """The ends of `7` or `7-9`."""
    first, _, last = value.partition("-")
    return int(first), int(last or first)


def ipset(option: Option) -> bytes:
    """The attributes of `match` for `-m set --match-set NAME DIRECTIONS`. Raises ValueError for a set that does not exist."""
    directions = option.value.partition(" ")[2].split(",")
    flags = _NOT_IN_SET if option.negated else 0
    for place, direction in enumerate(directions, 1):
        flags |= (direction == "src") << place
    return _match("set", 1, _SET.pack(ipsets.number(set_name(option)), len(directions), flags))


def _match(name: str, revision: int, info: bytes) -> bytes:
    return text(1, name) + u32(2, revision) + attribute(3, info)
