"""Whether the legacy chain INPUT drops what it does not accept. Its rules are read by their bytes, and never changed."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Final

from nfq_agent.host.nftables.dropping import conntrack_reach
from nfq_agent.host.xtables.image import Entry, Image
from nfq_agent.host.xtables.in_front import LAYOUTS, matches_of, target_of
from nfq_agent.rules.dropping import ForeignRule, Share, drops
from nfq_agent.rules.model import Family

_TCP: Final = 6
# IPT_F_GOTO and IP6T_F_GOTO, in the byte before invflags.
_GOTO: Final = {"inet": 0x02, "inet6": 0x04}
# IP6T_F_PROTO: the protocol counts.
_PROTOCOL: Final = {"inet": 0, "inet6": 0x01}


def drops_in_input(family: Family, image: Image, translated: bool) -> bool:
    """Whether the chain INPUT of a table filter drops connections that no rule names.

    translated: those with a translated destination (capture = "redirect").
    """

    @functools.cache
    def rules(chain: str) -> Sequence[ForeignRule]:
        name = os.fsencode(chain)
        return [rule_of(family, each) for each in image.entries(frozenset((name,)), b"\0no tag\0") if each.chain == name]

    return drops("INPUT", rules, image.policy(b"INPUT") == b"DROP", translated)


def rule_of(family: Family, entry: Entry) -> ForeignRule:
    """What a rule does, and to which packets."""
    layout = LAYOUTS[family]
    flags, inverted = entry.data[layout.flags - 1], entry.data[layout.flags]
    protocol = int.from_bytes(entry.data[layout.protocol : layout.protocol + 2], sys.byteorder)
    reach = Share.ALL
    # Addresses and their masks come first, then the names and masks of the interfaces.
    if any(entry.data[: layout.interfaces]) or inverted & 0x40 or protocol not in (0, _TCP) or flags & ~_known(family):
        reach = Share.SOME
    elif any(entry.data[layout.interfaces : layout.protocol]) or protocol:
        reach = Share.BROAD
    for name, revision, body in matches_of(layout, entry.data):
        if (name, revision) == ("conntrack", 3):
            reach = min(reach, conntrack_reach(body))
        elif name != "comment":
            reach = Share.SOME
    target = target_of(family, entry)
    if entry.jump is None:
        return ForeignRule(reach, "drop" if target == "REJECT" else "")
    if target in ("ACCEPT", "DROP", "RETURN"):
        return ForeignRule(reach, target.lower())  # type: ignore[arg-type]  # one of these three
    return ForeignRule(reach, "goto" if flags & _GOTO[family] else "jump", target) if target else ForeignRule(reach, "")


def _known(family: Family) -> int:
    return _GOTO[family] | _PROTOCOL[family]
