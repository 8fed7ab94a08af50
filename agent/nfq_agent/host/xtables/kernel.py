"""The entries of legacy tables: read by their bytes, built by python-iptables, written with one commit per table.

No foreign rule is decoded, and none is written: foreign rules are skipped by their bytes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import random
import re
import shlex
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from nfq_agent.host.cgroups import absence, number
from nfq_agent.host.xtables.image import Entry, Image, version
from nfq_agent.rules.diff import Busy, Change, Delete, DropChain, Insert, NewChain
from nfq_agent.rules.model import Extension, Family, Installed, Option, Rule, RuleError, TableState, own_chains, tag_prefix

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
# mallopt(3)
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_libc: Final = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]
# How long commits are retried while a program that takes no lock changes the table.
_PATIENCE: Final = 3.0


class Tables:
    """Some tables of one family, for one instance, in a process of their own. See diff.Session."""

    def __init__(self, iptc: Any, family: Family, instance: str, tables: frozenset[str]) -> None:
        """iptc: python-iptables, as host/iptables.py imports it."""
        self._iptc = iptc
        inet = family == "inet"
        self._family = FAMILY_NAMES[family]
        self._address_family = socket.AF_INET if inet else socket.AF_INET6
        self._table_class = iptc.Table if inet else iptc.Table6
        self._rule_class = iptc.Rule if inet else iptc.Rule6
        module = iptc.ip4tc if inet else iptc.ip6tc
        self._entry_class = module.ipt_entry if inet else module.ip6t_entry
        # A target that is no standard one makes python-iptables look for a chain of that name, in all tables that it
        # thinks are there, which makes them present. It need not look: a chain's name is never asked of it here.
        self._table_class.existing_table_names.update(dict.fromkeys(self._table_class.ALL, False))
        self._chains = frozenset(os.fsencode(name) for name in own_chains(instance))
        self._tag = tag_prefix(instance).encode()
        self._names = tables
        self._tables: dict[str, Any] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        # By the rule without its chain: the entry is the same in each.
        self._entries: dict[Rule, bytes] = {}
        # By what decides how it is printed: thousands of ports make hundreds of extensions, each of them in several chains.
        self._printed: dict[tuple[bytes, int, bytes], Extension] = {}
        self._deadline = time.monotonic() + _PATIENCE
        self._bind(module._libiptc, "iptc" if inet else "ip6tc")

    def _bind(self, library: ctypes.CDLL, prefix: str) -> None:
        """libiptc's walk, with plain addresses: an object for each entry would take seconds."""

        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = library[f"{prefix}_{name}"]
            found.restype, found.argtypes = result, arguments
            return found

        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        self._first_chain = function("first_chain", text, pointer)
        self._next_chain = function("next_chain", text, pointer)
        self._first_rule = function("first_rule", pointer, text, pointer)
        self._next_rule = function("next_rule", pointer, pointer, pointer)
        self._delete_number = function("delete_num_entry", ctypes.c_int, text, ctypes.c_uint, pointer)

    # Reading

    def chains(self, table: str) -> list[bytes]:
        """The names of all chains of a table. Raises RuleError."""
        return self._image(table).chains

    def read(self) -> dict[str, TableState]:
        """What every table holds of the instance. Raises RuleError."""
        return {name: self._state(name) for name in sorted(self._names)}

    def _image(self, table: str) -> Image:
        try:
            return Image(self._address_family, table)
        except OSError as error:
            raise RuleError(f"table {table} ({self._family}) cannot be read: {error.strerror}") from error

    def _state(self, table: str) -> TableState:
        image = self._image(table)
        self._versions[table] = image.version
        chains: dict[str, list[Installed]] = {os.fsdecode(name): [] for name in image.chains if name in self._chains}
        jumps: list[Installed] = []
        known_jumps: dict[bytes, int] = {}
        for entry in image.entries(self._chains, self._tag):
            own = entry.chain in self._chains
            if not own and not self._is_tagged(entry.data):
                continue
            if entry.jump is not None and entry.jump in self._chains:
                known_jumps[entry.jump] = known_jumps.get(entry.jump, 0) + 1
            (chains[os.fsdecode(entry.chain)] if own else jumps).append(self._installed(entry))
        referenced = {name for name in chains if image.references(raw := os.fsencode(name)) > known_jumps.get(raw, 0)}
        return TableState({name: tuple(found) for name, found in chains.items()}, tuple(jumps), frozenset(referenced))

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

    def _is_tagged(self, data: bytes) -> bool:
        target = _OFFSETS.unpack_from(data, self._entry_class.target_offset.offset)[0]
        return any(
            name == "comment" and place < target and data.startswith(self._tag, place + _EXTENSION.size)
            for name, _, place, _ in self._extensions(data)
        )

    def _installed(self, entry: Entry) -> Installed:
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

    # Writing

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
            raise RuleError(f"python-iptables cannot write the rule {rule}: {_plain(error)}{_remedy(error)}") from error
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

    def commit(self, table: str, changes: Sequence[Change]) -> None:
        """Carry out the changes of one table in one commit. Raises Busy if another program changed the table, else RuleError."""
        try:
            kernel = self._open(table)
            handle = kernel._handle
            for change in changes:
                match change:
                    case NewChain(chain):
                        kernel.create_chain(chain)
                    case DropChain(chain):
                        kernel.delete_chain(chain)
                    case Insert(rule, number):
                        data = self.build(rule)
                        kernel.insert_entry(rule.chain, (ctypes.c_ubyte * len(data)).from_buffer_copy(data), number - 1)
                    case Delete(rule, number):
                        self._expect_ours(table, rule.chain, number)
                        if self._delete_number(os.fsencode(rule.chain), number - 1, handle) != 1:
                            raise self._iptc.IPTCError(f"cannot delete rule {number}: {_plain(kernel.strerror())}")
            # libiptc resets policy counters at each commit (TC_COMMIT: COUNTER_MAP_ZEROED) unless they are given. What they
            # count between reading and here, a millisecond or so, is not in it; rules' counters lose nothing.
            for name in map(os.fsdecode, self._open_chains(handle)):
                policy, counters = kernel.get_policy(name)
                if policy is not None:
                    kernel.set_policy(name, policy, counters)
            kernel.commit()
        except self._iptc.IPTCError as error:
            reason = _plain(error)
            if os.strerror(errno.EAGAIN) in reason:
                self._yield(table, error)
            raise RuleError(f"table {table} ({self._family}): {reason}") from error

    def make_room(self) -> None:
        """Allocate the memory that commits need, so that no page fault happens while others wait for the lock.

        libiptc holds a table three times over, and some more (iptcc, TC_COMMIT). It is this process's until it ends.
        """
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            _libc.mallopt(option, 1 << 30)
        size = 4 * sum(version[-1] for version in self._versions.values())
        if (room := _libc.malloc(size)) is not None:
            ctypes.memset(room, 0, size)
            _libc.free(room)

    def _open(self, table: str) -> Any:
        """libiptc's own copy of a table, to be changed; the one that was read, as far as numbers tell."""
        if table in self._tables:
            self._tables[table].refresh()
        else:
            self._tables[table] = self._table_class(table, autocommit=False)
        try:
            now = version(self._address_family, table)
        except OSError as error:
            raise self._iptc.IPTCError(os.strerror(error.errno or errno.EIO)) from error
        if now != self._versions.get(table, now):
            self._yield(table)
        return self._tables[table]

    def _yield(self, table: str, error: Exception | None = None) -> None:
        """A program that takes no lock changed the table: raise Busy until the time limit, then RuleError."""
        if time.monotonic() < self._deadline:
            time.sleep(random.uniform(0.001, 0.02))
            raise Busy(f"table {table} has changed") from error
        raise RuleError(f"table {table} ({self._family}) keeps changing: {os.strerror(errno.EAGAIN)}") from error

    def _open_chains(self, handle: Any) -> list[bytes]:
        found = []
        chain = self._first_chain(handle)
        while chain:
            found.append(chain)
            chain = self._next_chain(handle)
        return found

    def _expect_ours(self, table: str, chain: str, number: int) -> None:
        """The rule at a place of a chain must be ours also in the copy that is changed, which was taken a moment later."""
        name, handle = os.fsencode(chain), self._tables[table]._handle
        if name in self._chains:
            return
        entry = self._first_rule(name, handle)
        for _ in range(number - 1):
            entry = self._next_rule(entry, handle) if entry else None
        offset = self._entry_class.target_offset.offset
        if not entry or not self._is_tagged(ctypes.string_at(entry, _OFFSETS.unpack(ctypes.string_at(entry + offset, 4))[1])):
            self._yield(table)


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


def _plain(error: object) -> str:
    """An error of python-iptables as text: it prints bytes as Python literals."""
    return str(error).replace("b'", "").replace("'", "").rstrip(".")
