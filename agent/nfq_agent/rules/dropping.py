"""Whether a chain of others drops what it does not accept: by its policy, or by a rule for all packets. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

# Jumps that are followed one inside the other: the kernel allows 16, firewalls use 4.
_DEEPEST = 8


class Share(IntEnum):
    """Which packets of connections that are redirected to a proxy a rule matches, as far as that is easy to see.

    SOME: those with a condition that is not looked at. BROAD: all that come by an interface, or all of TCP. TRANSLATED: all
    whose destination was translated (DNAT, REDIRECT). ALL: all. In order: a rule with two conditions has the lower one.
    """

    SOME = 0
    BROAD = 1
    TRANSLATED = 2
    ALL = 3


@dataclass(frozen=True, slots=True)
class ForeignRule:
    """One rule of a chain. verdict: empty where it has none of these. chain: that `jump` and `goto` lead to."""

    share: Share
    verdict: Literal["", "accept", "drop", "return", "jump", "goto"]
    chain: str = ""


def drops(chain: str, rules: Callable[[str], Sequence[ForeignRule]], policy: bool, translated: bool) -> bool:
    """Whether a chain in a hook drops connections that no rule of it names.

    rules: the rules of a chain by its name. policy: whether its policy is drop. translated: whether the connections have a
    translated destination (capture = "redirect").
    """
    end = _end(chain, rules, translated, _DEEPEST)
    return end == "drop" or (end == "return" and policy)


def _end(chain: str, rules: Callable[[str], Sequence[ForeignRule]], translated: bool, depth: int) -> str:
    """What happens to them: accept, drop, or return where the chain decides nothing."""
    if not depth:
        return "return"
    whole = (Share.ALL, Share.TRANSLATED) if translated else (Share.ALL,)
    for rule in rules(chain):
        if rule.share is Share.SOME or (rule.share is Share.TRANSLATED and not translated):
            continue
        leads = rule.verdict in ("jump", "goto")
        end = _end(rule.chain, rules, translated, depth - 1) if leads else rule.verdict
        if end == "drop":
            # Also if it drops only what comes by one interface: a connection may come by that one.
            return end
        if rule.share in whole and (end == "accept" or rule.verdict in ("return", "goto")):
            return end
    return "return"
