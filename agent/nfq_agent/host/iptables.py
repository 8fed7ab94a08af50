"""Legacy xtables through python-iptables, whose only importer this is.

Foreign rules are never decoded, and never written: what is not ours is passed over by its bytes. Everything that touches
python-iptables' tables runs in a child process for one family (REDIRECT for IPv4 and then IPv6 in one process fails, and
libxtables' way of printing a rule takes over standard output for a moment).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import random
import shlex
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nfq_agent.diff import Busy, Change, Delete, DropChain, Insert, NewChain, Settled, settle
from nfq_agent.host.errand import ErrandError, errand
from nfq_agent.host.xtables_lock import DEADLINE, release, xtables_lock
from nfq_agent.rules import (
    TABLES,
    Extension,
    Family,
    Installed,
    Option,
    Rule,
    RuleError,
    TableRules,
    TableState,
    instance_of,
    own_chains,
    tag_prefix,
)

_NAMES: Final[Mapping[Family, str]] = {
    # Not /proc/net: that link is hidden from a service with ProcSubset=pid.
    "inet": "/proc/self/net/ip_tables_names",
    "inet6": "/proc/self/net/ip6_tables_names",
}
_MODULES: Final[Mapping[Family, str]] = {"inet": "ip_tables", "inet6": "ip6_tables"}
_SPOKEN: Final[Mapping[Family, str]] = {"inet": "IPv4", "inet6": "IPv6"}
_SONAMES: Final = {"xtables": "libxtables.so.12", "ip4tc": "libip4tc.so.2", "ip6tc": "libip6tc.so.2"}
# libxtables added the field `base` to struct xt_option_entry in 1.8.11 (include/xtables.h) and kept its soname; this
# symbol came with it.
_NEW_LAYOUT: Final = "xtables_strtoul_base"
_VERDICTS: Final = frozenset(("ACCEPT", "DROP", "RETURN", "QUEUE"))
_PROTOCOLS: Final = {6: "tcp", 17: "udp"}
# struct xt_entry_match and xt_entry_target: size, name[29], revision, then the data (linux/netfilter/x_tables.h).
_EXTENSION: Final = struct.Struct("H29sB")
_OFFSETS: Final = struct.Struct("HH")
_COUNTERS: Final = struct.Struct("QQ")
_IFNAMSIZ: Final = 16
# How long commits are tried again when someone who takes no lock changes the table meanwhile.
_PATIENCE: Final = 3.0


def tables_present(family: Family) -> frozenset[str] | None:
    """The tables that are present in this network namespace; None if this process may not know (the file is root's)."""
    try:
        return frozenset(Path(_NAMES[family]).read_text().split())
    except PermissionError:
        return None
    except OSError:
        return frozenset()


def _loaded(family: Family) -> frozenset[str]:
    """The tables whose modules are loaded, if only for another network namespace; none where they are built in."""
    prefix = "iptable" if family == "inet" else "ip6table"
    return frozenset(table for table in TABLES if os.path.isdir(f"/sys/module/{prefix}_{table}"))


def in_kernel(family: Family) -> bool:
    """Whether the kernel has legacy xtables for a family; its module is loaded if that is possible and wanting."""
    if not os.path.exists(_NAMES[family]) and os.path.exists("/proc/modules"):
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["modprobe", "-q", _MODULES[family]], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    return os.path.exists(_NAMES[family])


@functools.cache
def _iptc() -> types.ModuleType:
    """python-iptables, imported in a tenth of its own time. Raises RuleError where it can't be.

    On import it looks for its libraries through ldconfig and the compiler, and loads kernel modules whether needed or
    not; `iptc.util`, which does that, is put in place beforehand with the sonames known. Where those do not load, it goes
    its own way.
    """
    libraries = _libraries()
    held_back = os.environ.get("XTABLES_LIBDIR")
    if libraries:
        sys.modules["iptc.util"] = _quick_util(libraries)
        if held_back is None and (folder := _extensions_folder()):
            os.environ["XTABLES_LIBDIR"] = folder
    try:
        module = importlib.import_module("iptc")
        importlib.import_module("iptc.xtables")
    except Exception as error:
        sys.modules.pop("iptc.util", None)
        raise RuleError(f"python-iptables can't be imported: {error}") from error
    finally:
        if held_back is None:
            os.environ.pop("XTABLES_LIBDIR", None)
    if _new_layout():
        _mend(module)
    return module


def _libraries() -> dict[str, ctypes.CDLL]:
    """Every library that python-iptables looks for, by the name it uses; empty unless all of them load."""
    found: dict[str, ctypes.CDLL] = {}
    try:
        for name, soname in {**_SONAMES, "c": "libc.so.6"}.items():
            found[name] = ctypes.CDLL(soname, mode=ctypes.RTLD_GLOBAL)
        spec = importlib.util.find_spec("iptc")
        beside = Path(spec.origin).parent.parent if spec and spec.origin else Path()
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (wrapper := beside / f"libxtwrapper{suffix}").exists():
                found["xtwrapper"] = ctypes.CDLL(str(wrapper), mode=ctypes.RTLD_GLOBAL)
                return found
    except OSError:
        pass
    return {}


def _quick_util(libraries: Mapping[str, ctypes.CDLL]) -> types.ModuleType:
    """A module that takes the place of `iptc.util`."""

    def find_library(*names: str) -> tuple[ctypes.CDLL | None, int | None]:
        library = next((libraries[name] for name in names if name in libraries), None)
        if library is None:
            return None, None
        _, _, version = library._name.partition(".so.")
        return library, int(version.partition(".")[0] or 0)

    def load_kernel(name: str, exc_if_failed: bool = False) -> None:
        for family, module in _MODULES.items():
            if module == name:
                in_kernel(family)

    made: Any = types.ModuleType("iptc.util")
    made.find_library = find_library
    made.load_kernel = load_kernel
    made.find_libc = lambda: libraries["c"]
    return made  # type: ignore[no-any-return]  # Any, so that attributes can be set on it


def _extensions_folder() -> str | None:
    """Where libxtables keeps its extensions: `xtables` beside the library that was loaded."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if "/libxtables.so" in path and os.path.isdir(folder := os.path.join(os.path.dirname(path), "xtables")):
                return folder
    return None


def _new_layout() -> bool:
    """Whether libxtables has the longer xt_option_entry."""
    try:
        return hasattr(ctypes.CDLL(_SONAMES["xtables"]), _NEW_LAYOUT)
    except OSError:
        return False


def _mend(module: Any) -> None:
    """Teach python-iptables the longer xt_option_entry: it finds options by walking an array of them."""
    xtables = module.xtables
    old = xtables.xt_option_entry

    class Entry(ctypes.Structure):
        _fields_ = (*old._fields_, ("base", ctypes.c_uint))

    def entries(table: Any) -> Iterator[Any]:
        place = ctypes.cast(table, ctypes.c_void_p).value
        while place:
            entry = ctypes.cast(place, ctypes.POINTER(old))[0]
            if not entry.name:
                return
            yield entry
            place += ctypes.sizeof(Entry)

    lookup, check = xtables.xtables._option_lookup, xtables.xtables._options_fcheck
    xtables.xtables._option_lookup = lambda self, table, name: lookup(self, entries(table), name)
    xtables.xtables._options_fcheck = lambda self, name, flags, table: check(self, name, flags, entries(table))


class LegacyHost:
    """This instance's rules in the legacy tables. Its calls are short, and run in children of the caller."""

    name = "legacy"

    def __init__(
        self, instance: str, lock: int | None = None, lock_seconds: float = DEADLINE, tables: Iterable[str] = ()
    ) -> None:
        """lock: a descriptor of the xtables lock from somebody who may open it. lock_seconds: how long to wait for it.

        tables: those that an earlier run wrote, for a process that may not know which tables are present.
        """
        self.instance = instance
        self._lock = lock
        self._lock_seconds = lock_seconds
        # What there is to look at where /proc does not say: tables that were written.
        self._known: dict[Family, set[str]] = {"inet": set(tables), "inet6": set(tables)}

    def present(self, family: Family) -> frozenset[str] | None:
        """The names of the tables that are present; None if this process may not know."""
        return tables_present(family)

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table that is present holds of this instance. Raises RuleError."""
        tables = self._tables(family)
        found: dict[str, TableState] = self._errand(_read, family, self.instance, tables) if tables else {}
        return found

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that own chains."""
        tables = self._tables(family)
        found: frozenset[str] = self._errand(_instances, family, tables) if tables else frozenset()
        return found

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Settled:
        """Make the rules the desired ones, in every present table. Raises RuleError."""
        wanted = {name for name, table in desired.items() if table.chains or table.jumps}
        tables = self._tables(family) | wanted
        if tables_present(family) is None and not self._known[family]:
            # The first time nobody knows what an earlier configuration left, and stale rules must go. Better a table that
            # becomes present than rules that stay; but one whose module is not there can't have any.
            tables |= _loaded(family) if wanted else _loaded(family) or frozenset(TABLES)
        if not tables:
            return Settled()
        if not in_kernel(family):
            raise RuleError(f"the kernel has no legacy xtables for {_SPOKEN[family]} (module {_MODULES[family]})")
        self._known[family] |= wanted
        settled: Settled = self._errand(_apply, family, self.instance, tables, dict(desired), self._lock, self._lock_seconds)
        return settled

    def _tables(self, family: Family) -> frozenset[str]:
        present = tables_present(family)
        return frozenset(self._known[family] if present is None else present & set(TABLES))

    def _errand(self, function: Any, *args: Any) -> Any:
        _iptc()
        try:
            return errand(function, *args)
        except (ErrandError, OSError) as error:
            if self._lock is not None:
                # The child is gone, but a lock that it took on our descriptor is not.
                release(self._lock)
            raise RuleError(f"legacy rules: {error}") from error


def _read(family: Family, instance: str, tables: frozenset[str]) -> dict[str, TableState]:
    return _Session(family, instance, tables).read()


def _instances(family: Family, tables: frozenset[str]) -> frozenset[str]:
    session = _Session(family, "", tables)
    session.open()
    names = (instance_of(os.fsdecode(chain)) for table in tables for chain in session.chains(table))
    return frozenset(name for name in names if name is not None)


def _apply(
    family: Family,
    instance: str,
    tables: frozenset[str],
    desired: Mapping[str, TableRules],
    lock: int | None,
    lock_seconds: float,
) -> Settled:
    session = _Session(family, instance, tables)
    # Everything slow comes before the lock.
    for table in desired.values():
        for rule in table.rules:
            session.build(rule)
    with xtables_lock(lock, lock_seconds):
        return settle(session, desired)


class _Session:
    """One family's tables, in a process of their own. See diff.Session."""

    def __init__(self, family: Family, instance: str, tables: frozenset[str]) -> None:
        self._iptc = iptc = _iptc()
        inet = family == "inet"
        self._family = _SPOKEN[family]
        self._table_class = iptc.Table if inet else iptc.Table6
        self._rule_class = iptc.Rule if inet else iptc.Rule6
        module = importlib.import_module("iptc.ip4tc" if inet else "iptc.ip6tc")
        self._entry_class = module.ipt_entry if inet else module.ip6t_entry
        # A target that is no standard one makes python-iptables look for a chain of that name, in all tables that it
        # thinks are there, which makes them present. It need not look: a chain's name is never asked of it here.
        self._table_class.existing_table_names.update(dict.fromkeys(self._table_class.ALL, False))
        self._chains = frozenset(os.fsencode(name) for name in own_chains(instance))
        self._tag = tag_prefix(instance).encode()
        self._names = tables
        self._tables: dict[str, Any] = {}
        self._entries: dict[Rule, bytes] = {}
        self._deadline = time.monotonic() + _PATIENCE
        self._bind(module._libiptc, "iptc" if inet else "ip6tc")

    def _bind(self, library: ctypes.CDLL, prefix: str) -> None:
        """libiptc's walk, with plain addresses: an object for each of 20,000 entries would take seconds."""

        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = library[f"{prefix}_{name}"]
            found.restype, found.argtypes = result, arguments
            return found

        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        self._first_chain = function("first_chain", text, pointer)
        self._next_chain = function("next_chain", text, pointer)
        self._first_rule = function("first_rule", pointer, text, pointer)
        self._next_rule = function("next_rule", pointer, pointer, pointer)
        self._get_target = function("get_target", text, pointer, pointer)
        self._delete_number = function("delete_num_entry", ctypes.c_int, text, ctypes.c_uint, pointer)
        self._references = function("get_references", ctypes.c_int, ctypes.POINTER(ctypes.c_uint), text, pointer)

    # Reading

    def open(self) -> None:
        """Take every table anew as the kernel has it now."""
        for name in self._names:
            try:
                if name in self._tables:
                    self._tables[name].refresh()
                else:
                    self._tables[name] = self._table_class(name, autocommit=False)
            except self._iptc.IPTCError as error:
                raise RuleError(f"table {name} ({self._family}) can't be read: {_plain(error)}") from error

    def chains(self, table: str) -> list[bytes]:
        """The names of all chains of a table."""
        handle = self._tables[table]._handle
        found = []
        chain = self._first_chain(handle)
        while chain:
            found.append(chain)
            chain = self._next_chain(handle)
        return found

    def read(self) -> dict[str, TableState]:
        """What every table holds of the instance."""
        self.open()
        return {name: self._state(name) for name in sorted(self._names)}

    def _state(self, table: str) -> TableState:
        handle = self._tables[table]._handle
        offset = self._entry_class.target_offset.offset
        string_at, offsets, next_rule, tag = ctypes.string_at, _OFFSETS.unpack, self._next_rule, self._tag
        chains: dict[str, tuple[Installed, ...]] = {}
        jumps: list[Installed] = []
        known_jumps: dict[bytes, int] = {}
        for chain in self.chains(table):
            own = chain in self._chains
            found: list[Installed] = []
            number = 0
            entry = self._first_rule(chain, handle)
            while entry:
                number += 1
                _, size = offsets(string_at(entry + offset, 4))
                data = string_at(entry, size)
                if own or (tag in data and self._is_tagged(data)):
                    jump = self._jump(data, entry, handle)
                    if jump in self._chains:
                        known_jumps[jump] = known_jumps.get(jump, 0) + 1
                    found.append(self._installed(chain, number, data, jump))
                entry = next_rule(entry, handle)
            if own:
                chains[os.fsdecode(chain)] = tuple(found)
            else:
                jumps += found
        held = {name for name in chains if self._reference_count(name, handle) > known_jumps.get(os.fsencode(name), 0)}
        return TableState(chains, tuple(jumps), frozenset(held))

    def _reference_count(self, chain: str, handle: Any) -> int:
        count = ctypes.c_uint()
        self._references(ctypes.byref(count), os.fsencode(chain), handle)
        return count.value

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

    def _jump(self, data: bytes, entry: int, handle: Any) -> bytes | None:
        """The chain or verdict of a standard target; None for an extension's."""
        target = _OFFSETS.unpack_from(data, self._entry_class.target_offset.offset)[0]
        # An empty name stands for the standard target (XT_STANDARD_TARGET).
        return (self._get_target(entry, handle) or b"") if data[target + 2] == 0 else None

    def _installed(self, chain: bytes, number: int, data: bytes, jump: bytes | None) -> Installed:
        counters = self._entry_class.counters.offset
        packets, size = _COUNTERS.unpack_from(data, counters)
        if jump is not None:
            # As libiptc wants it back, should it have to be restored.
            target = _OFFSETS.unpack_from(data, self._entry_class.target_offset.offset)[0]
            data = data[: target + 2] + jump.ljust(29, b"\0") + data[target + 31 :]
        name = os.fsdecode(chain)
        try:
            rule = self._decode(name, data, jump is not None)
        except (ValueError, LookupError, self._iptc.errors.XTablesError):
            # Nobody wishes for such a rule, so it goes; the digest tells two of them apart.
            body = data[:counters] + data[counters + _COUNTERS.size :]
            rule = Rule(name, Extension("?", (Option("--undecoded", hashlib.sha1(body).hexdigest()[:16]),)))
        self._entries.setdefault(rule, data)
        return Installed(rule, number, packets, size)

    def _decode(self, chain: str, data: bytes, standard: bool) -> Rule:
        """The rule that an entry is. Raises ValueError, LookupError or XTablesError on what we never write."""
        entry = self._entry_class.from_buffer_copy(data)
        made = self._rule_class()
        made.entry = entry
        ip = made.get_ip()
        # IP6T_F_PROTO says that the protocol counts; no other flag is ours, nor an address.
        expected = 1 if self._family == "IPv6" and ip.proto else 0
        if any(bytes(each) != bytes(len(bytes(each))) for each in (ip.src, ip.dst, ip.smsk, ip.dmsk)):
            raise ValueError("an address")
        if ip.flags != expected or ip.invflags or getattr(ip, "tos", 0):
            raise ValueError("flags")
        protocol = "" if ip.proto == 0 else _PROTOCOLS.get(ip.proto, str(ip.proto))
        *matches, target = [self._extension(made, data, *each) for each in self._extensions(data)]
        if standard:
            offset = entry.target_offset
            target = Extension(os.fsdecode(data[offset + 2 : offset + 31].split(b"\0")[0]))
        return Rule(
            chain, target, tuple(matches), protocol,
            _interface_name(ip.iniface, ip.iniface_mask), _interface_name(ip.outiface, ip.outiface_mask),
        )  # fmt: skip

    def _extension(self, rule: Any, data: bytes, name: str, revision: int, place: int, size: int) -> Extension:
        """A match or the target of an entry, by the text that libxtables prints for it."""
        is_target = place == rule.entry.target_offset
        if is_target and (name in _VERDICTS or name.startswith("NFQA-") or not name):
            return Extension(name)
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
        saved = (shown._get_saved_buf(rule.get_ip()) or b"").decode()
        words = [shlex.quote(word) for word in shlex.split(saved)]
        parsed = Rule.parse(f"-A chain {'-j' if is_target else '-m'} {name} {' '.join(words)}")
        return parsed.target if is_target else parsed.matches[0]

    # Writing

    def build(self, rule: Rule) -> bytes:
        """The entry for a rule, read back and compared: what libxtables does not take as it was meant is never written.

        Raises RuleError.
        """
        if (entry := self._entries.get(rule)) is not None:
            return entry
        try:
            data = self._encode(rule)
            back = self._decode(rule.chain, data, _is_standard(rule.target))
        # python-iptables raises whatever its parsers run into.
        except (AttributeError, LookupError, TypeError, ValueError, OSError, self._iptc.errors.XTablesError) as error:
            raise RuleError(f"python-iptables can't write the rule {rule}: {_plain(error)}") from error
        if back != rule:
            raise RuleError(f"python-iptables would write\n  {back}\nwhere this is wanted:\n  {rule}")
        self._entries[rule] = data
        return data

    def _encode(self, rule: Rule) -> bytes:
        made = self._rule_class()
        ip = made.get_ip()
        if rule.protocol:
            made.protocol = rule.protocol
        # python-iptables' own mask for IPv6 interfaces compares one bit of each letter.
        if rule.in_interface:
            ip.iniface, ip.iniface_mask = _interface(rule.in_interface)
        if rule.out_interface:
            ip.outiface, ip.outiface_mask = _interface(rule.out_interface)
        for match in rule.matches:
            _set(made.create_match(match.name), match.options)
        if _is_standard(rule.target):
            made.create_target("ACCEPT").standard_target = rule.target.name
        else:
            _set(made.create_target(rule.target.name), rule.target.options)
        return bytes(made.rule)

    def commit(self, table: str, changes: Sequence[Change]) -> None:
        """Carry out the changes of one table in one commit. Raises Busy if somebody else was quicker, else RuleError."""
        kernel = self._tables[table]
        handle = kernel._handle
        try:
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
                        if self._delete_number(os.fsencode(rule.chain), number - 1, handle) != 1:
                            raise self._iptc.IPTCError(f"can't delete rule {number}: {_plain(kernel.strerror())}")
            # libiptc counts policies anew from each commit (TC_COMMIT: COUNTER_MAP_ZEROED) unless they are given.
            for name in map(os.fsdecode, self.chains(table)):
                policy, counters = kernel.get_policy(name)
                if policy is not None:
                    kernel.set_policy(name, policy, counters)
            kernel.commit()
        except self._iptc.IPTCError as error:
            reason = _plain(error)
            if os.strerror(errno.EAGAIN) in reason and time.monotonic() < self._deadline:
                time.sleep(random.uniform(0.001, 0.02))
                raise Busy(f"table {table} changed meanwhile") from error
            raise RuleError(f"table {table} ({self._family}): {reason}") from error


def _is_standard(target: Extension) -> bool:
    return target.name in _VERDICTS or target.name.startswith("NFQA-")


def _set(extension: Any, options: Sequence[Option]) -> None:
    """Give a match or target its options, and let it finish: REDIRECT, for one, counts its ranges at the end."""
    for option in options:
        words = option.value.split(" ") if option.name == "--tcp-flags" else [option.value]
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


def _plain(error: object) -> str:
    """An error of python-iptables as people read it: it prints bytes as Python does."""
    return str(error).replace("b'", "").replace("'", "").rstrip(".")


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is of legacy xtables. `problem`: why it can't be used; None if it can."""

    ipv4: bool
    ipv6: bool
    libxtables: str
    mended: bool
    problem: str | None


# One of everything that a configuration can ask for.
_SAMPLES: Final = (
    "-A NFQA-probe-OUTPUT -o eth0 -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m multiport --dports 80,8000:8010"
    ' -m mark --mark 0x1/0xff -m owner ! --uid-owner 1 -m comment --comment "nfq-agent:probe:a"'
    " -j NFQUEUE --queue-balance 100:103 --queue-bypass --queue-cpu-fanout",
    '-A OUTPUT -m comment --comment "nfq-agent:probe:jump" -j NFQA-probe-OUTPUT',
    '-A NFQA-probe-OUTPUT -p udp -m multiport --ports 53 -m comment --comment "nfq-agent:probe:b"'
    " -j NFQUEUE --queue-num 65535 --queue-bypass",
    '-A NFQA-probe-OUTPUT -p tcp -m multiport --dports 8080 -m comment --comment "nfq-agent:probe:c"'
    " -j REDIRECT --to-ports 15002",
)


def probe() -> Facts:
    """What this kernel and this libxtables can do, tried out by encoding rules; nothing is written."""
    ipv4, ipv6 = in_kernel("inet"), in_kernel("inet6")
    problem = None if ipv4 or ipv6 else "the kernel has no legacy xtables (CONFIG_IP_NF_IPTABLES_LEGACY; module ip_tables)"
    if problem is None:
        try:
            _iptc()
            for family, there in (("inet", ipv4), ("inet6", ipv6)):
                if there:
                    errand(_build_samples, family)
        except (RuleError, ErrandError, OSError) as error:
            problem = str(error)
    return Facts(ipv4, ipv6, _version(), _new_layout(), problem)


def _build_samples(family: Family) -> None:
    session = _Session(family, "probe", frozenset())
    for sample in _SAMPLES:
        session.build(Rule.parse(sample))


def _version() -> str:
    """The library's file, whose name carries its version; empty if it isn't there."""
    with suppress(OSError):
        ctypes.CDLL(_SONAMES["xtables"])
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "/libxtables.so" in line:
                return os.path.basename(os.path.realpath(line.split(maxsplit=5)[-1]))
    return ""


def fault() -> str | None:
    """Why legacy rules can't be written here; None if they can. Cheap unless libxtables has the new layout."""
    if not in_kernel("inet") and not in_kernel("inet6"):
        return "the kernel has no legacy xtables (CONFIG_IP_NF_IPTABLES_LEGACY; module ip_tables)"
    try:
        _iptc()
    except RuleError as error:
        return str(error)
    return probe().problem if _new_layout() else None
