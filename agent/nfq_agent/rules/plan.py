"""The rules that a configuration asks for (`plan`). No I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Final

from nfq_agent.config.models import Config, QueueConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.mark import Kept, Mark, owner_marks
from nfq_agent.rules.model import (
    EXPECTED,
    FAMILIES,
    HOOK_CHAINS,
    JUMP,
    OFFLOAD_ACCEPTED,
    OFFLOAD_BEGUN,
    OFFLOAD_DENIED,
    OFFLOAD_NEW,
    OWN_TRAFFIC,
    OWNER_NEW,
    Extension,
    Family,
    Option,
    Rule,
    Ruleset,
    TableRules,
    chain_name,
    comment_match,
)
from nfq_agent.rules.proxies import accept_rules, listener_port, table_of
from nfq_agent.rules.selection import SYN, Selected, marked, port_lists, range_lists, selected
from nfq_agent.values import Ports

_OWNED: Final = frozenset(("output", "postrouting"))
# Connection tracking has seen packets of the flow in both directions, this one included.
_ESTABLISHED: Final = Extension("conntrack", (Option("--ctstate", "ESTABLISHED"),))


def plan(
    config: Config, uid: int | str, lists: bool = False, families: Collection[Family] = FAMILIES, groups: bool = True
) -> Ruleset:
    """The rules that a configuration asks for.

    uid: of the agent's own user, whose traffic is never taken; its name stands in for it where a plan is only shown and the user
    is yet to be made. lists: whether one rule of the backend takes a list of any length (RuleHost.lists). families: those that
    the kernel speaks (RuleHost.families). groups: whether a rule can ask for the control group of a socket by its number; else
    the rules of a policy that need it are left to the queue.
    """
    ruleset: dict[Family, dict[str, TableRules]] = {}
    for family in families:
        tables: dict[str, dict[str, list[tuple[Rule, Kept | None]]]] = {}
        for name, rule in config.rules.items():
            if family not in rule.families:
                continue
            kept = None if rule.queue is None else config.kept(config.queue[rule.queue])
            for hook in rule.hooks:
                made = _rules(config, name, rule, family, hook, lists, groups)
                tables.setdefault(table_of(config, rule), {}).setdefault(hook, []).extend((each, kept) for each in made)
        _count_expected(config, family, lists, tables)
        if tables:
            ruleset[family] = {table: _table(config.agent.instance, tables[table], uid, lists) for table in tables}
    # With a proxy, its own connections would be counted there.
    if lists and not config.proxy and any(queue.compile_mode != "off" for queue in config.queue.values()):
        from nfq_agent.rules.policy_map import passing_first  # noqa: PLC0415  # no start waits for it where it is off

        ruleset = {family: {name: passing_first(table) for name, table in each.items()} for family, each in ruleset.items()}
    # Chains of an owned table cannot accept for those of others: there the rules are in the chains that drop.
    for family, accepting in ({} if lists else accept_rules(config, families)).items():
        current = ruleset[family].get("filter", TableRules())
        ruleset[family]["filter"] = TableRules(current.chains, (*current.jumps, *accepting))
    return ruleset


def _count_expected(
    config: Config, family: Family, lists: bool, tables: dict[str, dict[str, list[tuple[Rule, Kept | None]]]]
) -> None:
    """Add the rules of table mangle that count what table nat should lead to a proxy: another NAT may be asked before ours.

    Not where a queue is asked in the same hook of that table: what it drops would seem to be missing.
    """
    made: dict[str, list[tuple[Rule, Kept | None]]] = {}
    for name, rule in config.rules.items():
        if rule.proxy is None or config.proxy[rule.proxy].capture != "redirect" or family not in rule.families:
            continue
        for hook in rule.hooks:
            if hook not in tables.get("mangle", {}):
                made.setdefault(hook, []).extend((each, None) for each in _counting(config, name, rule, family, hook, lists))
    if counting := {each: rules for each, rules in made.items() if rules}:
        tables.setdefault("mangle", {}).update(counting)


def _counting(config: Config, name: str, rule: RuleConfig, family: Family, hook: str, lists: bool) -> Iterator[Rule]:
    proxy = config.proxy[rule.proxy or ""]
    port = listener_port(proxy, family, rule.port)
    if port is None:
        return
    comment = comment_match(config.agent.instance, f"{name}{EXPECTED}{port}")
    own_traffic = Extension("mark", (Option("--mark", str(proxy.own_traffic), negated=True),))
    away = tuple(
        Extension("iprange", (Option("--dst-range", ranges, negated=True),))
        for ranges in range_lists(proxy.exclude, family, lists)
    )
    for each in selected(name, rule, hook, family, lists):
        matches = (SYN, *each.matches, own_traffic, *away, *each.tail, comment)
        chain = chain_name(config.agent.instance, hook)
        yield Rule(chain, Extension(""), matches, each.protocol, each.in_interface, each.out_interface)


def _table(instance: str, hooks: Mapping[str, list[tuple[Rule, Kept | None]]], uid: int | str, lists: bool) -> TableRules:
    chains: dict[str, tuple[Rule, ...]] = {}
    jumps: list[Rule] = []
    for hook in HOOK_CHAINS:
        if not (rules := hooks.get(hook)):
            continue
        chain = chain_name(instance, hook)
        keeping = [*_beginning(instance, hook, hooks), *_keeping(instance, chain, rules, lists)]
        # Only where every rule counts is one saved; and an owner that must not match is a plain expression only as a RETURN.
        single = len(rules) == 1 and not lists
        if single:
            chains[chain] = (*keeping, _without_own_traffic(rules[0][0], hook, uid))
        else:
            chains[chain] = _several_rules(instance, chain, hook, [*keeping, *(rule for rule, _ in rules)], uid)
        jumps.append(Rule(hook.upper(), Extension(chain), (comment_match(instance, JUMP),)))
    return TableRules(chains, tuple(jumps))


def _beginning(instance: str, hook: str, hooks: Mapping[str, list[tuple[Rule, Kept | None]]]) -> Iterator[Rule]:
    """The rules by which a connection that begins is judged, though connection tracking still has the one before on its ends.

    It keeps that one, and its mark, where the server ended it by a reset: nf_conntrack_tcp_packet (nf_conntrack_proto_tcp.c)
    ignores the SYN. Not where the SYN comes in by the loopback and has begun in OUTPUT.
    """
    chain, comment = chain_name(instance, hook), comment_match(instance, OFFLOAD_BEGUN)
    sent = {kept for _, kept in hooks.get("output", ())} if hook in ("prerouting", "input") else set()
    for kept in dict.fromkeys(kept for _, kept in hooks[hook] if kept is not None):
        forget = Extension("CONNMARK", (Option("--set-xmark", str(Mark(0, kept.mask))),))
        marks = Extension("connmark", (Option("--mark", str(Mark(0, kept.mask)), negated=True),))
        yield Rule(chain, forget, (SYN, marks, comment), "tcp", "! lo" if kept in sent else "")


def _keeping(instance: str, chain: str, rules: list[tuple[Rule, Kept | None]], lists: bool) -> list[Rule]:
    """The rules that keep the verdicts on flows, for the queues where an element offloads; they come before the others.

    A packet whose verdict holds for its flow passes the hook again with our mark on it (REPEAT): the mark is saved in the
    connection, and what the connection says decides, for this packet and for all that follow. `! --mark` on the queueing
    rule itself would be shorter, but xt_connmark matches no untracked packet then, which would pass unjudged.
    """
    made: list[Rule] = []
    for kept in dict.fromkeys(kept for _, kept in rules if kept is not None):
        made += _saving(instance, chain, kept, lists)
        accepted = Extension("connmark", (Option("--mark", str(kept.accept)),))
        comment = comment_match(instance, OFFLOAD_ACCEPTED)
        if all(other == kept for _, other in rules):
            made.append(Rule(chain, Extension("RETURN"), (accepted, comment)))
        else:
            # Traffic of another queue must still reach that queue.
            for rule, other in rules:
                if other == kept and rule.queues:
                    matches = (*rule.matches[:-1], accepted, comment)
                    made.append(Rule(chain, Extension("RETURN"), matches, rule.protocol, rule.in_interface, rule.out_interface))
        denied = Extension("connmark", (Option("--mark", str(kept.deny)),))
        made.append(Rule(chain, Extension("DROP"), (denied, comment_match(instance, OFFLOAD_DENIED))))
    return made


def _saving(instance: str, chain: str, kept: Kept, lists: bool) -> list[Rule]:
    """The rules that save a packet's mark of ours in its connection."""
    comment = comment_match(instance, OFFLOAD_NEW)
    if lists:
        # nf_tables copies no part of a mark into another before Linux 6.13, but it sets one to a value.
        return [Rule(chain, Extension("CONNMARK", (Option("--set-xmark", str(mark)),)), (marked(mark), comment)) for mark in kept]
    mask = f"{kept.mask:#x}"
    ours = Extension("mark", (Option("--mark", f"0x0/{mask}", negated=True),))
    save = (Option("--save-mark"), Option("--nfmask", mask), Option("--ctmask", mask))
    return [Rule(chain, Extension("CONNMARK", save), (ours, comment))]


def _without_own_traffic(rule: Rule, hook: str, uid: int | str) -> Rule:
    """The only rule of a chain, with the exclusion of the agent's own user in it.

    The baseline then has four rules a family, and some Kubernetes images assume that a host with ten or more legacy rules
    uses them (iptables-wrappers).
    """
    # A rule for the packets of one user cannot match the agent's, unless it is the agent's user.
    if hook not in _OWNED or any(map(_is_one_user, rule.matches)):
        return rule
    exclusion = Extension("owner", (Option("--uid-owner", str(uid), negated=True),))
    *others, comment = rule.matches
    return replace(rule, matches=(*others, exclusion, comment))


def _is_one_user(match: Extension) -> bool:
    return match.name == "owner" and any(
        option.name == "--uid-owner" and not option.negated and "-" not in option.value for option in match.options
    )


def _several_rules(instance: str, chain: str, hook: str, rules: list[Rule], uid: int | str) -> tuple[Rule, ...]:
    """A chain that begins with a RETURN for the agent's own user, and ends with one for all other packets."""
    head: tuple[Rule, ...] = ()
    if hook in _OWNED:
        owner = Extension("owner", (Option("--uid-owner", str(uid)),))
        head = (Rule(chain, Extension("RETURN"), (owner, comment_match(instance, OWN_TRAFFIC))),)
    return (*head, *rules, Rule(chain, Extension("RETURN"), (comment_match(instance, "end"),)))


def _rules(config: Config, name: str, rule: RuleConfig, family: Family, hook: str, lists: bool, groups: bool) -> list[Rule]:
    """The rules of one [rules.NAME] for one family and hook."""
    chain = chain_name(config.agent.instance, hook)
    comment = comment_match(config.agent.instance, name)
    made: list[Rule] = []
    found = list(selected(name, rule, hook, family, lists))
    if rule.by_owner(hook):
        made += _marking(config, name, chain, found)
        found += _by_mark(config, name, found)
    for each in found:
        if lists and rule.queue is not None and (queue := config.queue[rule.queue]).compile_mode != "off":
            from nfq_agent.rules import kernel_policy, owner_policy  # noqa: PLC0415  # no start waits for them where it is off

            def ask(what: Selected, queue: QueueConfig = queue) -> Iterator[Rule]:
                return _queueing(queue, chain, what._replace(tail=(*what.tail, comment)))

            made += kernel_policy.before_queue(config, name, rule, chain, hook, family, each, ask)
            made += owner_policy.before_queue(config, name, rule, chain, hook, family, each, ask, groups)
        each = each._replace(tail=(*each.tail, comment))
        if rule.proxy is not None:
            made += _capture_rules(config, rule, chain, family, lists, each)
        else:
            made += _queueing(config.queue[rule.queue or ""], chain, each)
    return made


def _queueing(queue: QueueConfig, chain: str, what: Selected) -> Iterator[Rule]:
    """The rule that sends packets to a queue; before it, where it keeps room for them, the one for flows that were answered."""
    protocol, matches, inward, outward, tail = what
    if queue.room_for_known:
        # Not by a mark of ours: it would take a verdict REPEAT for each flow, and a flow whose first packet found the queue
        # full has none.
        known = (*matches, *tail[:-1], _ESTABLISHED, tail[-1])
        yield Rule(chain, _queue_target(queue, queue.known_numbers), known, protocol, inward, outward)
    yield Rule(chain, _queue_target(queue, queue.numbers), (*matches, *tail), protocol, inward, outward)


def _marking(config: Config, name: str, chain: str, found: list[Selected]) -> Iterator[Rule]:
    """The rules that mark the connections of an owner: what is sent after close or exit has none, and is known by that mark."""
    target = Extension("CONNMARK", (Option("--set-xmark", str(_owner_mark(config, name))),))
    comment = comment_match(config.agent.instance, OWNER_NEW)
    for each in found:
        yield each.rule(chain, target, comment)


def _by_mark(config: Config, name: str, found: list[Selected]) -> list[Selected]:
    """The same traffic by the mark of its connection, in place of the owner. Packets without a connection are not among it."""
    mark = Extension("connmark", (Option("--mark", str(_owner_mark(config, name))),))
    tails = [tuple(match for match in each.tail if not _is_by_owner(match)) for each in found]
    return list(dict.fromkeys(each._replace(tail=(*tail, mark)) for each, tail in zip(found, tails, strict=True)))


def _is_by_owner(match: Extension) -> bool:
    return match.name in ("owner", "cgroup") and not match.options[0].negated


def _owner_mark(config: Config, name: str) -> Mark:
    named = [each for each, rule in config.rules.items() if any(map(rule.by_owner, rule.hooks))]
    return owner_marks(named, config.agent.owner_mask)[name]


def _queue_target(queue: QueueConfig, numbers: range) -> Extension:
    if len(numbers) > 1:
        options = [Option("--queue-balance", f"{numbers[0]}:{numbers[-1]}")]
    else:
        options = [Option("--queue-num", str(numbers[0]))]
    if queue.bypass:
        options.append(Option("--queue-bypass"))
    if queue.cpu_fanout:
        options.append(Option("--queue-cpu-fanout"))
    return Extension("NFQUEUE", tuple(options))


def _capture_rules(config: Config, rule: RuleConfig, chain: str, family: Family, lists: bool, what: Selected) -> Iterator[Rule]:
    """The rules that redirect connections to a proxy, after those that exclude some of them."""
    protocol, matches, inward, outward, tail = what
    proxy = config.proxy[rule.proxy or ""]
    port = listener_port(proxy, family, rule.port)
    if port is None:
        return
    leave = Extension("RETURN")
    # A connection to a listener's own address is refused by the proxy; redirecting it would be a loop.
    own = sorted({each.port for every in config.proxy.values() for each in every.listen})
    taken = [Ports(each, each) for each in own if any(each in ports for ports in rule.tcp_ports)]
    for ports in port_lists(taken, lists):
        local = Extension("addrtype", (Option("--dst-type", "LOCAL"),))
        listeners = Extension("multiport", (Option("--dports", ports),))
        yield Rule(chain, leave, (listeners, local, *tail), protocol, inward, outward)
    for ranges in range_lists(proxy.exclude, family, lists):
        destinations = Extension("iprange", (Option("--dst-range", ranges),))
        yield Rule(chain, leave, (*matches, destinations, *tail), protocol, inward, outward)
    # Connections that run already continue unchanged: redirected to the proxy, which does not know them, they would be reset.
    # With
    # REDIRECT too: a first rule of table nat starts connection tracking, which takes their next packet for a new connection.
    # And the connections of a proxy of nfq-agent continue: redirecting them would be a loop, also between two instances.
    own_traffic = Extension("mark", (Option("--mark", str(proxy.own_traffic), negated=True),))
    matches = (SYN, *matches, own_traffic)
    if proxy.capture == "redirect":
        target = Extension("REDIRECT", (Option("--to-ports", str(port)),))
    else:
        address = "::" if family == "inet6" else "0.0.0.0"
        mark = Option("--tproxy-mark", str(proxy.tproxy_mark))
        target = Extension("TPROXY", (Option("--on-port", str(port)), Option("--on-ip", address), mark))
        # Packets of a connection of the proxy: also the answers to a client's address that it uses.
        own_socket = Extension("socket", (Option("--transparent"),))
        keep = Extension("MARK", (Option("--set-xmark", str(proxy.tproxy_mark)),))
        yield Rule(chain, keep, (own_socket, *tail), "tcp")
    yield Rule(chain, target, (*matches, *tail), protocol, inward, outward)
