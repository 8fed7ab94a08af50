"""bpf(2): loads the programs of an object file, attaches them to interfaces (tcx links), reads and writes their maps.

The only user of that system call. It knows the parts of ELF that such an object has, and nothing about what the programs do. A
link or a program lives as long as a descriptor of it is open.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gzip
import os
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# linux/bpf.h
_MAP_CREATE: Final = 0
_MAP_LOOKUP: Final = 1
_MAP_UPDATE: Final = 2
_MAP_DELETE: Final = 3
_PROG_LOAD: Final = 5
_OBJ_GET_INFO: Final = 15
_PROG_QUERY: Final = 16
_MAP_UPDATE_BATCH: Final = 26
_LINK_CREATE: Final = 28
_SCHED_CLS: Final = 3
TCX_INGRESS: Final = 46
TCX_EGRESS: Final = 47
_BEFORE: Final = 1 << 3
_PSEUDO_MAP_FD: Final = 1
# linux/errno.h: a map without that operation.
_ENOTSUPP: Final = 524
_NUMBERS: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_TRIES: Final = 5
# The programs, compiled when the agent is built (packaging/bpf). Compressed, since tools that check packages report an object of
# another processor as a mistake.
OBJECT: Final = Path(__file__).with_name("inline.bpf.gz")

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytes | ctypes.Array[ctypes.c_char]) -> int:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, "bpf(2) is not known for this processor")
    buffer = ctypes.create_string_buffer(attributes, len(attributes)) if isinstance(attributes, bytes) else attributes
    result = int(_libc.syscall(number, command, buffer, len(buffer)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Map:
    """One map, by its descriptor."""

    def __init__(self, descriptor: int, key_size: int, value_size: int) -> None:
        self.descriptor = descriptor
        self.key_size = key_size
        self.value_size = value_size

    def _call(self, command: int, key: bytes, value: ctypes.Array[ctypes.c_char] | None = None) -> None:
        held = ctypes.create_string_buffer(key, self.key_size)
        place = 0 if value is None else ctypes.addressof(value)
        _bpf(command, struct.pack("=IIQQQ", self.descriptor, 0, ctypes.addressof(held), place, 0))

    def get(self, key: bytes) -> bytes | None:
        """The value, None if there is none."""
        value = ctypes.create_string_buffer(self.value_size)
        try:
            self._call(_MAP_LOOKUP, key, value)
        except FileNotFoundError:
            return None
        return value.raw

    def put(self, key: bytes, value: bytes) -> None:
        """Set the value. Raises OSError, E2BIG where a map is full."""
        self._call(_MAP_UPDATE, key, ctypes.create_string_buffer(value, self.value_size))

    def put_all(self, entries: Mapping[bytes, bytes]) -> None:
        """Set many values, in one system call where the kernel has it (5.6 and later). Raises OSError as `put` does."""
        if len(entries) > 1:
            keys = ctypes.create_string_buffer(b"".join(entries), len(entries) * self.key_size)
            values = ctypes.create_string_buffer(b"".join(entries.values()), len(entries) * self.value_size)
            places = 0, 0, ctypes.addressof(keys), ctypes.addressof(values)
            try:
                _bpf(_MAP_UPDATE_BATCH, struct.pack("=QQQQIIQQ", *places, len(entries), self.descriptor, 0, 0))
            except OSError as error:
                if error.errno not in (errno.EINVAL, _ENOTSUPP):
                    raise
            else:
                return
        for key, value in entries.items():
            self.put(key, value)

    def remove(self, key: bytes) -> None:
        """Remove the key; nothing happens if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self._call(_MAP_DELETE, key)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The descriptors of an object's programs, by section name, and its maps by name."""

    programs: Mapping[str, int]
    maps: Mapping[str, Map]

    @property
    def descriptors(self) -> list[int]:
        """All of them."""
        return [*self.programs.values(), *(each.descriptor for each in self.maps.values())]

    def close(self) -> None:
        """Close them. What is attached stays until its link is closed."""
        for descriptor in self.descriptors:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Section:
    """A section of an ELF object. kind: sh_type. info: sh_info."""

    name: str
    kind: int
    data: bytes
    info: int


def _sections(image: bytes) -> tuple[list[_Section], int]:
    """The sections of a 64-bit little-endian ELF object, and the number of that with the symbols. Source: elf(5)."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF object")
    (offset,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, offset + size * number) for number in range(count)]
    base = headers[names][4]
    found = []
    symbols = 0
    for number, (name, kind, _, _, start, length, _, info, _, _) in enumerate(headers):
        end = image.index(b"\0", base + name)
        found.append(_Section(image[base + name : end].decode(), kind, image[start : start + length], info))
        if kind == 2:
            symbols = number
    return found, symbols


def load(packed: bytes) -> Loaded:
    """Create the maps of a packed object and load its programs. Raises OSError: EPERM without CAP_BPF and CAP_NET_ADMIN."""
    sections, symbols = _sections(gzip.decompress(packed))
    table = [struct.unpack_from("<IBBHQQ", sections[symbols].data, at) for at in range(0, len(sections[symbols].data), 24)]
    names = next(each.data for each in sections if each.name == ".strtab")
    maps: dict[str, Map] = {}
    programs: dict[str, int] = {}
    place = next(number for number, each in enumerate(sections) if each.name == "maps")
    try:
        by_symbol: dict[int, int] = {}
        for number, (name, _, _, section, value, _) in enumerate(table):
            if section != place:
                continue
            text = names[name : names.index(b"\0", name)].decode()
            if not text:
                continue
            kind, key, size, most, flags = struct.unpack_from("<IIIII", sections[place].data, value)
            title = f"nfq_{text}"[:15].encode()
            descriptor = _bpf(_MAP_CREATE, struct.pack("=IIIIIII16s", kind, key, size, most, flags, 0, 0, title))
            maps[text] = Map(descriptor, key, size)
            by_symbol[number] = descriptor
        for number, each in enumerate(sections):
            if each.name.startswith("tcx/"):
                relocations = [other.data for other in sections if other.kind == 9 and other.info == number]
                code = _linked(each.data, b"".join(relocations), by_symbol)
                programs[each.name[4:]] = _load_program(each.name[4:], code)
    except BaseException:
        Loaded(programs, maps).close()
        raise
    return Loaded(programs, maps)


def _linked(code: bytes, relocations: bytes, maps: Mapping[int, int]) -> bytes:
    """The instructions with the descriptors of the maps where they name one (BPF_LD_IMM64)."""
    linked = bytearray(code)
    for at in range(0, len(relocations), 16):
        offset, info = struct.unpack_from("<QQ", relocations, at)
        linked[offset + 1] = (linked[offset + 1] & 0x0F) | _PSEUDO_MAP_FD << 4
        struct.pack_into("<i", linked, offset + 4, maps[info >> 32])
    return bytes(linked)


def _load_program(name: str, code: bytes) -> int:
    instructions = ctypes.create_string_buffer(code, len(code))
    granted = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(1 << 16)

    def attributes(level: int) -> bytes:
        return struct.pack(
            "=IIQQIIQII16s", _SCHED_CLS, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(granted),
            level, len(log) if level else 0, ctypes.addressof(log) if level else 0, 0, 0, f"nfq_{name}"[:15].encode(),
        )  # fmt: skip

    try:
        return _bpf(_PROG_LOAD, attributes(0))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
        # The verifier says why.
        try:
            return _bpf(_PROG_LOAD, attributes(1))
        except OSError as again:
            said = log.value.decode(errors="replace").strip().splitlines()
            raise OSError(again.errno, f"the kernel refused the program {name}: {' / '.join(said[-3:])}") from again


def program_id(descriptor: int) -> int:
    """The kernel's number for a program."""
    info = ctypes.create_string_buffer(8)
    _bpf(_OBJ_GET_INFO, struct.pack("=IIQ", descriptor, len(info), ctypes.addressof(info)))
    return int(struct.unpack_from("=II", info)[1])


@dataclass(frozen=True, slots=True)
class Attached:
    """What is attached to one side of an interface: program numbers in their order, and how often that has changed."""

    programs: tuple[int, ...]
    revision: int


def query(interface: int, side: int) -> Attached:
    """What is attached there (tcx). Raises OSError: EINVAL on a kernel without tcx, EPERM without CAP_NET_ADMIN."""
    room = 64
    numbers = (ctypes.c_uint32 * room)()
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIIIQIIQQQQ", interface, side, 0, 0, ctypes.addressof(numbers), room, 0, 0, 0, 0, 0), 64
    )
    _bpf(_PROG_QUERY, attributes)
    count, revision = struct.unpack_from("=I28xQ", attributes, 24)
    return Attached(tuple(numbers[:count]), revision)


def attach(program: int, interface: int, side: int) -> int:
    """Attach before all others, as a link: its descriptor. Raises OSError.

    It is retried where another program was attached meanwhile (ESTALE).
    """
    for last in range(_TRIES):
        revision = query(interface, side).revision
        try:
            return _bpf(_LINK_CREATE, struct.pack("=IIIIIIQ", program, interface, side, _BEFORE, 0, 0, revision))
        except OSError as error:
            if error.errno != errno.ESTALE or last == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


NO_TCX: Final = "tcx links (kernel 6.6 and later)"


def missing() -> str | None:
    """What this host or unit lacks for tcx links, None if nothing."""
    return tcx_missing() or programs_missing()


def tcx_missing() -> str | None:
    """What it lacks to attach programs by links; NO_TCX where the kernel has no such links."""
    try:
        query(1, TCX_INGRESS)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            return "CAP_NET_ADMIN, or the unit's SystemCallFilter= leaves out bpf (docs/tc.md has the drop-in)"
        if error.errno == errno.ENOSYS:
            return "bpf(2)"
        return NO_TCX
    return None


def programs_missing() -> str | None:
    """What it lacks to load programs."""
    # Two instructions: return TCX_NEXT.
    code = struct.pack("<BBhi", 0xB7, 0, 0, -1) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    try:
        os.close(_load_program("probe", code))
    except OSError as error:
        return "CAP_BPF" if error.errno in (errno.EPERM, errno.EACCES) else f"programs in the kernel: {error}"
    return None
