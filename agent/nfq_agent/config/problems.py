"""What is wrong with a configuration, line by line for people: file, key, what was found, and what is allowed."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from nfq_agent.config.capture import MOST_RANGES, CaptureConfig, TapConfig
from nfq_agent.config.models import Agent, Config, ElementSpec, Log, ProxyConfig, QueueConfig, RuleConfig
from nfq_agent.element import Needs
from nfq_agent.elements import ElementError
from nfq_agent.mark import Mark
from nfq_agent.protocols.known import OWNERS
from nfq_agent.values import Endpoint


@dataclass(frozen=True, slots=True)
class Source:
    """Which file each key came from, by its dotted path."""

    main: Path
    origins: dict[tuple[str, ...], Path]

    def file(self, location: tuple[str, ...]) -> Path:
        """The file of a key, or of the table that it would be in."""
        for end in range(len(location), 0, -1):
            if (path := self.origins.get(location[:end])) is not None:
                return path
        return self.main


def cross_faults(config: Config, source: Source) -> Iterator[str]:  # noqa: C901  # one branch for each rule between tables
    """What only shows when tables are looked at together."""

    def fault(location: tuple[str, ...], text: str) -> str:
        return f"{source.file(location)}: {'.'.join(location)}: {text}"

    owners: dict[int, str] = {}
    for name, queue in config.queue.items():
        for number in queue.numbers:
            if number in owners:
                yield fault(
                    ("queue", name, "num" if queue.balance is None else "balance"),
                    f"queue {number} is [queue.{owners[number]}]'s already; allowed: a number of its own for each queue",
                )
                break
            owners[number] = name
        try:
            specs = config.packet_elements(queue)
        except ElementError as error:
            yield from _element_faults(error, ("queue", name, "elements"), source, config)
        else:
            yield from (fault(*each) for each in _missing_facts(specs))
            if queue.copy_mode == "meta":
                for spec in specs:
                    if spec.cls.needs_of(spec.options) > Needs.METADATA and not spec.cls.degrades:
                        yield fault(
                            ("queue", name, "copy"),
                            f'"meta" beside {spec.name!r}, which reads what is in a packet; allowed: "packet"',
                        )
            if queue.gso and (writers := [spec.name for spec in specs if spec.cls.rewrites_of(spec.options)]):
                yield fault(
                    ("queue", name, "gso"),
                    f"gso = true beside {writers[0]!r}, which rewrites packets: an offloaded packet can't be rewritten; "
                    "allowed: gso = false",
                )
    for name, tap in config.tap.items():
        try:
            specs = config.packet_elements(tap)
        except ElementError as error:
            yield from _element_faults(error, ("tap", name, "elements"), source, config)
        else:
            yield from (fault(*each) for each in _missing_facts(specs))
            for key, text in _capture_faults(tap, specs):
                yield fault(("tap", name, key), text)
            for spec in specs:
                if spec.cls.kept_of(spec.options) is not None:
                    yield fault(
                        ("tap", name, "elements"),
                        f"{spec.name!r} has the kernel keep verdicts, and a tap only watches; allowed: without it",
                    )
    listeners: dict[Endpoint, str] = {}
    for name, proxy in config.proxy.items():
        for endpoint in proxy.listen:
            if endpoint in listeners:
                yield fault(
                    ("proxy", name, "listen"),
                    f"{endpoint} is in use by [proxy.{listeners[endpoint]}] already; allowed: a listener of its own",
                )
            listeners[endpoint] = name
        try:
            config.stream_elements(proxy)
        except ElementError as error:
            yield from _element_faults(error, ("proxy", name, "elements"), source, config)
    for name, rule in config.rules.items():
        for kind, wanted, there in (("queue", rule.queue, config.queue), ("proxy", rule.proxy, config.proxy)):
            if wanted is not None and wanted not in there:
                names = ", ".join(sorted(there)) or f"none is configured; add [{kind}.{wanted}]"
                yield fault(("rules", name, kind), f"no {kind} {wanted!r} is configured; allowed: {names}")
        if rule.table_name == "raw" and (queue_of := config.queue.get(rule.queue or "")) is not None:
            try:
                marks = config.kept(queue_of)
            except ElementError:
                # Said above.
                continue
            if marks is not None:
                yield fault(
                    ("rules", name, "table"),
                    "table raw comes before connection tracking, so that offload finds no connection to mark; "
                    "allowed: mangle, filter",
                )
        if rule.proxy in config.proxy and config.proxy[rule.proxy].capture == "tproxy":
            if rule.hooks != ("prerouting",):
                yield fault(("rules", name, "hooks"), 'TPROXY takes what arrives only; allowed: hooks = ["prerouting"]')
            if rule.table is not None:
                yield fault(("rules", name, "table"), f"table {rule.table} has no TPROXY; allowed: without table (it is mangle)")
    # An element that can't be had was said above.
    with contextlib.suppress(ElementError):
        for location, text in _mark_faults(config):
            yield fault(location, text)


def _capture_faults(capture: CaptureConfig, specs: Sequence[ElementSpec]) -> Iterator[tuple[str, str]]:
    """What a tap or an inline link can't do: key and text for each."""
    for spec in specs:
        if spec.cls.rewrites_of(spec.options):
            yield "elements", f"{spec.name!r} rewrites packets, which an interface does not allow; allowed: [queue] with it"
        if spec.cls.reads_process_of(spec.options):
            yield "elements", f"{spec.name!r} asks for the sender's user, which an interface does not show; allowed: without that"
    ranges = len(capture.tcp_ports) + len(capture.udp_ports)
    if ranges > MOST_RANGES:
        yield "tcp_ports", f"{ranges} ports and ranges in tcp_ports and udp_ports; allowed: {MOST_RANGES}, or none for all ports"


def _missing_facts(specs: Sequence[ElementSpec]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Facts that an element asks for and that no element before it keeps: key and text for each."""
    kept: set[str] = set()
    for spec in specs:
        wanted = spec.cls.facts_of(spec.options)
        if missing := [fact for fact in wanted if fact not in kept]:
            behind = " (it is behind)" if any(set(missing) & set(other.cls.keeps_facts) for other in specs) else ""
            text = f"a rule asks for {', '.join(missing)}, which no element before {spec.name!r} in the chain finds{behind}"
            by_dpi = missing[0] in OWNERS or missing[0] in ("protocol", "conflict", "dpi", "dpi_reason")
            provider = '"dpi"' if by_dpi else f"an element that has {missing[0]!r} in its keeps_facts,"
            yield ("element", spec.name, "rule"), f"{text}; allowed: {provider} before it in the queue's elements"
        kept.update(spec.cls.keeps_facts)


def _mark_faults(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Marks of ours that would get into each other's way: key and text for each. Raises ElementError."""
    taken: list[tuple[str, Mark]] = []
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


def _element_faults(error: ElementError, at: tuple[str, ...], source: Source, config: Config) -> Iterator[str]:
    if isinstance(error.reason, ValidationError):
        yield from model_faults(source, error.reason, ("element", error.name), error.options)
    else:
        if error.name in config.element or any(t.get("type") == error.name for t in config.element.values()):
            at = ("element", next((n for n, t in config.element.items() if t.get("type", n) == error.name), error.name))
        yield f"{source.file(at)}: {'.'.join(at)}: {error.reason}"


# A union's branches and validators' names show up in pydantic's locations; they are no keys of the file.
_NO_KEYS = re.compile(r"^(function-|tagged-union|constrained-|literal\[|int$|str$|bool$|float$|.*\[.*\]$)")


def model_faults(
    source: Source, error: ValidationError, prefix: tuple[str, ...] = (), options: type[BaseModel] | None = None
) -> Iterator[str]:
    """One line for each key: what is wrong with it, and all that would be allowed (a union complains once for each member)."""
    found: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for details in error.errors():
        location = prefix + tuple(str(part) for part in details["loc"] if not _NO_KEYS.match(str(part)))
        keys = tuple(part for part in location if not part.isdecimal())
        if details["type"] == "too_short" and keys in found:
            # Nothing was left of a list once its bad members were taken out.
            continue
        what, allowed = _fault(keys, details, options)
        known = found.setdefault(keys, (what, []))[1]
        if allowed not in known:
            known.append(allowed)
    for keys, (what, allowed_here) in found.items():
        yield f"{source.file(keys)}: {'.'.join(keys) or 'the file'}: {what}; allowed: {', or '.join(allowed_here)}"


def _fault(keys: tuple[str, ...], details: Any, options: type[BaseModel] | None) -> tuple[str, str]:
    """What is wrong, and what is allowed."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(keys[:-1], options)
        near = difflib.get_close_matches(keys[-1], known, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"unknown key{hint}", ", ".join(known) or "see nfq-agent.toml(5)"
    if kind == "value_error":
        what, _, allowed = str(context["error"]).partition("; allowed: ")
        return what, allowed
    return f"{_shown(details['input'])}: {details['msg'].lower()}", _allowed(kind, context)


def _allowed(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"at least {context['ge']}" if "ge" in context else f"at most {context['le']}"
    if kind == "string_pattern_mismatch":
        return f"what matches {context['pattern']}"
    if kind == "too_short":
        return f"at least {context['min_length']} of them"
    return {"bool_type": "true or false", "int_type": "a whole number", "string_type": "a string in quotes"}.get(
        kind, "see nfq-agent.toml(5)"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_TABLES: Final[Mapping[str, type[BaseModel]]] = {
    "agent": Agent, "log": Log, "queue": QueueConfig, "rules": RuleConfig, "proxy": ProxyConfig,
    "tap": TapConfig,
}  # fmt: skip


def _known_keys(at: tuple[str, ...], options: type[BaseModel] | None) -> list[str]:
    if not at:
        return list(Config.model_fields)
    if at[0] == "element":
        inner = options
        for key in at[2:]:
            inner = None if inner is None or key not in inner.model_fields else _model_in(inner.model_fields[key].annotation)
        known = [] if inner is None else list(inner.model_fields)
        return ["type", *known] if len(at) == 2 else known
    model = _TABLES.get(at[0])
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a key's type is made of, as in tuple[Model, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in get_args(annotation) if (model := _model_in(each)) is not None), None)
