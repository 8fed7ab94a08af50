"""Legacy tables: read as the kernel has them, written with one commit per table.

No foreign rule is written, and none is decoded: foreign rules are skipped by their bytes (entries.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import time
from collections.abc import Sequence
from typing import Any, Final

from nfq_agent.host.unreadable import unreadable
from nfq_agent.host.xtables.entries import FAMILY_NAMES, EntryCodec, plain
from nfq_agent.host.xtables.image import Image, version
from nfq_agent.rules.diff import Busy, Change, Delete, DropChain, Insert, NewChain
from nfq_agent.rules.model import Family, Installed, Rule, RuleError, TableState, own_chains, tag_prefix

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
        module = iptc.ip4tc if inet else iptc.ip6tc
        self._chains = frozenset(os.fsencode(name) for name in own_chains(instance))
        self._tag = tag_prefix(instance).encode()
        self._codec = EntryCodec(iptc, family, instance)
        self._names = tables
        self._tables: dict[str, Any] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        self._deadline = time.monotonic() + _PATIENCE
        self._bind(module._libiptc, "iptc" if inet else "ip6tc")

    def _bind(self, library: ctypes.CDLL, prefix: str) -> None:
        """Walks as libiptc does, with plain addresses: an object for each entry would take seconds."""

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
            raise unreadable(f"table {table} ({self._family})", error) from error

    def _state(self, table: str) -> TableState:
        image = self._image(table)
        self._versions[table] = image.version
        chains: dict[str, list[Installed]] = {os.fsdecode(name): [] for name in image.chains if name in self._chains}
        jumps: list[Installed] = []
        known_jumps: dict[bytes, int] = {}
        for entry in image.entries(self._chains, self._tag):
            own = entry.chain in self._chains
            if not own and not self._codec.is_tagged(entry.data):
                continue
            if entry.jump is not None and entry.jump in self._chains:
                known_jumps[entry.jump] = known_jumps.get(entry.jump, 0) + 1
            (chains[os.fsdecode(entry.chain)] if own else jumps).append(self._codec.installed(entry))
        referenced = {name for name in chains if image.references(raw := os.fsencode(name)) > known_jumps.get(raw, 0)}
        return TableState({name: tuple(found) for name, found in chains.items()}, tuple(jumps), frozenset(referenced))

    # Writing

    def build(self, rule: Rule) -> bytes:
        """The entry for a rule. Raises RuleError."""
        return self._codec.build(rule)

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
                        data = self._codec.build(rule)
                        kernel.insert_entry(rule.chain, (ctypes.c_ubyte * len(data)).from_buffer_copy(data), number - 1)
                    case Delete(rule, number):
                        self._expect_ours(table, rule.chain, number)
                        if self._delete_number(os.fsencode(rule.chain), number - 1, handle) != 1:
                            raise self._iptc.IPTCError(f"cannot delete rule {number}: {plain(kernel.strerror())}")
            # libiptc resets policy counters at each commit (TC_COMMIT: COUNTER_MAP_ZEROED) unless they are given. What they
            # count between reading and here, a millisecond or so, is not in it; rules' counters lose nothing.
            for name in map(os.fsdecode, self._open_chains(handle)):
                policy, counters = kernel.get_policy(name)
                if policy is not None:
                    kernel.set_policy(name, policy, counters)
            kernel.commit()
        except self._iptc.IPTCError as error:
            reason = plain(error)
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
            # 1 to 20 ms, at random.
            time.sleep(0.001 + 0.019 * os.urandom(1)[0] / 255)
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
        if not entry or not self._codec.is_tagged_at(entry):
            self._yield(table)
