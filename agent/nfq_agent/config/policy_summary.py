"""What a configuration does with the packets of each queue, tap and inline link, as plain values: to be shown and compared."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from nfq_agent.config.capture import InlineConfig, TapConfig
from nfq_agent.config.models import Config, ElementSpec, QueueConfig
from nfq_agent.packet import TCP
from nfq_agent.values import Ports

if TYPE_CHECKING:
    from nfq_agent.policy_options import PolicyOptions, RuleOptions

_SSH: Final = 22
# Values of a list that are written out.
_SHOWN: Final = 8
# Keys of a queue that say what happens to its packets.
_KEYS: Final = ("mode", "default", "on_error", "bypass", "fail_open", "midstream")
# The same of a tap and an inline link, which are not led to by rules.
_SELECTION: Final = ("interfaces", "exclude", "tcp_ports", "udp_ports")
# What a summary has besides keys.
_OTHERS: Final = ("elements", "drops_unmatched", "cuts_ssh")
_TAP: Final = "tap "
_INLINE: Final = "inline "
_TAP_KEYS: Final = (*_SELECTION, "snap")
_INLINE_KEYS: Final = ("mode", "default", "on_error", "midstream", *_SELECTION, "role", "max_waiting", "patience")


def summary(config: Config) -> dict[str, dict[str, Any]]:
    """For each queue: its keys, its elements in order, of each its options, and of a policy its rules. Plain values for JSON.

    The same for each tap and inline link, as `tap NAME` and `inline NAME`.
    """
    return {
        **{name: _of(config, queue, _KEYS, cuts_ssh(config, name)) for name, queue in config.queue.items()},
        **{f"{_TAP}{name}": _of(config, tap, _TAP_KEYS) for name, tap in config.tap.items()},
        **{f"{_INLINE}{name}": _of(config, inline, _INLINE_KEYS) for name, inline in config.inline.items()},
    }


def drops_by_default(config: Config, queue: QueueConfig | InlineConfig) -> str:
    """The setting that drops packets of a queue or an inline link that no rule matches; empty if there is none."""
    if queue.mode == "monitor":
        return ""
    for spec in config.packet_elements(queue):
        default = getattr(spec.options, "default", None)
        if default in ("drop", "reject"):
            return f'default = "{default}" of [element.{spec.name}]'
        if default is not None:
            return ""
    return 'default = "drop" of its queue' if queue.default == "drop" else ""


def cuts_ssh(config: Config, name: str) -> bool:
    """Whether a queue drops what no rule matches, gets TCP port 22, and has no policy rule that could accept it."""
    queue = config.queue[name]
    if not drops_by_default(config, queue):
        return False
    rules = [rule for rule in config.rules.values() if rule.queue == name]
    if not any((rule.all or _has_ssh(rule.tcp_ports)) and not _has_ssh(rule.not_tcp_ports) for rule in rules):
        return False
    policies = map(policy_of, config.packet_elements(queue))
    return not any(_may_accept_ssh(rule) for policy in policies if policy is not None for rule in policy.rules)


def told(summaries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One sentence for each queue, tap and inline link: what happens to its packets."""
    for name, each in summaries.items():
        parts = [f"mode {each['mode']}" if "mode" in each else "only watches"]
        asked = [element for element in each["elements"] if "rules" in element]
        for element in asked:
            count = f"{len(element['rules'])} rule{'s' * (len(element['rules']) != 1)}"
            parts.append(f"{element['name']}: {count}, else {element['options'].get('default') or 'the next element'}")
        if not any(element["options"].get("default") for element in asked):
            parts.append(f"default {each.get('default', 'accept')}")
        if consequence := _consequence(each):
            parts.append(consequence)
        yield f"{_title(name)}: {'; '.join(parts)}"


def differences(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What changes for the packets of each queue, tap and inline link, one line for each change."""
    for name in (*before, *(name for name in after if name not in before)):
        if name not in after:
            yield f"{_title(name)}: no longer served"
        elif name not in before:
            yield from (f"new {line}" for line in told({name: after[name]}))
        else:
            yield from (f"{_title(name)}: {line}" for line in _changes(before[name], after[name]))


def _title(name: str) -> str:
    return name if name.startswith((_TAP, _INLINE)) else f"queue {name}"


def _of(config: Config, table: QueueConfig | TapConfig | InlineConfig, keys: Iterable[str], ssh: bool = False) -> dict[str, Any]:
    """ssh: whether it cuts SSH."""
    found: dict[str, Any] = {key: _plain(getattr(table, key)) for key in keys}
    found["elements"] = [_of_element(spec) for spec in config.packet_elements(table)]
    # A tap drops nothing.
    found["drops_unmatched"] = not isinstance(table, TapConfig) and bool(drops_by_default(config, table))
    found["cuts_ssh"] = ssh
    return found


def _of_element(spec: ElementSpec) -> dict[str, Any]:
    options = dict(spec.options)
    found: dict[str, Any] = {"name": spec.name, "type": spec.cls.__name__}
    if policy_of(spec) is not None:
        found["rules"] = [_of_rule(rule) for rule in options.pop("rule")]
    found["options"] = {key: _plain(value) for key, value in options.items()}
    return found


def policy_of(spec: ElementSpec) -> PolicyOptions | None:
    """The options of a policy; None of another element. Where no policy is configured, no start waits for its models."""
    models = sys.modules.get("nfq_agent.policy_options")
    return spec.options if models is not None and isinstance(spec.options, models.PolicyOptions) else None


def _of_rule(rule: RuleOptions) -> str:
    given = rule.model_dump(exclude_none=True, exclude_defaults=True).keys() - {"action", "name"}
    conditions = [f"{key} {_text(getattr(rule, key))}" for key in type(rule).model_fields if key in given]
    label = f" ({rule.name})" if rule.name else ""
    return f"{rule.action}{label} {', '.join(conditions) or 'everything'}"


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _text(value)


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


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in (key for key in after if key not in _OTHERS):
        # The previous agent may not have told it.
        if key in before and before[key] != after[key]:
            yield f"{key} {_word(before[key])} -> {_word(after[key])}"
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
    for key, value in after["options"].items():
        if (earlier := before["options"].get(key)) != value:
            yield f"{key} {_word(earlier)} -> {_word(value)}"
    # Without the two header lines. Not ndiff: it compares each removed rule with each added one, letter by letter.
    for line in [*difflib.unified_diff(before.get("rules", ()), after.get("rules", ()), n=0, lineterm="")][2:]:
        if line[0] in "+-":
            yield f"{line[0]} {line[1:]}"


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value) or "none"


def _consequence(each: Mapping[str, Any]) -> str:
    if not each["drops_unmatched"]:
        return ""
    return f"drops what no rule matches{', SSH included' * each['cuts_ssh']}"


def _has_ssh(ports: Iterable[Ports]) -> bool:
    return any(_SSH in each for each in ports)


def _may_accept_ssh(rule: RuleOptions) -> bool:
    """Whether a rule that accepts could match a connection to TCP port 22."""
    if rule.action != "accept" or (rule.dport is not None and not _has_ssh(rule.dport)):
        return False
    if rule.protocol is not None and not {TCP, "ssh"} & set(rule.protocol):
        return False
    # What other facts a rule asks for no SSH connection has.
    return all(fact == "protocol" or fact.startswith(("ssh", "dst_name")) for fact, _ in rule.wanted)
