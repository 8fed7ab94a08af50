"""Chains of other programs in nf_tables that affect this agent. They are read, never changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from nfq_agent.host.attributes import attributes
from nfq_agent.host.nftables import layout, netlink
from nfq_agent.host.nftables.netlink import NftSocket, string

# NFPROTO_INET, and the two families of IP.
NUMBERS: Final = {"inet": 1, "ip": 2, "ip6": 10}
_HOOKS: Final = {number: name.lower() for name, number in layout.HOOKS.items()}
# NFT_META_MARK, NFT_CT_MARK
_MARK: Final = 3
# XT_CT_NOTRACK (linux/netfilter/xt_CT.h)
CT_NOTRACK: Final = 1


@dataclass(frozen=True, slots=True)
class HookChain:
    """A chain of others that hangs in a hook. kind: filter, nat or route. drops: whether its policy is drop."""

    family: str
    table: str
    chain: str
    kind: str
    hook: str
    priority: int
    drops: bool

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.chain}"


def hook_chains() -> list[HookChain]:
    """Every chain of others in a hook. Raises OSError where this process may not look, or where there is no nf_tables."""
    with NftSocket() as connection:
        return [each for name, number in NUMBERS.items() for each in _hook_chains(connection, name, number)]


def _hook_chains(connection: NftSocket, family: str, number: int) -> Iterator[HookChain]:
    for body in connection.dump(netlink.GET_CHAIN, number):
        found = dict(attributes(body))
        table = string(found[1])
        # NFTA_CHAIN_TYPE is there for chains in a hook only.
        if 7 not in found or layout.instance_of_table(table) is not None:
            continue
        hook = dict(attributes(found[4]))
        priority = int.from_bytes(hook[2], "big", signed=True)
        policy = int.from_bytes(found.get(5, b"\0\0\0\1"), "big")
        where = _HOOKS.get(int.from_bytes(hook[1], "big"), "")
        yield HookChain(family, table, string(found[3]), string(found[7]), where, priority, policy == 0)


def nat_chains() -> list[HookChain]:
    """The chains of others that do NAT; empty where this process may not read them."""
    try:
        return [each for each in hook_chains() if each.kind == "nat"]
    except OSError:
        return []


@dataclass(frozen=True, slots=True)
class Others:
    """The rules of others. rules: how many. marking: chains whose native rules set a packet's or a connection's mark.

    untracking: chains with rules that take packets out of connection tracking, native ones or those of iptables-nft.
    """

    rules: int
    marking: tuple[str, ...]
    untracking: tuple[str, ...]


def others() -> Others:
    """The rules of others. Raises OSError as `hook_chains`."""
    count = 0
    marking: dict[str, None] = {}
    untracking: dict[str, None] = {}
    with NftSocket() as connection:
        for family, number in NUMBERS.items():
            for body in connection.dump(netlink.GET_RULE, number):
                found = dict(attributes(body))
                table = string(found[1])
                if layout.instance_of_table(table) is not None:
                    continue
                count += 1
                expressions = [dict(attributes(value)) for _, value in attributes(found.get(4, b""))]
                for which, does in ((marking, _sets_mark), (untracking, _untracks)):
                    if any(map(does, expressions)):
                        which[f"{family} {table} {string(found[2])}"] = None
    return Others(count, tuple(marking), tuple(untracking))


def _untracks(parts: dict[int, bytes]) -> bool:
    name, data = string(parts[1]), dict(attributes(parts.get(2, b"")))
    if name == "target":
        # NFTA_TARGET_NAME and _INFO; struct xt_ct_target_info begins with its flags.
        extension, info = string(data[1]), data.get(3, b"\0")
        return extension == "NOTRACK" or (extension == "CT" and bool(info[0] & CT_NOTRACK))
    return name == "notrack"


def _sets_mark(parts: dict[int, bytes]) -> bool:
    name, data = string(parts[1]), dict(attributes(parts.get(2, b"")))
    # NFTA_META_KEY and NFTA_META_SREG; NFTA_CT_KEY and NFTA_CT_SREG.
    key, source = {"meta": (2, 3), "ct": (2, 4)}.get(name, (0, 0))
    return bool(key) and source in data and int.from_bytes(data[key], "big") == _MARK
