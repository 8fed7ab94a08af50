"""The entries of legacy tables as bytes: a rule is written by python-iptables and read back, an entry is read by its bytes.

No foreign rule is decoded: it is recognised, by the comment that it lacks, and skipped.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from nfq_agent.host.cgroups import absence, number
from nfq_agent.host.xtables.image import Entry
from nfq_agent.rules.model import Extension, Family, Installed, Option, Rule, RuleError, tag_prefix

FAMILY_NAMES: Final[Mapping[Family, str]] = {"inet": "IPv4", "inet6": "IPv6"}
_VERDICTS: Final = frozenset(("ACCEPT", "DROP", "RETURN", "QUEUE"))
_PROTOCOLS: Final = {6: "tcp", 17: "udp"}
# struct xt_entry_match and xt_entry_target: size, name[29], revision, then the data (linux/netfilter/x_tables.h).
_EXTENSION: Final = struct.Struct("H29sB")
_OFFSETS: Final = struct.Struct("HH")
_COUNTERS: Final = struct.Struct("QQ")
_IFNAMSIZ: Final = 16
# Options whose parsers take two words.
_OF_TWO_WORDS: Final = ("--tcp-flags", "--match-set")
# XT_INV_* and IPT_INV_VIA_*, in the field invflags.
_NOT_IN, _NOT_OUT, _NOT_PROTOCOL = 0x01, 0x02, 0x40


class EntryCodec:
    """The entries of one family, for one instance."""

    def __init__(self, iptc: Any, family: Family, instance: str) -> None:
        """iptc: python-iptables, as python_iptables.py imports it."""
        self._iptc = iptc
        inet = family == "inet"
        self._family = FAMILY_NAMES[family]
        self._rule_class = iptc.Rule if inet else iptc.Rule6
        self._entry_class = iptc.ip4tc.ipt_entry if inet else iptc.ip6tc.ip6t_entry
        # For a target that is not a standard one python-iptables looks for a chain of that name in all tables that it assumes to
        # exist, which makes them present. That search is not needed: no chain is looked up by name here.
        table_class = iptc.Table if inet else iptc.Table6
        table_class.existing_table_names.update(dict.fromkeys(table_class.ALL, False))
        self._tag = tag_prefix(instance).encode()
        # By the rule without its chain: the entry is the same in each.
        self._entries: dict[Rule, bytes] = {}
        # By what decides how it is printed: thousands of ports make hundreds of extensions, each of them in several chains.
        self._printed: dict[tuple[bytes, int, bytes], Extension] = {}

    def is_tagged_at(self, address: int) -> bool:
        """Whether the entry in memory at an address has the instance's tag."""
        offset = self._entry_class.target_offset.offset
        size = _OFFSETS.unpack(ctypes.string_at(address + offset, _OFFSETS.size))[1]
        return self.is_tagged(ctypes.string_at(address, size))

    def _extensions(self, data: bytes) -> Iterator[tuple[str, int, int, int]]:
        """(name, revision, offset, size) of every match of an entry, then of its target."""
        place = ctypes.sizeof(self._entry_class)
        end = len(data)
        while place < end:
            size, name, revision = _EXTENSION.unpack_from(data, place)
            yield os.fsdecode(name.split(b"\0")[0]), revision, place, size
            if size < _EXTENSION.size:
                return
            place += size

    def is_tagged(self, data: bytes) -> bool:
        target = _OFFSETS.unpack_from(data, self._entry_class.target_offset.offset)[0]
        return any(
            name == "comment" and place < target and data.startswith(self._tag, place + _EXTENSION.size)
            for name, _, place, _ in self._extensions(data)
        )

    def installed(self, entry: Entry) -> Installed:
        data, jump = entry.data, entry.jump
        counters = self._entry_class.counters.offset
        packets, size = _COUNTERS.unpack_from(data, counters)
        if jump is not None:
            # As libiptc needs it for a restore.
            target = _OFFSETS.unpack_from(data, self._entry_class.target_offset.offset)[0]
            data = data[: target + 2] + jump.ljust(29, b"\0") + data[target + 31 :]
        name = os.fsdecode(entry.chain)
        try:
            rule = self._decode(name, data, jump is not None)
        except (ValueError, LookupError, self._iptc.errors.XTablesError):
            import hashlib

            # No configuration makes such a rule, so it is removed; the digest distinguishes two of them.
            body = data[:counters] + data[counters + _COUNTERS.size :]
            rule = Rule(name, Extension("?", (Option("--undecoded", hashlib.sha1(body).hexdigest()[:16]),)))
        self._entries.setdefault(_anywhere(rule), data)
        return Installed(rule, entry.number, packets, size)

    def _decode(self, chain: str, data: bytes, standard: bool) -> Rule:
        """The rule that an entry is. Raises ValueError, LookupError or XTablesError on a rule that the agent never writes."""
        entry = self._entry_class.from_buffer_copy(data)
        made = self._rule_class()
        made.entry = entry
        ip = made.get_ip()
        # IP6T_F_PROTO says that the protocol counts; no other flag is ours, nor an address.
        expected = 1 if self._family == "IPv6" and ip.proto else 0
        if any(bytes(each) != bytes(len(bytes(each))) for each in (ip.src, ip.dst, ip.smsk, ip.dmsk)):
            raise ValueError("an address")
        if ip.flags != expected or ip.invflags & ~(_NOT_IN | _NOT_OUT | _NOT_PROTOCOL) or getattr(ip, "tos", 0):
            raise ValueError("flags")

        def said(value: str, flag: int) -> str:
            if ip.invflags & flag and not value:
                raise ValueError("a negation without a value")
            return f"! {value}" if ip.invflags & flag else value

        protocol = "" if ip.proto == 0 else _PROTOCOLS.get(ip.proto, str(ip.proto))
        *matches, target = [self._extension(made, data, *each) for each in self._extensions(data)]
        if standard:
            offset = entry.target_offset
            target = Extension(os.fsdecode(data[offset + 2 : offset + 31].split(b"\0")[0]))
        return Rule(
            chain, target, tuple(matches), said(protocol, _NOT_PROTOCOL),
            said(_interface_name(ip.iniface, ip.iniface_mask), _NOT_IN),
            said(_interface_name(ip.outiface, ip.outiface_mask), _NOT_OUT),
        )  # fmt: skip

    def _extension(self, rule: Any, data: bytes, name: str, revision: int, place: int, size: int) -> Extension:
        """A match or the target of an entry, by the text that libxtables prints for it."""
        is_target = place == rule.entry.target_offset
        if is_target and (name in _VERDICTS or name.startswith("NFQA-") or not name):
            return Extension(name)
        ip = rule.get_ip()
        key = bytes(ip), is_target, data[place : place + size]
        if (known := self._printed.get(key)) is not None:
            return known
        xtables, iptc = self._iptc.xtables, self._iptc
        find = xtables.xtables(rule.nfproto)
        module = (find.find_target if is_target else find.find_match)(name)
        header = ctypes.sizeof(xtables.xt_entry_match)
        if not module or module[0].revision != revision or xtables.xt_align(module[0].size + header) != size:
            raise LookupError(name)
        raw = ctypes.create_string_buffer(data[place : place + size], size)
        kind = xtables.xt_entry_target if is_target else xtables.xt_entry_match
        structure = ctypes.cast(raw, ctypes.POINTER(kind))[0]
        shown = iptc.Target(rule, target=structure) if is_target else iptc.Match(rule, match=structure)
        saved = (shown._get_saved_buf(ip) or b"").decode()
        words = [shlex.quote(word) for word in shlex.split(saved)]
        parsed = Rule.parse(f"-A chain {'-j' if is_target else '-m'} {name} {' '.join(words)}")
        self._printed[key] = parsed.target if is_target else parsed.matches[0]
        return self._printed[key]

    def build(self, rule: Rule) -> bytes:
        """The entry for a rule, read back and compared: a rule that libxtables understands differently is never written.

        Raises RuleError.
        """
        if (entry := self._entries.get(anywhere := _anywhere(rule))) is not None:
            return entry
        for match in rule.matches:
            if match.name == "cgroup" and any(number(option.value) is None for option in match.options):
                raise RuleError(absence(match.options[0].value))
        try:
            data = self._encode(rule)
            back = self._decode(rule.chain, data, _is_standard(rule.target))
        # python-iptables raises any exception of its parsers.
        except (AttributeError, LookupError, TypeError, ValueError, OSError, self._iptc.errors.XTablesError) as error:
            raise RuleError(f"python-iptables cannot write the rule {rule}: {plain(error)}{_remedy(error)}") from error
        if back != rule:
            raise RuleError(f"python-iptables would write\n  {back}\ninstead of:\n  {rule}")
        self._entries[anywhere] = data
        return data

    def _encode(self, rule: Rule) -> bytes:
        made = self._rule_class()
        ip = made.get_ip()
        if rule.protocol:
            made.protocol = rule.protocol.removeprefix("! ")
        # python-iptables' own mask for IPv6 interfaces compares one bit of each letter.
        if rule.in_interface:
            ip.iniface, ip.iniface_mask = _interface(rule.in_interface.removeprefix("! "))
        if rule.out_interface:
            ip.outiface, ip.outiface_mask = _interface(rule.out_interface.removeprefix("! "))
        for value, flag in ((rule.in_interface, _NOT_IN), (rule.out_interface, _NOT_OUT), (rule.protocol, _NOT_PROTOCOL)):
            if value.startswith("! "):
                ip.invflags |= flag
        for match in rule.matches:
            _set(made.create_match(match.name), match.options)
        if not rule.target.name:
            made.create_target("ACCEPT")
            # libiptc takes a standard target without a name for none: the next rule is asked (iptcc_map_target, libiptc.c).
            data = bytes(made.rule)
            place = _OFFSETS.unpack_from(data, self._entry_class.target_offset.offset)[0] + 2
            return data[:place] + bytes(29) + data[place + 29 :]
        if _is_standard(rule.target):
            made.create_target("ACCEPT").standard_target = rule.target.name
        else:
            _set(made.create_target(rule.target.name), rule.target.options)
        return bytes(made.rule)


def _anywhere(rule: Rule) -> Rule:
    return replace(rule, chain="")


def _is_standard(target: Extension) -> bool:
    return not target.name or target.name in _VERDICTS or target.name.startswith("NFQA-")


def _set(extension: Any, options: Sequence[Option]) -> None:
    """Set the options of a match or target, and finish it: REDIRECT counts its ranges at the end."""
    for option in options:
        words = option.value.split(" ") if option.name in _OF_TWO_WORDS else [option.value]
        extension.set_parameter(option.name.removeprefix("--"), ["!", *words] if option.negated else words)
    extension._final_check()


def _interface(name: str) -> tuple[bytes, bytes]:
    """The name and the mask of struct ipt_ip for an interface. `eth+` is every name that begins so (iptables(8), -i); the
    plus stays in the name, outside the mask (libxtables, xtables_parse_interface)."""
    raw = os.fsencode(name)
    if len(raw) >= _IFNAMSIZ:
        raise ValueError(f"interface name {name} is too long")
    return raw, b"\xff" * (len(raw) - 1 if raw.endswith(b"+") else len(raw) + 1)


def _interface_name(name: bytes, mask: bytes) -> str:
    if (name or mask) and (name, mask) != _interface(os.fsdecode(name)):
        raise ValueError("an interface mask of another kind")
    return os.fsdecode(name)


def _remedy(error: Exception) -> str:
    """What to do about an extension that libxtables does not find."""
    if not re.search("find (match|target)", str(error)):
        return ""
    where = os.environ.get("XTABLES_LIBDIR", "the xtables folder beside libxtables")
    return f'; its extension is not in {where}: install the package iptables whole, or set backend = "owned"'


def plain(error: object) -> str:
    """An error of python-iptables as text: it prints bytes as Python literals."""
    return str(error).replace("b'", "").replace("'", "").rstrip(".")
