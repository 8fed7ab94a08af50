"""Rules by control group, for the groups that exist now. No I/O.

Both backends bind such a rule to the group that has its path when the rule is inserted: xtables to the group itself
(xt_cgroup.c, cgroup_get_from_path()), nf_tables to its number. A service that starts again has a new group with the same path,
and the rule matches nothing then. So each rule carries the numbers of its groups in a comment, and a new number makes another
rule. A policy's conditions on the owner mean any number of groups (rules.owner_policy): these are lists of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from nfq_agent.rules.group_tree import GroupTree
from nfq_agent.rules.model import AT_LEVEL, GROUPS, OFFLOAD_ACCEPTED, OWNER_NEW, Extension, Option, Rule, Ruleset, TableRules

# Names of rules that stand before one of a [rules.NAME], and match the same.
_OF_THE_AGENT: Final = (OWNER_NEW, OFFLOAD_ACCEPTED)

# By path; None for a group that does not exist.
Numbers = Mapping[str, int | None]


def paths(ruleset: Ruleset) -> dict[str, list[str]]:
    """The paths of all control groups in the rules, each with the names of the rules that take their packets alone."""
    found: dict[str, list[str]] = {}
    for rule in (rule for tables in ruleset.values() for table in tables.values() for rule in table.rules):
        for match in rule.matches:
            if match.name == "cgroup":
                path, name = match.options[0].value, rule.tag.rpartition(":")[2].partition(".")[0]
                names = found.setdefault(path, [])
                if not match.options[0].negated and name not in (*names, *_OF_THE_AGENT):
                    names.append(name)
    return found


def needs_tree(ruleset: Ruleset) -> bool:
    """Whether a rule asks which of all control groups meet a condition."""
    rules = (rule for tables in ruleset.values() for table in tables.values() for rule in table.rules)
    return any(match.name == AT_LEVEL for rule in rules for match in rule.matches)


def bound(ruleset: Ruleset, numbers: Numbers, tree: GroupTree) -> Ruleset:
    """The rules with the numbers of their control groups. tree: all groups, where a rule needs them (`needs_tree`).

    Without the rules for packets of groups that do not exist: no packet has such a group. A condition that excludes one holds
    for all packets, and is left out. A rule that ends the search at a level is left out further than one level below all groups
    that are meant.
    """
    return {
        family: {
            name: TableRules(
                {chain: tuple(_bound(rules, numbers, tree)) for chain, rules in table.chains.items()},
                tuple(_bound(table.jumps, numbers, tree)),
            )
            for name, table in tables.items()
        }
        for family, tables in ruleset.items()
    }


def _bound(rules: tuple[Rule, ...], numbers: Numbers, tree: GroupTree) -> Iterator[Rule]:
    found = [_of_tree(each, tree) for each in rules]
    deepest = max((level for each in found if each is not None and (level := _level(each, any_group=False)) >= 0), default=-2)
    for rule in found:
        if rule is None or _level(rule, any_group=True) > deepest + 1:
            continue
        groups = [match.options[0] for match in rule.matches if match.name == "cgroup"]
        if not groups:
            yield rule
        elif all(group.negated or numbers.get(group.value) is not None for group in groups):
            yield _with_numbers(rule, numbers)


def _of_tree(rule: Rule, tree: GroupTree) -> Rule | None:
    """The rule with the numbers of the groups that it means; None where no packet has such a group."""
    found = next((match for match in rule.matches if match.name == AT_LEVEL), None)
    if found is None or len(found.options) == 1:
        return rule
    level, meant = found.options
    members = tree.members(int(level.value), meant.value)
    listed = Extension(AT_LEVEL, (level, Option("--numbers", members)))
    return replace(rule, matches=tuple(listed if match is found else match for match in rule.matches)) if members else None


def _level(rule: Rule, any_group: bool) -> int:
    """The level at which it asks for a group, for one of several or for any; -1 where it does not."""
    options = next((match.options for match in rule.matches if match.name == AT_LEVEL), ())
    return int(options[0].value) if options and (len(options) == 1) == any_group else -1


def _with_numbers(rule: Rule, numbers: Numbers) -> Rule:
    kept, found = [], []
    for match in rule.matches:
        if match.name == "cgroup":
            if (number := numbers.get(match.options[0].value)) is None:
                continue
            found.append(str(number))
        kept.append(match)
    if not found:
        return replace(rule, matches=tuple(kept))
    comment = Extension("comment", (Option("--comment", GROUPS + "-".join(found)),))
    # The tag is the last comment.
    return replace(rule, matches=(*kept[:-1], comment, kept[-1]))
