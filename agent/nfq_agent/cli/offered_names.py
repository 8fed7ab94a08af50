"""Names that a shell is offered where a verb or a filter takes one: of the configuration, of running agents, of this host.

It has to answer at once: it reads TOML, and loads neither pydantic nor the models of the configuration. A file that cannot be
read gives no names, and nothing is said about it.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from nfq_agent.cli.completing import filled, filter_fields, fixed

# As config.file, which takes longer to load than all of this.
_FOLDER: Final = "/etc/nfq-agent"
_MAIN: Final = "nfq-agent.toml"
_SOCKETS: Final = "/run/nfq-agent"
_CGROUPS: Final = "/sys/fs/cgroup"
_INTERFACES: Final = "/sys/class/net"
_UNITS: Final = (".service", ".scope", ".slice")
_INSTANCE: Final = re.compile(r"[a-z0-9-]{1,12}")
# Bytes of all files together that are parsed; of more, the heads of tables are read.
_MOST: Final = 150_000
_HEAD: Final = re.compile(r'^[ \t]*\[\[?[ \t]*(\w+)[ \t]*\.[ \t]*"?([\w-]+)"?[ \t]*[\].]', re.MULTILINE)
# What is offered has no character that a shell or a terminal would act on.
_SAFE: Final = re.compile(r"[^\"'`$!\\\x00-\x1f\x7f]{1,100}")
# The keys of the configuration that have values of a kind, where it is not one key of the same name.
_NAMES: Final = ("tls_sni", "http_host", "dns_name", "dst_name")
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "name": _NAMES, "tls_sni": _NAMES, "http_host": _NAMES, "dns_name": _NAMES, "host": ("src", "dst"), "queue": ("num",),
    "dport": ("dport", "tcp_ports", "udp_ports"), "port": ("dport", "sport", "tcp_ports", "udp_ports"),
}  # fmt: skip
Merged = Mapping[str, Any]


def matching(kind: str, typed: str, config: str | None = None, instance: str | None = None) -> list[str]:
    """What a typed word of a kind may become. Used where the package's table of verbs is not at hand.

    kind: a field of filters, `filter`, or what `fixed` and `offered` know. config, instance: as the command line has them.
    """
    if kind == "filter":
        return filled(typed, filter_fields(), values_of(config, instance))
    return [name for name in dict.fromkeys((*fixed(kind), *offered(kind, config, instance))) if name.startswith(typed)]


def values_of(config: str | None, instance: str | None) -> Callable[[str], list[str]]:
    """For `filled`: the values of a field."""
    return lambda field: offered(field, config, instance)


def offered(kind: str, config: str | None = None, instance: str | None = None) -> list[str]:
    """All names of a kind."""
    tables = _tables(config, instance)
    found: list[str] = []
    match kind:
        case "queue-name":
            found += _names(tables, "queue")
        case "instance":
            found += [name[:-5] for name in _listed(_SOCKETS) if name.endswith(".sock")]
            found += [name[:-5] for name in _listed(_FOLDER) if name.endswith(".toml") and name != _MAIN]
            found += _texts(tables.get("agent", {}), ("instance",))
            found = [name for name in found if _INSTANCE.fullmatch(name)]
        case "element":
            found += [*_names(tables, "element"), *_texts(tables, ("elements",))]
        case "rule":
            found += [label for _, label in _labels(tables)]
        case "reason":
            found += [f"{element}: {label}" for element, label in _labels(tables)]
        case "type":
            found += [name for name in _texts(tables, ("type",)) if ":" in name]
        case "set":
            found += [name.partition(" ")[0] for name in _texts(tables, ("set", "not_set"))]
        case _:
            found += _texts(tables, _KEYS.get(kind, (kind,)))
            if kind == "unit":
                found += _units()
            elif kind == "interface":
                found += _listed(_INTERFACES)
    return sorted({name for name in found if _SAFE.fullmatch(name) and not name.startswith("file:")})


def _tables(config: str | None, instance: str | None) -> Merged:
    """What the files of the configuration come to, as config.file merges them; the baseline where there is none."""
    main = os.path.expanduser(config) if config else _main_of(instance)
    beside, own = os.path.join(os.path.dirname(main), "conf.d"), f"{os.path.splitext(main)[0]}.d"
    drop_ins = [os.path.join(folder, name) for folder in (beside, own) for name in _listed(folder) if name.endswith(".toml")]
    texts = [text for text in map(_text, (main, *drop_ins)) if text is not None]
    merged: dict[str, Any] = {} if texts else {"queue": {"main": {"num": 100}}}
    left = _MOST
    for text in texts:
        left -= len(text)
        try:
            _merge(merged, tomllib.loads(text) if left >= 0 else _heads(text))
        except (ValueError, RecursionError):
            _merge(merged, _heads(text))
    return merged


def _main_of(instance: str | None) -> str:
    """The main file without --config: that of the instance's unit, if there is one."""
    own = os.path.join(_FOLDER, f"{instance}.toml")
    return own if instance and _INSTANCE.fullmatch(instance) and os.path.isfile(own) else os.path.join(_FOLDER, _MAIN)


def _text(path: str) -> str | None:
    """What is in a file; None where it cannot be read."""
    try:
        # A pipe would be waited for.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read(10 * _MOST)
    except (OSError, ValueError):
        return None


def _heads(text: str) -> dict[str, Any]:
    """The tables by their heads, without what is in them."""
    found: dict[str, Any] = {}
    for kind, name in _HEAD.findall(text):
        found.setdefault(kind, {})[name] = {}
    return found


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(before := into.get(key), dict):
            _merge(before, value)
        else:
            into[key] = value


def _texts(value: object, keys: tuple[str, ...], wanted: bool = False) -> Iterator[str]:
    """The values under any of these keys, however deep. wanted: whether the value itself is under one."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(each, keys, key in keys)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, keys, wanted)
    elif wanted and isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)


def _labels(tables: Merged) -> Iterator[tuple[str, str]]:
    """The rules of all policies, by their element and as the log names them."""
    elements = tables.get("element", {})
    for element, table in elements.items() if isinstance(elements, Mapping) else ():
        rules = table.get("rule") if isinstance(table, Mapping) else None
        for number, rule in enumerate(rules if isinstance(rules, list) else (), 1):
            name = rule.get("name") if isinstance(rule, Mapping) else None
            yield element, f"rule {number} ({name})" if isinstance(name, str) and name else f"rule {number}"


def _names(tables: Merged, kind: str) -> list[str]:
    """The names of the tables of a kind."""
    found = tables.get(kind)
    return [*found] if isinstance(found, Mapping) else []


def _units() -> Iterable[str]:
    """The units that have a control group now: those of the slices, and of the slices in them."""
    waiting = [(_CGROUPS, 3)]
    while waiting:
        folder, levels = waiting.pop()
        for name in _listed(folder):
            if name.endswith(_UNITS):
                yield name
                if name.endswith(".slice") and levels:
                    waiting.append((os.path.join(folder, name), levels - 1))


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
