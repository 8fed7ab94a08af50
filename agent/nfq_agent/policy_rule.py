"""A rule of a policy as it is applied to the facts of a flow, and what the rules come to together. No I/O, no clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from nfq_agent.patterns import Patterns
from nfq_agent.protocols.known import BY_NAME, HOSTS, OWNERS

ActionName = Literal["accept", "drop", "reject"]
DEFAULT: Final = "default"
# Where no rule matches and the policy has no default: the next element is asked.
NO_RULE: Final = "no rule"
# What decides besides the rules and the default: a message in conflict, the mode for a connection whose beginning was not seen,
# and what the link cannot do without.
CONFLICT: Final = "conflict"
MIDSTREAM: Final = "midstream"
BY_LINK: Final = "needed by the link"
# The names by which a client claims to be connected to the destination: what `verify` proves.
CLAIMS: Final = ("tls_sni", "http_host")
# Facts that a policy itself keeps: the names of the destination when the flow began, and the claims that were proven.
DST_NAME: Final = "dst_name"
VERIFIED: Final = "dns_verified"


# A flow between two containers has both.
_ENDS: Final = {"container": ("container", "container_to")}


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """label: its name in the log. facts, owned_by: the patterns, by the name of the fact. verify: claims have to be proven."""

    label: str
    action: ActionName
    facts: tuple[tuple[str, Patterns], ...]
    owned_by: tuple[tuple[str, Patterns], ...] = ()
    verify: bool = False

    def belongs(self, owner: Mapping[str, str]) -> bool:
        """Whether a flow of this owner meets it."""
        return all(
            any(patterns.match(owner[name]) for name in _ENDS.get(key, (key,)) if name in owner)
            for key, patterns in self.owned_by
        )


def rule_label(number: int, name: str | None) -> str:
    """How a rule is called in the log and in counters. number: of the rule in its policy, from 1."""
    return f"rule {number}" + (f" ({name})" if name else "")


def default_label(default: ActionName | None) -> str:
    """How the log and counters call it that no rule matches."""
    return NO_RULE if default is None else DEFAULT


def name_of(label: str) -> str:
    """The name in a rule's label; the label itself for a rule without a name, and for what is not a rule."""
    named = re.fullmatch(r"rule \d+ \((.*)\)", label, re.DOTALL)
    return label if named is None else named[1]


Wanted = Iterable[tuple[str, tuple[str, ...]]]


def policy_rule(number: int, name: str | None, action: ActionName, wanted: Wanted, owned_by: Wanted, verify: bool) -> PolicyRule:
    """number: of the rule in its policy, from 1. wanted, owned_by: what it asks for, with the patterns of each."""
    label = rule_label(number, name)
    facts = []
    for fact, globs in wanted:
        # An allowed name lets no other pass that is asked for beside it.
        every = action == "accept" and fact == "dns_name"
        facts.append((fact, Patterns(globs, fact in HOSTS or fact == DST_NAME, every)))
    return PolicyRule(label, action, tuple(facts), tuple((key, Patterns(globs)) for key, globs in owned_by), verify)


def outcome(
    candidates: Iterable[PolicyRule],
    facts: Mapping[str, Any],
    patient: bool,
    default: ActionName | None,
    conflict: ActionName,
    proven: Callable[[str], bool] = lambda _: False,
) -> tuple[ActionName | None, str, bool]:
    """(action, label, open): the result of the rules with these facts. Not open if no later fact can change it.

    A rule that asks for a name that a message in conflict hides ends the search: whether it matches is not known. proven: whether
    a claimed name is; one that is not counts as one that was not said.
    """
    possible: list[ActionName] = []
    action, label = default, default_label(default)
    for rule in candidates:
        missing = matches = False
        for fact, patterns in rule.facts:
            value = facts.get(fact)
            if value is None:
                if "conflict" in facts and _hides(facts, fact):
                    return conflict, f"{CONFLICT}: {facts['conflict']}", False
                missing = True
            elif not patterns.match(value):
                break
            elif rule.verify and fact in CLAIMS and not proven(value):
                missing = True
        else:
            matches = not missing
            if missing and patient:
                possible.append(rule.action)
        if matches:
            action, label = rule.action, rule.label
            break
    return action, label, any(each != action for each in possible)


def _hides(facts: Mapping[str, Any], fact: str) -> bool:
    """Whether a message in conflict may have a fact: any, where its protocol is not known."""
    protocol, owner = BY_NAME.get(facts.get("protocol", "")), OWNERS.get(fact)
    if protocol is None or owner is None:
        return protocol is None
    return owner is protocol or owner.name in protocol.carries
