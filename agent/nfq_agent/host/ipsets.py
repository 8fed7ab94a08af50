"""The ipsets of this network namespace: their numbers and the family of their addresses (linux/netfilter/ipset/ip_set.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from nfq_agent.host.attributes import attribute
from nfq_agent.host.nftables.netlink import FAMILY_NUMBERS, NftSocket, string, text
from nfq_agent.rules import ipsets
from nfq_agent.rules.model import RuleError, Ruleset

# NFNL_SUBSYS_IPSET with IPSET_CMD_HEADER, and with IPSET_CMD_GET_BYNAME (Linux 4.19)
_HEADER: Final = 6 << 8 | 12
_GET_BY_NAME: Final = 6 << 8 | 14
# IPSET_PROTOCOL; enum of IPSET_ATTR_*
_PROTOCOL_VERSION: Final = 7
_PROTOCOL, _NAME, _TYPE, _FAMILY, _INDEX = 1, 2, 3, 5, 11


class IpSet(NamedTuple):
    """A set. number: by which rules in the kernel name it. family: of its addresses; None without. kind: as `hash:ip,port`."""

    number: int
    family: str | None
    kind: str

    @property
    def dimensions(self) -> int:
        """How many parts of a packet are looked up in it, each with a direction."""
        return self.kind.count(",") + 1


def find(name: str) -> IpSet | None:
    """The set of this name; None where there is none. Raises OSError."""
    body = attribute(_PROTOCOL, bytes((_PROTOCOL_VERSION,))) + text(_NAME, name)
    try:
        with NftSocket() as asking:
            found = asking.ask(_GET_BY_NAME, body) | asking.ask(_HEADER, body)
    except FileNotFoundError:
        return None
    families = {number: family for family, number in FAMILY_NUMBERS.items()}
    return IpSet(int.from_bytes(found[_INDEX], "big"), families.get(found[_FAMILY][0]), string(found[_TYPE]))


def number(name: str) -> int:
    """The number of this set. Raises ValueError with what to do where there is none, and OSError."""
    found = find(name)
    if found is None:
        raise ValueError(absence(name))
    return found.number


def absence(name: str, rules: Sequence[str] = ()) -> str:
    """The message about a set that rules name and that does not exist."""
    asked = f" of {', '.join(f'rules.{each}' for each in rules)}" if rules else ""
    return (
        f"the ipset {name}{asked} does not exist in this network namespace (`ipset list -n` shows all); create it before the "
        f"agent starts, as with `ipset create {name} hash:net`"
    )


def fitted(ruleset: Ruleset) -> Ruleset:
    """The rules for the sets that exist now (rules.ipsets). Raises RuleError where one does not exist, or has another form."""
    named = ipsets.names(ruleset)
    families: dict[str, str | None] = {}
    for name, rules in named.items():
        try:
            found = find(name)
        except OSError as error:
            raise RuleError(
                f"the kernel gives no answer about ipset {name} of rules.{rules[0]}: {error.strerror or error}; CAP_NET_ADMIN "
                "and the module ip_set are needed"
            ) from error
        if found is None:
            raise RuleError(absence(name, rules))
        ipsets.refuse_fewer_directions(ruleset, name, found.kind, found.dimensions)
        families[name] = found.family
    return ipsets.fitted(ruleset, families) if named else ruleset
