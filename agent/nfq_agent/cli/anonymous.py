"""Replaces addresses and names in a text: the same one by the same word, so that what belongs together still shows.

What looks like an address, a name, a unit or a file is found by its form. Names without a form, of users, containers or hosts
say, are found by the values that the configuration and the log give them. In doubt a word is replaced.
"""

from __future__ import annotations

import ipaddress
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from nfq_agent.config.capture import InlineConfig, TapConfig
from nfq_agent.config.models import Agent, LogConfig, QueueConfig
from nfq_agent.config.proxy import ProxyConfig
from nfq_agent.config.rule import RuleConfig
from nfq_agent.elements import PACKET_ELEMENTS, STREAM_ELEMENTS, packet_element, stream_element
from nfq_agent.flow_filter import Comparison, FilterError, FilterPart, Not, parse
from nfq_agent.policy_options import RuleOptions
from nfq_agent.protocols.known import HOSTS, OWNERS
from nfq_agent.values import FILE

# Facts of which the values are those of a standard, or fingerprints.
_KEPT_FACTS: Final = frozenset((
    "dns_rcode", "dns_response", "dns_type", "dot", "ech", "http_method", "http_version", "ja3", "ja4", "mqtt_version",
    "ntp_version", "quic_version", "redis_command", "socks_command", "socks_version", "tls_alpn", "tls_early_data", "tls_version",
))  # fmt: skip
# Kinds of names by the key that has them, in the configuration and in the fields of the log.
_KINDS: Final[Mapping[str, str]] = {
    "unit": "unit", "container": "container", "container_to": "container", "cgroup": "group", "exe": "program", "group": "user",
    **dict.fromkeys(("owner", "user", "uid", "gid", "not_uid", "not_gid"), "user"), "not_cgroup": "group",
    "set": "set", "not_set": "set", "target": "host", "name": "label", "directory": "folder", "geo": "list",
    "container_sockets": "socket", "_hostname": "host",
    **{fact: "user" if fact.endswith("_user") else "fact" for fact in OWNERS if fact not in _KEPT_FACTS},
    **dict.fromkeys((*HOSTS, "dst_name", "names", "allow", "deny"), "name"),
}  # fmt: skip
# Values of these keys that every system has.
_USUAL: Final = re.compile(r"proxyuser|root|\d+[:-]\d+|(?:/var)?/run/(?:user/\d+/)?(?:docker|podman|podman/podman)\.sock")
_UNITS: Final = ("service", "slice", "scope", "socket", "timer")
_FILES: Final = (
    "toml", "py", "txt", "conf", "so", "md", "sock", "lock", "log", "json", "yaml", "yml", "pcap", "pcapng", "mmdb", "pem", "ko",
)  # fmt: skip
# Units that every system has.
_COMMON: Final = re.compile(
    r"(?:system|user|machine|init|-|user-\d+|session-\d+|user@\d+|nfq-agent(?:-metrics|-flows|-rules)?(?:@[\w-]+)?|docker|containerd|podman|ssh"
    rf"|sshd|dbus|cron|systemd-[\w-]+)\.(?:{'|'.join(_UNITS)})"
)
_OUR_FILE: Final = re.compile(r"nfq[-_]agent[\w-]*\.[\w.]+|xtables\.lock|resolv\.conf")
_PACKAGE: Final = "nfq_agent."
_MAC: Final = re.compile(r"(?<![0-9A-Za-z])[0-9A-Fa-f]{2}(?:([:-])[0-9A-Fa-f]{2})(?:\1[0-9A-Fa-f]{2}){4,}(?![0-9A-Za-z])")
_IPV4: Final = re.compile(r"(?<!\d)(?:\d{1,3}\.){3}\d{1,3}(?!\d)")
_IPV6: Final = re.compile(r"(?<![0-9A-Za-z_.])(?=[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:)[0-9A-Fa-f:.]+")
_HOME: Final = re.compile(r"(?<=/home/)[^/\s\"':]+")
# What a label of a name may have: letters of any script, with the marks that are no letters by themselves (RFC 5892). Full stops
# of other scripts separate labels, too (RFC 3490 3.1).
_OTHER: Final = r"[^\x00-\x7f\s\u3002\uff0e\uff61]"
_LABEL: Final = rf"(?:[\w-]|{_OTHER})"
_LABELS: Final = rf"(?:{_LABEL}+[.\u3002\uff0e\uff61])+[^\W\d_]{_LABEL}+"
_MAIL: Final = re.compile(rf"(?<![\w.])(?:[\w.+-]|{_OTHER})+@{_LABELS}")
_DOTTED: Final = re.compile(rf"(?<![\w@-])(?:[\w@:\\-]|{_OTHER})*{_LABELS}")
# What people write freely: comments of a configuration, and of rules of others.
_COMMENT: Final = re.compile(r'("""(?:[^\\]|\\.)*?"""|\'\'\'.*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\')|#[^\n]*', re.DOTALL)
_REMARK: Final = re.compile(
    r'(--(?:comment|(?:log|nflog)-prefix|string|hex-string|name|hashlimit-name|match-set) |(?<= )(?:comment|prefix) (?="))'
    r'(?!\\?"?nfq-agent:)("(?:[^"\\]|\\.)*"|\\"[^"\\]*\\"|[^\s"]+)'
)
_SET: Final = re.compile(r"^\s+(?:set|map) ([\w.-]+) \{$", re.MULTILINE)
# Characters as JSON and TOML may write them.
_ESCAPED: Final = re.compile(r"\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})")
_LABEL_OF_RULE: Final = re.compile(r"rule \d+ \((.+)\)$")
_HEADER: Final = re.compile(r"^\s*\[+\s*([a-z]+)\s*\.\s*([\w-]+)", re.MULTILINE)

KindsOfNames = Mapping[str, str]


def without_comments(toml: str) -> str:
    """The text of a configuration with each comment emptied."""
    return _COMMENT.sub(lambda found: found[1] or "#", toml)


def names_in(value: object, kinds: KindsOfNames = _KINDS, key: str = "") -> Iterator[tuple[str, str]]:
    """Names with their kinds, in the tables of a configuration or the fields of a line of the log."""
    if isinstance(value, Mapping):
        for inner, each in value.items():
            yield from names_in(each, kinds, str(inner) if key != "facts" else "names")
    elif isinstance(value, list | tuple):
        for each in value:
            yield from names_in(each, kinds, key)
    elif isinstance(value, str) and key == "when":
        yield from _of_filter(value)
    elif isinstance(value, str) and key in ("rule", "reason"):
        # A rule that the configuration may not have any more.
        if (label := _LABEL_OF_RULE.search(value)) is not None:
            yield label[1], "label"
    elif isinstance(value, str) and value.startswith(FILE):
        yield value.removeprefix(FILE), "list"
    elif isinstance(value, str) and key in kinds:
        # Of HOST:PORT the host.
        name = value.rpartition(":")[0] if key == "target" and ":" in value else value
        # A set may have its directions behind it.
        name = name.partition(" ")[0] if kinds[key] == "set" else name
        if _USUAL.fullmatch(name) is None:
            yield name, kinds[key]


def _of_filter(text: str) -> Iterator[tuple[str, str]]:
    try:
        waiting: list[FilterPart] = [parse(text)]
    except FilterError:
        return
    while waiting:
        part = waiting.pop()
        if isinstance(part, Comparison):
            kind = "name" if part.field == "name" else _KINDS.get(part.field)
            yield from ((value.text, kind) for value in part.values if kind)
        else:
            waiting += [part.part] if isinstance(part, Not) else part.parts


def sets_of(ruleset: str) -> list[str]:
    """The names of sets and maps, as `nft list ruleset` prints them."""
    return _SET.findall(ruleset)


def _unescaped(found: re.Match[str]) -> str:
    number = int(found[1] or found[2], 16)
    return chr(number) if number <= sys.maxunicode and chr(number).isprintable() else found[0]


class Replacements:
    """The words that stand for what was found so far."""

    def __init__(self, known: KindsOfNames, config: str = "") -> None:
        """known: names without a form, by kind. config: the text of the configuration, for the names of its tables."""
        self._words: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        # In JSON a quotation mark in a name has a backslash in front.
        both = {form: kind for name, kind in known.items() for form in (name, json.dumps(name, ensure_ascii=False)[1:-1])}
        self._known = {name: kind for name, kind in both.items() if _of_its_own(name)}
        self._tables = {".".join(found.groups()) for found in _HEADER.finditer(config)} | {"agent", "log"}

    def apply(self, text: str) -> str:
        """The text with everything replaced."""
        text = _ESCAPED.sub(_unescaped, text)
        text = _MAC.sub(lambda found: self._word("mac", found[0]), text)
        text = _REMARK.sub(lambda found: f'{found[1]}"{self._word("comment", found[2])}"', text)
        text = _HOME.sub(lambda found: self._word("user", found[0]), text)
        for name in sorted(self._known, key=len, reverse=True):
            edges = rf"(?<![^\W_]){re.escape(name)}(?![^\W_])"
            text = re.sub(edges, lambda found: self._word(self._known[name], found[0]), text, flags=re.IGNORECASE)  # noqa: B023  # at once
        text = _IPV6.sub(self._ipv6, text)
        text = _IPV4.sub(lambda found: self._address(found[0]), text)
        text = _MAIL.sub(lambda found: found[0] if _suffix(found[0]) in _UNITS else self._word("mail", found[0]), text)
        return _DOTTED.sub(lambda found: self._dotted(found[0]), text)

    def _word(self, kind: str, found: str, ending: str = "") -> str:
        if found.lower() not in self._words:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._words[found.lower()] = f"{kind}-{self._counts[kind]}{ending}"
        return self._words[found.lower()]

    def _address(self, text: str) -> str:
        try:
            value = ipaddress.ip_address(text)
        except ValueError:
            return text
        return text if value.is_loopback or value.is_unspecified else self._word(f"ipv{value.version}", str(value))

    def _ipv6(self, found: re.Match[str]) -> str:
        """The longest beginning that is an address: a colon or a full stop may follow it."""
        for end in range(len(found[0]), 1, -1):
            if (word := self._address(found[0][:end])) != found[0][:end] or found[0][:end] in ("::", "::1"):
                return word + found[0][end:]
        return found[0]

    def _dotted(self, text: str) -> str:
        ending = _suffix(text)
        # A port, a user or a scheme in front of it.
        start = max(text.rfind(mark) for mark in "@:\\") + 1
        if self._ours(text[start:]) or _COMMON.fullmatch(text):
            return text
        if ending in _UNITS:
            return self._word("unit", text, f".{ending}")
        return text[:start] + self._word("file" if ending in _FILES else "name", text[start:], f".{ending}" * (ending in _FILES))

    def _ours(self, name: str) -> bool:
        """Whether it is a key of the configuration, a setting of the kernel, or a file or module of the agent or of Python."""
        parts = name.split(".")
        table = next((parts[end:] for end in (1, 2) if ".".join(parts[:end]) in self._tables), None)
        if table is not None and all(part in _keys() for part in table):
            return True
        if parts[0] in ("net", "kernel", "user", "fs", "vm") and Path("/proc/sys", *parts).exists():
            return True
        module = parts[-1] == "py" and len(parts) == 2 and (parts[0] in sys.stdlib_module_names or name in _modules())
        return module or name.startswith(_PACKAGE) or _OUR_FILE.fullmatch(name) is not None


def _suffix(text: str) -> str:
    return text.rpartition(".")[2].lower()


def _of_its_own(name: str) -> bool:
    """Whether it is replaced as a known name: neither a number or a pattern for all, nor what has a form by itself."""
    bare = name.removeprefix("*.")
    return len(name.strip("*?")) > 1 and not name.isdecimal() and _DOTTED.fullmatch(bare) is None


@cache
def _keys() -> frozenset[str]:
    """All keys of the tables of a configuration."""
    models: list[Any] = [Agent, LogConfig, QueueConfig, RuleConfig, ProxyConfig, TapConfig, InlineConfig, RuleOptions]
    models += [packet_element(kind).Options for kind in PACKET_ELEMENTS]
    models += [stream_element(kind).Options for kind in STREAM_ELEMENTS]
    return frozenset(field.alias or key for model in models for key, field in model.model_fields.items())


@cache
def _modules() -> frozenset[str]:
    """The names of the files of the agent."""
    return frozenset(path.name for path in Path(__file__).parents[1].rglob("*.py"))
