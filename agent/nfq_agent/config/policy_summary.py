"""What a configuration does with the packets of each queue, tap, inline link and proxy, as plain values: shown and compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from nfq_agent.config.capture import InlineConfig, TapConfig
from nfq_agent.config.model import Model, ModelField
from nfq_agent.config.models import Config, ElementSpec, QueueConfig
from nfq_agent.config.policies import drops_by_default, policy_of
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.config.ssh_access import cuts_ssh
from nfq_agent.edits import edits
from nfq_agent.elements.loading import code_of
from nfq_agent.mark import parse_mask
from nfq_agent.values import duration, duration_text, size, size_text

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from nfq_agent.policy_options import RuleOptions

# Values of a list that are written out.
_SHOWN: Final = 8
_FIRST: Final = ("mode", "default", "on_error")
# What a summary has besides keys.
_OTHERS: Final = ("elements", "drops_unmatched", "cuts_ssh")
_TAP: Final = "tap "
_INLINE: Final = "inline "
_PROXY: Final = "proxy "
# No table of a queue has such a name.
_AGENT: Final = "[agent]"
_LOG: Final = "[log]"
# What a change is of, by how its line begins; any other is one of policy.
_KINDS: Final = {_PROXY: "proxies", _AGENT: "the agent's keys", _LOG: "the log"}
# Keys with which a reload is refused.
_AT_A_START: Final = ("instance", "user", "backend")


def summary(config: Config) -> dict[str, dict[str, Any]]:
    """For each queue: its keys, its elements in order, of each its options, and of a policy its rules. Plain values for JSON.

    The same for each tap, inline link and proxy, as `tap NAME` and so on, and the keys of `[agent]` and `[log]`.
    """
    return {
        **{name: _of(config, queue, cuts_ssh(config, queue)) for name, queue in config.queue.items()},
        **{f"{_TAP}{name}": _of(config, tap) for name, tap in config.tap.items()},
        **{f"{_INLINE}{name}": _of(config, inline, cuts_ssh(config, inline)) for name, inline in config.inline.items()},
        **{f"{_PROXY}{name}": _of_proxy(config, proxy) for name, proxy in config.proxy.items()},
        _AGENT: _values(config.agent),
        _LOG: _values(config.log),
    }


def told(summaries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One sentence for each queue, tap, inline link and proxy: what happens to its packets."""
    for name, each in summaries.items():
        if name not in (_AGENT, _LOG):
            yield f"{_title(name)}: {'; '.join(_of_connections(each) if name.startswith(_PROXY) else _of_packets(each))}"


def _of_packets(each: Mapping[str, Any]) -> Iterator[str]:
    yield f"mode {each['mode']}" if "mode" in each else "only watches"
    asked = [element for element in each["elements"] if "rules" in element]
    for element in asked:
        count = f"{len(element['rules'])} rule{'s' * (len(element['rules']) != 1)}"
        yield f"{element['name']}: {count}, else {element['options'].get('default') or 'the next element'}"
    if not any(element["options"].get("default") for element in asked):
        yield f"default {each.get('default', 'accept')}"
    if consequence := _consequence(each):
        yield consequence


def _of_connections(each: Mapping[str, Any]) -> Iterator[str]:
    yield f"listens on {each['listen']}"
    yield f"elements {', '.join(element['name'] for element in each['elements']) or 'none'}"
    yield f"connects to {each['target'] or 'where the client wanted to'}"


def differences(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What changes for the packets of each queue, tap, inline link and proxy, and of the agent, one line for each change."""
    # An agent of an earlier version tells of its queues, taps and inline links alone.
    known = {name for name in after if _AGENT in before or not (name in (_AGENT, _LOG) or name.startswith(_PROXY))}
    for name in (*before, *(name for name in after if name not in before)):
        if name not in after:
            yield f"{_title(name)}: no longer served"
        elif name not in known:
            continue
        elif name not in before:
            yield from (f"new {line}" for line in told({name: after[name]}))
        elif name in (_AGENT, _LOG):
            yield from (f"{name}: {line}" for line in _changed_keys(before[name], after[name]))
        else:
            yield from (f"{_title(name)}: {line}" for line in _changes(before[name], after[name]))


def counted(lines: Iterable[str]) -> Iterator[str]:
    """How many of the changes that `differences` tells are about what, for a summary."""
    kinds = [*map(_kind, lines)]
    found = [(kinds.count(kind), kind) for kind in dict.fromkeys(("policy", *_KINDS.values())) if kind in kinds]
    for place, (number, kind) in enumerate(found):
        yield f"{number} of {kind}" if place else f"{number} change{'s' * (number != 1)} of {kind}"


def _kind(line: str) -> str:
    subject = line.removeprefix("new ")
    return next((kind for begin, kind in _KINDS.items() if subject.startswith(begin)), "policy")


def _title(name: str) -> str:
    return name if name.startswith((_TAP, _INLINE, _PROXY)) else f"queue {name}"


def _of(config: Config, table: QueueConfig | TapConfig | InlineConfig, ssh: str = "") -> dict[str, Any]:
    """ssh: which SSH it cuts."""
    found = _values(table, "elements")
    found["elements"] = [_of_element(config, spec) for spec in config.packet_elements(table)]
    # A tap drops nothing.
    found["drops_unmatched"] = not isinstance(table, TapConfig) and bool(drops_by_default(config, table))
    found["cuts_ssh"] = ssh
    return found


def _of_proxy(config: Config, proxy: ProxyConfig) -> dict[str, Any]:
    found = _values(proxy, "elements")
    found["elements"] = [_of_element(config, spec) for spec in config.stream_elements(proxy)]
    found["drops_unmatched"], found["cuts_ssh"] = False, ""
    return found


def _values(table: BaseModel | Model, *without: str) -> dict[str, Any]:
    """The keys of a table as the file has them, with their values; what says most comes first."""
    fields: Mapping[str, FieldInfo | ModelField] = type(table).model_fields
    names = sorted((name for name in fields if name not in without), key=lambda name: name not in _FIRST)
    return {fields[name].alias or name: _plain(getattr(table, name), fields[name]) for name in names}


def _of_element(config: Config, spec: ElementSpec) -> dict[str, Any]:
    kind = config.element.get(spec.name, {}).get("type", spec.name)
    found: dict[str, Any] = {"name": spec.name, "type": spec.cls.__name__, "kind": kind}
    if (code := code_of(spec.cls)) is not None:
        found["code"] = code
    if policy_of(spec) is not None:
        found["rules"] = [_of_rule(rule) for rule in spec.options.rule]
    found["options"] = _values(spec.options, *(("rule",) if "rules" in found else ()))
    return found


def _of_rule(rule: RuleOptions) -> str:
    given = rule.model_dump(exclude_none=True, exclude_defaults=True).keys() - {"action", "name"}
    conditions = [f"{key} {_text(getattr(rule, key))}" for key in type(rule).model_fields if key in given]
    label = f" ({rule.name})" if rule.name else ""
    return f"{rule.action}{label} {', '.join(conditions) or 'everything'}"


def _plain(value: object, field: FieldInfo | ModelField) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        parsers = {getattr(each, "func", None) for each in (*field.metadata, *_metadata(field.annotation))}
        if duration in parsers:
            return duration_text(value)
        if size in parsers:
            return size_text(int(value))
        if parse_mask in parsers:
            return f"{value:#x}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _text(value)


def _metadata(annotation: Any) -> Iterator[Any]:
    """What stands beside the types of which a type is made."""
    yield from getattr(annotation, "__metadata__", ())
    for each in getattr(annotation, "__args__", ()):
        yield from _metadata(each)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_text(each)}" for key, each in value.items())
    if isinstance(value, tuple | list | set | frozenset):
        words = sorted(map(str, value)) if isinstance(value, set | frozenset) else [*map(str, value)]
        if len(words) > _SHOWN:
            # The texts of two long lists that differ must differ.
            return f"{' '.join(words[:_SHOWN])} and {len(words) - _SHOWN} more ({crc32(chr(10).join(words).encode()):08x})"
        return " ".join(words)
    return str(value)


def _changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in (key for key in after if key not in _OTHERS):
        # The previous agent may not have told it.
        if key in before and before[key] != after[key]:
            restart = "; a reload refuses it, a restart takes it" if key in _AT_A_START else ""
            yield f"{key} {_word(before[key])} -> {_word(after[key])}{restart}"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    yield from _changed_keys(before, after)
    names = [[each["name"] for each in side["elements"]] for side in (before, after)]
    if names[0] != names[1]:
        yield f"elements {', '.join(names[0]) or 'none'} -> {', '.join(names[1]) or 'none'}"
    old = {each["name"]: each for each in before["elements"]}
    for element in after["elements"]:
        if element["name"] in old:
            yield from (f"{element['name']}: {line}" for line in _element_changes(old[element["name"]], element))
        else:
            yield from (f"{element['name']}: + {rule}" for rule in element.get("rules", ()))
    if (consequence := _consequence(after)) and consequence != _consequence(before):
        yield consequence


def _element_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    if "kind" in before and before["kind"] != after["kind"]:
        yield f"type {before['kind']} -> {after['kind']}"
    elif before.get("code") != after.get("code") and "code" in before:
        yield "its code has changed"
    for key, value in after["options"].items():
        if (earlier := before["options"].get(key)) != value:
            yield f"{key} {_word(earlier)} -> {_word(value)}"
    yield from _rule_changes(before.get("rules", ()), after.get("rules", ()))


def _rule_changes(before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """The rules that come, go, or stand at another place; places count from 1."""
    # Not ndiff: it compares each removed rule with each added one, letter by letter.
    blocks = edits(before, after)
    gone = [place for kind, first, last, _, _ in blocks if kind != "equal" for place in range(first, last)]
    come = [place for kind, _, _, first, last in blocks if kind != "equal" for place in range(first, last)]
    moved: dict[int, int] = {}
    waiting: dict[str, list[int]] = {}
    for place in come:
        waiting.setdefault(after[place], []).append(place)
    for place in gone:
        if waiting.get(before[place]):
            moved[place] = waiting[before[place]].pop(0)
    new = set(moved.values())
    for kind, first, last, begin, end in blocks:
        if kind != "equal":
            for place in range(first, last):
                if place in moved:
                    yield f"rule {place + 1} -> {moved[place] + 1}: {before[place]}"
                else:
                    yield f"- {before[place]}"
            yield from (f"+ {after[place]}" for place in range(begin, end) if place not in new)


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value) or "none"


def _consequence(each: Mapping[str, Any]) -> str:
    # An agent of an earlier version tells whether, and not which.
    ssh = "SSH" if each["cuts_ssh"] is True else each["cuts_ssh"]
    if not each["drops_unmatched"]:
        return f"drops {ssh}" if ssh else ""
    return f"drops what no rule matches{f', {ssh} included' if ssh else ''}"
