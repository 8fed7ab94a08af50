"""Chains of others in nf_tables that drop what they do not accept in hook INPUT. They are read, never changed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Final

from nfq_agent.host.attributes import attributes
from nfq_agent.host.nftables import netlink
from nfq_agent.host.nftables.expressions import Expression, decoded
from nfq_agent.host.nftables.neighbours import NUMBERS, HookChain, hook_chains
from nfq_agent.host.nftables.netlink import NftSocket, string, text
from nfq_agent.rules.dropping import ForeignRule, Share, drops

_VERDICTS: Final = {0: "drop", 1: "accept", -3: "jump", -4: "goto", -5: "return"}
# NFT_META_IIF, NFT_META_IIFNAME and NFT_META_NFPROTO; NFT_META_L4PROTO.
_INTERFACE_OR_FAMILY: Final = (4, 6, 15)
_PROTOCOL: Final = 16
_TCP: Final = 6
# NFT_CT_STATUS; IPS_DST_NAT, in this machine's byte order.
_STATUS: Final = 2
_TRANSLATED: Final = (1 << 5).to_bytes(4, sys.byteorder)
# NFT_CMP_EQ, NFT_CMP_NEQ
_EQUAL, _NOT_EQUAL = 0, 1
# Where struct xt_conntrack_mtinfo3 has its flags, and XT_CONNTRACK_STATE, XT_CONNTRACK_STATE_DNAT.
_CONNTRACK_FLAGS: Final = 146
_STATE, _STATE_TRANSLATED = 1, 1 << 7
# They do not change a packet's path.
_PASSING: Final = ("counter", "log", "comment")


def dropping_chains(translated: bool) -> list[HookChain]:
    """Those that drop connections which no rule names. translated: those with a translated destination. Raises OSError."""
    found = [each for each in hook_chains() if (each.hook, each.kind) == ("input", "filter")]
    with NftSocket() as connection:
        return [each for each in found if _drops(connection, each, translated)]


def _drops(connection: NftSocket, base: HookChain, translated: bool) -> bool:
    @functools.cache
    def rules(chain: str) -> Sequence[ForeignRule]:
        asked = text(1, base.table) + text(2, chain)
        bodies = map(dict, map(attributes, connection.dump(netlink.GET_RULE, NUMBERS[base.family], asked)))
        # Older kernels give every rule.
        mine = (each for each in bodies if (string(each[1]), string(each[2])) == (base.table, chain))
        return [rule_of(decoded(each.get(4, b""))) for each in mine]

    return drops(base.chain, rules, base.drops, translated)


def rule_of(found: Sequence[Expression]) -> ForeignRule:
    """What a rule does, and to which packets."""
    reach, loaded = Share.ALL, ("", -1)
    for each in found:
        data = dict(attributes(each.data))
        name = string(data[1]) if each.name in ("match", "target") else each.name
        if name in _PASSING:
            continue
        if name in ("meta", "ct", "payload"):
            loaded = _loaded(name, data)
        elif name == "bitwise":
            (_, mask), *_ = attributes(data.get(4, b"")) if 4 in data else ((0, b""),)
            loaded = ("translated", 0) if loaded == ("ct", _STATUS) and mask == _TRANSLATED else ("", -1)
        elif name == "cmp":
            reach = min(reach, _compared(loaded, data))
        elif (each.name, name, data.get(2)) == ("match", "conntrack", (3).to_bytes(4, "big")):
            reach = min(reach, conntrack_reach(data[3]))
        elif name == "reject" or (name == "REJECT" and each.name == "target"):
            return ForeignRule(reach, "drop")
        elif name == "immediate":
            return _verdict(reach, data)
        elif each.name != "target":
            reach = Share.SOME
    return ForeignRule(reach, "")


def _loaded(name: str, data: dict[int, bytes]) -> tuple[str, int]:
    if name == "payload":
        # NFTA_PAYLOAD_BASE, OFFSET and LEN: the protocol in a header of IPv4 or IPv6.
        base, offset, size = (int.from_bytes(data.get(kind, b""), "big") for kind in (2, 3, 4))
        return ("meta", _PROTOCOL) if (base, size) == (1, 1) and offset in (9, 6) else ("", -1)
    # NFTA_META_KEY and NFTA_CT_KEY
    return name, int.from_bytes(data.get(2, b""), "big")


def _compared(loaded: tuple[str, int], data: dict[int, bytes]) -> Share:
    operation = int.from_bytes(data[2], "big")
    (_, value), *_ = attributes(data[3])
    if loaded[0] == "translated":
        return Share.TRANSLATED if operation == _NOT_EQUAL and not any(value) else Share.SOME
    if loaded[0] != "meta":
        return Share.SOME
    is_tcp = loaded[1] == _PROTOCOL and operation == _EQUAL and value[:1] == bytes((_TCP,))
    return Share.BROAD if is_tcp or loaded[1] in _INTERFACE_OR_FAMILY else Share.SOME


def conntrack_reach(info: bytes) -> Share:
    """Which packets a match on connection tracking of revision 3 lets through. info: its struct xt_conntrack_mtinfo3."""
    flags = info[_CONNTRACK_FLAGS : _CONNTRACK_FLAGS + 8]
    match, inverted, states, _ = (int.from_bytes(flags[place : place + 2], sys.byteorder) for place in (0, 2, 4, 6))
    return Share.TRANSLATED if (match, inverted) == (_STATE, 0) and states & _STATE_TRANSLATED else Share.SOME


def _verdict(reach: Share, data: dict[int, bytes]) -> ForeignRule:
    # NFTA_IMMEDIATE_DATA, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE and _CHAIN.
    verdict = dict(attributes(dict(attributes(data[2])).get(2, b"")))
    code = int.from_bytes(verdict.get(1, b""), "big", signed=True)
    return ForeignRule(reach, _VERDICTS.get(code, "") if 1 in verdict else "", string(verdict.get(2, b"")))  # type: ignore[arg-type]  # by that table
