"""Legacy xtables through python-iptables, whose only importer this is.

Everything that touches its tables (xtables.py) runs in a child process for one family: REDIRECT for IPv4 and then IPv6 in
one process fails, and libxtables' way of printing a rule takes over standard output for a moment.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nfq_agent.host.one_shot import OneShot, OneShotError, one_shot
from nfq_agent.host.xtables.kernel import FAMILY_NAMES, Tables
from nfq_agent.host.xtables.lock import DEADLINE, release, xtables_lock
from nfq_agent.rules.diff import Settled, settle
from nfq_agent.rules.model import TABLES, Family, Rule, RuleError, TableRules, TableState, instance_of

_NAMES: Final[Mapping[Family, str]] = {
    # Not /proc/net: that link is hidden from a service with ProcSubset=pid.
    "inet": "/proc/self/net/ip_tables_names",
    "inet6": "/proc/self/net/ip6_tables_names",
}
_MODULES: Final[Mapping[Family, str]] = {"inet": "ip_tables", "inet6": "ip6_tables"}
_SONAMES: Final = {"xtables": "libxtables.so.12", "ip4tc": "libip4tc.so.2", "ip6tc": "libip6tc.so.2"}
# libxtables added the field `base` to struct xt_option_entry in 1.8.11 (include/xtables.h) and kept its soname; this
# symbol came with it.
_NEW_LAYOUT: Final = "xtables_strtoul_base"


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
            command = [shutil.which("modprobe") or "/sbin/modprobe", "-q", _MODULES[family]]
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
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

    def load_kernel(name: str, exc_if_failed: bool = False) -> None:  # noqa: ARG001  # the signature that iptc calls
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
    notice = ""

    def __init__(
        self, instance: str, lock: int | None = None, lock_seconds: float = DEADLINE, tables: Iterable[str] = ()
    ) -> None:
        """lock: a descriptor of the xtables lock from somebody who may open it. lock_seconds: how long to wait for it.

        tables: those that an earlier run wrote, for a process that may not know which tables are present.
        """
        self.instance = instance
        self._lock = lock
        self.lock_seconds = lock_seconds
        # What there is to look at where /proc does not say: tables that were written.
        self._known: dict[Family, set[str]] = {"inet": set(tables), "inet6": set(tables)}

    def present(self, family: Family) -> frozenset[str] | None:
        """The names of the tables that are present; None if this process may not know."""
        return tables_present(family)

    def read(self, family: Family) -> dict[str, TableState]:
        """What each table that is present holds of this instance. Raises RuleError."""
        tables = self._tables(family)
        found: dict[str, TableState] = self._one_shot(_read, family, self.instance, tables) if tables else {}
        return found

    def instances(self, family: Family) -> frozenset[str]:
        """The instances that own chains."""
        tables = self._tables(family)
        found: frozenset[str] = self._one_shot(_instances, family, tables) if tables else frozenset()
        return found

    def apply(self, family: Family, desired: Mapping[str, TableRules]) -> Settled:
        """Make the rules the desired ones, in every present table. Raises RuleError."""
        return self.begin(family, desired)()

    def begin(self, family: Family, desired: Mapping[str, TableRules]) -> Callable[[], Settled]:
        """Begin that; what is returned waits for the end of it. Raises RuleError, as that does."""
        wanted = {name for name, table in desired.items() if table.chains or table.jumps}
        tables = self._tables(family) | wanted
        if tables_present(family) is None and not self._known[family]:
            # The first time nobody knows what an earlier configuration left, and stale rules must go. Better a table that
            # becomes present than rules that stay; but one whose module is not there can't have any.
            tables |= _loaded(family) if wanted else _loaded(family) or frozenset(TABLES)
        if not tables:
            return Settled
        if not in_kernel(family):
            raise RuleError(f"the kernel has no legacy xtables for {FAMILY_NAMES[family]} (module {_MODULES[family]})")
        self._known[family] |= wanted
        arguments = family, self.instance, tables, dict(desired), self._lock, self.lock_seconds
        if self._lock is not None:
            # Two children that share a descriptor share the lock: one after the other.
            return functools.partial(self._one_shot, _apply, *arguments)
        return functools.partial(self._finished, self._begun(_apply, *arguments))

    def _tables(self, family: Family) -> frozenset[str]:
        present = tables_present(family)
        return frozenset(self._known[family] if present is None else present & set(TABLES))

    def _one_shot(self, function: Any, *args: Any) -> Any:
        return self._finished(self._begun(function, *args))

    def _begun(self, function: Any, *args: Any) -> OneShot[Any]:
        _iptc()
        try:
            return OneShot(function, *args)
        except OSError as error:
            raise RuleError(f"legacy rules: {error}") from error

    def _finished(self, running: OneShot[Any]) -> Any:
        try:
            return running.result()
        except (OneShotError, OSError) as error:
            if self._lock is not None:
                # The child is gone, but a lock that it took on our descriptor is not.
                release(self._lock)
            raise RuleError(f"legacy rules: {error}") from error


def _read(family: Family, instance: str, tables: frozenset[str]) -> dict[str, TableState]:
    return Tables(_iptc(), family, instance, tables).read()


def _instances(family: Family, tables: frozenset[str]) -> frozenset[str]:
    session = Tables(_iptc(), family, "", tables)
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
    session = Tables(_iptc(), family, instance, tables)
    # Everything slow comes before the lock.
    for table in desired.values():
        for rule in table.rules:
            session.build(rule)

    def locked() -> AbstractContextManager[None]:
        session.make_room()
        return xtables_lock(lock, lock_seconds)

    if tables <= (tables_present(family) or frozenset()):
        # Others wait for the commit alone.
        return settle(session, desired, locked)
    # Reading makes a table present: not before we may write.
    with locked():
        return settle(session, desired)


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
                    one_shot(_build_samples, family)
        except (RuleError, OneShotError, OSError) as error:
            problem = str(error)
    return Facts(ipv4, ipv6, _version(), _new_layout(), problem)


def _build_samples(family: Family) -> None:
    session = Tables(_iptc(), family, "probe", frozenset())
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
