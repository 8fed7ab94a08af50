"""What is wrong with a configuration between its tables: one line for each fault."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from nfq_agent.config.capture import MOST_RANGES, CaptureConfig
from nfq_agent.config.lines import Place
from nfq_agent.config.models import Config, ElementSpec
from nfq_agent.config.name_needs import name_faults
from nfq_agent.config.overlaps import overlaps
from nfq_agent.config.policies import rule_that
from nfq_agent.config.source import Source
from nfq_agent.elements import ElementError
from nfq_agent.mark import Mark, owner_marks
from nfq_agent.values import Endpoint


def cross_faults(config: Config, source: Source) -> Iterator[str]:  # noqa: C901  # one branch for each rule between tables
    """Faults that show only when tables are compared."""

    def fault(location: Place, text: str) -> str:
        return source.fault(location, text)

    owners: dict[int, str] = {}
    for name, queue in config.queue.items():
        for number in (*queue.numbers, *queue.known_numbers):
            if number in owners:
                whose = f"queue {number} is used by [queue.{owners[number]}]"
                why = ""
                if number in queue.known_numbers:
                    why = f"; room_for_known takes one number more for each, {number} here"
                yield fault(
                    ("queue", name, "num" if queue.balance is None else "balance"), f"{whose}{why}; allowed: another number"
                )
                break
            owners[number] = name
        try:
            specs = config.packet_elements(queue)
        except ElementError:
            # Reported by element_faults, as everywhere here.
            pass
        else:
            yield from (fault(*each) for each in _missing_facts(specs))
            if queue.copy_mode == "meta" and specs:
                from nfq_agent.element import Needs

                for spec in specs:
                    if spec.cls.needs_of(spec.options) > Needs.METADATA and not spec.cls.degrades:
                        yield fault(
                            ("queue", name, "copy"),
                            f'"meta" beside {spec.name!r}, which reads what is in a packet; allowed: "packet"',
                        )
            if queue.gso is True and (writers := [spec.name for spec in specs if spec.cls.rewrites_of(spec.options)]):
                yield fault(
                    ("queue", name, "gso"),
                    f"gso = true beside {writers[0]!r}, which rewrites packets: an offloaded packet cannot be rewritten; "
                    "allowed: gso = false",
                )
    tables: list[tuple[str, str, CaptureConfig]] = [("tap", name, tap) for name, tap in config.tap.items()]
    tables += [("inline", name, inline) for name, inline in config.inline.items()]
    for kind, name, capture in tables:
        try:
            specs = config.packet_elements(capture)
        except ElementError:
            pass
        else:
            yield from (fault(*each) for each in _missing_facts(specs))
            for key, text in _capture_faults(kind, capture, specs):
                yield fault((kind, name, key), text)
    for location, text in overlaps(config):
        yield fault(location, text)
    listeners: dict[Endpoint, str] = {}
    for name, proxy in config.proxy.items():
        for endpoint in proxy.listen:
            if endpoint in listeners:
                yield fault(
                    ("proxy", name, "listen"),
                    f"{endpoint} is in use by [proxy.{listeners[endpoint]}] already; allowed: a listener of its own",
                )
            listeners[endpoint] = name
    for name, rule in config.rules.items():
        for kind, wanted, configured in (("queue", rule.queue, config.queue), ("proxy", rule.proxy, config.proxy)):
            if wanted is not None and wanted not in configured:
                names = ", ".join(sorted(configured)) or f"none is configured; add [{kind}.{wanted}]"
                yield fault(("rules", name, kind), f"no {kind} {wanted!r} is configured; allowed: {names}")
        if rule.port is not None and (led_to := config.proxy.get(rule.proxy or "")) is not None:
            ports = sorted({each.port for each in led_to.listen})
            if rule.port not in ports:
                yield fault(
                    ("rules", name, "port"),
                    f"proxy {rule.proxy} does not listen on port {rule.port}; allowed: {', '.join(map(str, ports))}",
                )
        if rule.table_name == "raw" and (queue_of := config.queue.get(rule.queue or "")) is not None:
            if queue_of.room_for_known:
                yield fault(
                    ("rules", name, "table"),
                    f"table raw comes before connection tracking, by which room_for_known of [queue.{rule.queue}] knows a flow; "
                    "allowed: mangle, filter",
                )
            try:
                marks = config.kept(queue_of)
            except ElementError:
                continue
            if marks is not None:
                yield fault(
                    ("rules", name, "table"),
                    "table raw comes before connection tracking, so that offload finds no connection to mark; "
                    "allowed: mangle, filter",
                )
        if rule.proxy in config.proxy and config.proxy[rule.proxy].capture == "tproxy":
            if rule.hooks != ("prerouting",):
                yield fault(("rules", name, "hooks"), 'TPROXY takes only incoming packets; allowed: hooks = ["prerouting"]')
            if rule.table is not None:
                yield fault(("rules", name, "table"), f"table {rule.table} has no TPROXY; allowed: without table (it is mangle)")
    # An element that cannot be loaded was reported above.
    with contextlib.suppress(ElementError):
        yield from (fault(*each) for each in _mark_faults(config))
    yield from (fault(*each) for each in name_faults(config))


def _capture_faults(kind: str, capture: CaptureConfig, specs: Sequence[ElementSpec]) -> Iterator[tuple[str, str]]:
    """What a tap or an inline link cannot do: key and text for each."""
    for spec in specs:
        if spec.cls.rewrites_of(spec.options) or spec.cls.rewrites_small:
            yield "elements", f"{spec.name!r} rewrites packets, which an interface does not allow; allowed: [queue] with it"
        if spec.cls.reads_process_of(spec.options):
            yield (
                "elements",
                f"{spec.name!r} asks for the sender's user, which an interface does not show; allowed: without this condition",
            )
        if kind == "tap" and spec.cls.kept_of(spec.options) is not None:
            yield "elements", f"{spec.name!r} has the kernel keep verdicts, and a tap only watches; allowed: without it"
    ranges = len(capture.tcp_ports) + len(capture.udp_ports)
    if ranges > MOST_RANGES:
        yield "tcp_ports", f"{ranges} ports and ranges in tcp_ports and udp_ports; allowed: {MOST_RANGES}, or none for all ports"


def _missing_facts(specs: Sequence[ElementSpec]) -> Iterator[tuple[Place, str]]:
    """Facts that an element asks for and that no element before it keeps: key and text for each."""
    kept: set[str] = set()
    for spec in specs:
        wanted = spec.cls.facts_of(spec.options)
        if missing := [fact for fact in wanted if fact not in kept]:
            behind = " (it comes later)" if any(set(missing) & set(other.cls.keeps_facts) for other in specs) else ""
            text = f"a rule asks for {', '.join(missing)}, which no element before {spec.name!r} in the chain finds{behind}"
            from nfq_agent.protocols.known import OWNERS

            by_dpi = missing[0] in OWNERS or missing[0] in ("protocol", "conflict", "dpi", "dpi_reason", "encrypted")
            provider = '"dpi"' if by_dpi else f"an element that has {missing[0]!r} in its keeps_facts,"
            rule = rule_that(spec, lambda each: bool(set(missing) & {fact for fact, _ in each.wanted}))
            yield ("element", spec.name, "rule", *rule), f"{text}; allowed: {provider} before it in the queue's elements"
        kept.update(spec.cls.keeps_facts)


def _mark_faults(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Marks that share bits with another mark: key and text for each. Raises ElementError."""
    taken: list[tuple[str, Mark]] = []
    by_owner = [name for name, rule in config.rules.items() if any(map(rule.by_owner, rule.hooks))]
    if by_owner:
        try:
            owner_marks(by_owner, config.agent.owner_mask)
        except ValueError as error:
            yield ("agent", "owner_mask"), f"{error}; allowed: a mask of more bits"
        taken.append(("agent.owner_mask", Mark(0, config.agent.owner_mask)))
    for name, proxy in config.proxy.items():
        if proxy.capture == "tproxy":
            taken.append((f"proxy.{name}.tproxy_mark", proxy.tproxy_mark))
        taken.append((f"proxy.{name}.own_mark", proxy.own_mark))
        if proxy.mark is not None:
            taken.append((f"proxy.{name}.mark", proxy.mark))
    seen: set[str] = set()
    for queue in config.queue.values():
        for spec in config.packet_elements(queue):
            marks = spec.cls.kept_of(spec.options)
            if marks is None or spec.name in seen:
                continue
            seen.add(spec.name)
            for other, mark in taken:
                if mark.mask & marks.mask:
                    text = f"its mask {marks.mask:#x} shares bits with {other} = {mark}; allowed: bits of its own for each"
                    yield ("element", spec.name, "mark"), text
            taken.append((f"element.{spec.name}.mark", marks.accept))
