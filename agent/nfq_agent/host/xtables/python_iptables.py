"""python-iptables; this is its only importer: how it is imported, and whether it can be used here."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nfq_agent.host.families import families
from nfq_agent.host.one_shot import OneShotError, one_shot
from nfq_agent.host.users import CAP_NET_ADMIN, CAP_NET_RAW, has_capability
from nfq_agent.host.xtables.kernel import Tables
from nfq_agent.host.xtables.socket_call import use_datagram_sockets
from nfq_agent.rules.model import Family, Rule, RuleError

NAMES_FILES: Final[Mapping[Family, str]] = {
    # Not /proc/net: that link is hidden from a service with ProcSubset=pid.
    "inet": "/proc/self/net/ip_tables_names",
    "inet6": "/proc/self/net/ip6_tables_names",
}
MODULES: Final[Mapping[Family, str]] = {"inet": "ip_tables", "inet6": "ip6_tables"}
_SONAMES: Final = {"xtables": "libxtables.so.12", "ip4tc": "libip4tc.so.2", "ip6tc": "libip6tc.so.2"}
# libxtables added the field `base` to struct xt_option_entry in 1.8.11 (include/xtables.h) and kept its soname; this
# symbol came with it.
_NEW_LAYOUT: Final = "xtables_strtoul_base"
# Whether the libraries open raw sockets, because their call could not be replaced.
_raw_sockets = False


def in_kernel(family: Family) -> bool:
    """Whether the kernel has legacy xtables for a family; its module is loaded if it is missing and that is possible."""
    if not os.path.exists(NAMES_FILES[family]) and os.path.exists("/proc/modules"):
        with suppress(OSError, ImportError):
            _modprobe(MODULES[family])
    return os.path.exists(NAMES_FILES[family])


def _modprobe(module: str) -> None:
    # Loaded only here: most hosts have the module in use.
    import subprocess

    # It may not be in the path of a service.
    with suppress(subprocess.TimeoutExpired):
        for program in ("modprobe", "/sbin/modprobe"):
            with suppress(FileNotFoundError):
                subprocess.run([program, "-q", module], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
                return


@functools.cache
def import_iptc() -> types.ModuleType:
    """python-iptables, imported in a tenth of its usual time. Raises RuleError if it cannot be imported.

    On import it looks for its libraries through ldconfig and the compiler, and loads kernel modules whether needed or
    not; `iptc.util`, which does that, is put in place beforehand with the sonames known. If those do not load, it
    searches as usual.
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
        raise RuleError(f"python-iptables cannot be imported: {error}") from error
    finally:
        if held_back is None:
            os.environ.pop("XTABLES_LIBDIR", None)
    if _new_layout():
        _mend(module)
    global _raw_sockets
    _raw_sockets = use_datagram_sockets() < len(_SONAMES)
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
        for family, module in MODULES.items():
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
    """Adapt python-iptables to the longer xt_option_entry: it finds options by walking an array of them."""
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


@dataclass(frozen=True, slots=True)
class LegacySupport:
    """The legacy xtables of this host. `problem`: why they cannot be used; None if they can."""

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


def probe() -> LegacySupport:
    """What this kernel and this libxtables can do, tested by encoding rules; nothing is written."""
    ipv4, ipv6 = in_kernel("inet"), in_kernel("inet6")
    why = None if ipv4 or ipv6 else "the kernel has no legacy xtables (CONFIG_IP_NF_IPTABLES_LEGACY; module ip_tables)"
    if why is None:
        try:
            import_iptc()
            # libxtables opens a socket of the family, which a kernel without it refuses.
            for family in filter(in_kernel, families()):
                one_shot(_build_samples, family)
        except (RuleError, OneShotError, OSError) as error:
            why = str(error)
    return LegacySupport(ipv4, ipv6, _version(), _new_layout(), why)


def _build_samples(family: Family) -> None:
    session = Tables(import_iptc(), family, "probe", frozenset())
    for sample in _SAMPLES:
        session.build(Rule.parse(sample))


def _version() -> str:
    """The library's file, whose name carries its version; empty if it is not there."""
    with suppress(OSError):
        ctypes.CDLL(_SONAMES["xtables"])
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "/libxtables.so" in line:
                return os.path.basename(os.path.realpath(line.split(maxsplit=5)[-1]))
    return ""


def problem() -> str | None:
    """Why legacy rules cannot be written here; None if they can. Cheap unless libxtables has the new layout."""
    if not in_kernel("inet") and not in_kernel("inet6"):
        return "the kernel has no legacy xtables (CONFIG_IP_NF_IPTABLES_LEGACY; module ip_tables)"
    try:
        import_iptc()
    except RuleError as error:
        return str(error)
    if _raw_sockets and has_capability(CAP_NET_ADMIN) and not has_capability(CAP_NET_RAW):
        return (
            "libiptc opens raw sockets, and CAP_NET_RAW is missing; start as root or with that capability, or set "
            'backend = "owned", which needs none'
        )
    # Without the capability the kernel answers no question of libxtables, which then ends the process. Verbs say what is missing.
    return probe().problem if _new_layout() and has_capability(CAP_NET_ADMIN) else None
