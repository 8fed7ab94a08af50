"""The rules that stay: while proxies drain, during a reload, and after a failure. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

from nfq_agent.rules.model import Family, Rule, Ruleset, TableRules, TableState


def keep_for_draining(ruleset: Ruleset) -> Ruleset:
    """The rules that stay while proxies drain: no new connection is redirected to them, running ones stay connected.

    The last rule that needs connection tracking takes the NAT of running connections with it when it goes
    (nf_ct_netns_put() in net/netfilter/nf_conntrack_proto.c), so chains of table nat stay, with no jump to them. Of TPROXY,
    the rule for connections that are there stays, and of the firewall's hook those that accept both. Everything else goes.
    """
    kept: dict[Family, dict[str, TableRules]] = {}
    for family, tables in ruleset.items():
        for table, rules in tables.items():
            if table == "nat":
                kept.setdefault(family, {})[table] = TableRules(rules.chains)
                continue
            if accepting := tuple(each for each in rules.jumps if each.target.name == "ACCEPT"):
                kept.setdefault(family, {})[table] = TableRules({}, accepting)
                continue
            chains = {
                chain: tuple(rule for rule in inside if any(match.name == "socket" for match in rule.matches))
                for chain, inside in rules.chains.items()
                if any(rule.target.name == "TPROXY" for rule in inside)
            }
            if chains:
                jumps = tuple(jump for jump in rules.jumps if jump.target.name in chains)
                kept.setdefault(family, {})[table] = TableRules(chains, jumps)
    return kept


def merged(ruleset: Ruleset, standing: Ruleset) -> Ruleset:
    """`ruleset`, and what of `standing` (what `keep_for_draining` leaves) it lacks: chains, and rules in those that both have.

    Of table nat, chains alone: in a chain with a jump to it, an old rule would redirect new connections.
    """
    joined: dict[Family, dict[str, TableRules]] = {family: dict(tables) for family, tables in ruleset.items()}
    for family, tables in standing.items():
        for table, rules in tables.items():
            present = joined.setdefault(family, {}).get(table, TableRules())
            chains = dict(present.chains)
            for chain, inside in rules.chains.items():
                if chain not in chains:
                    chains[chain] = inside
                elif table != "nat":
                    chains[chain] = (*(rule for rule in inside if rule not in chains[chain]), *chains[chain])
            jumps = tuple(each for each in rules.jumps if each.target.name not in present.chains and each not in present.jumps)
            joined[family][table] = TableRules(chains, (*present.jumps, *jumps))
    return joined


def fail_closed(state: Mapping[str, TableState]) -> dict[str, TableRules]:
    """What stays after a failure: rules without `--queue-bypass`, which drop traffic while no process serves the queue.

    Decided from the rules themselves, so that no configuration is needed. Chains without such a rule are removed.
    """
    kept: dict[str, TableRules] = {}
    for table, present in state.items():
        chains: dict[str, tuple[Rule, ...]] = {}
        for name, installed in present.chains.items():
            rules = tuple(found.rule for found in installed if not _fails_open(found.rule))
            if any(rule.target.name == "NFQUEUE" for rule in rules):
                chains[name] = rules
        jumps = tuple(found.rule for found in present.jumps if found.rule.target.name in chains)
        if chains:
            kept[table] = TableRules(chains, jumps)
    return kept


def _fails_open(rule: Rule) -> bool:
    bypass = any(option.name == "--queue-bypass" for option in rule.target.options)
    return rule.target.name in ("REDIRECT", "TPROXY") or (rule.target.name == "NFQUEUE" and bypass)


def taken_back(
    now: Mapping[str, TableState], before: Mapping[str, TableState], desired: Mapping[str, TableRules]
) -> dict[str, TableRules]:
    """The rules of a family when a change is undone: without what it added, with what it removed, and all else as it is now.

    before: what was there. desired: what the change put there.
    """
    made: dict[str, TableRules] = {}
    for table in {*now, *before}:
        was, wish = before.get(table, TableState()).as_rules(), desired.get(table, TableRules())
        present = now.get(table, TableState()).as_rules()
        chains = {
            chain: _undone(present.chains.get(chain, ()), was.chains.get(chain, ()), wish.chains.get(chain, ()))
            for chain in {*present.chains, *was.chains}
        }
        kept = {chain: rules for chain, rules in chains.items() if rules or chain in was.chains}
        made[table] = TableRules(kept, _undone(present.jumps, was.jumps, wish.jumps))
    return made


def _undone(now: tuple[Rule, ...], before: tuple[Rule, ...], desired: tuple[Rule, ...]) -> tuple[Rule, ...]:
    if now == desired:
        return before
    left = tuple(rule for rule in now if rule in before or rule not in desired)
    return (*left, *(rule for rule in before if rule not in desired and rule not in left))
