"""Which system calls a process may make once it is confined. Pure: its needs come in, rules for the filter go out.

An allow-list: a call that is not named here fails with EPERM, as if a capability were missing. So an element that asks for too
much fails alone: its error is counted, its packet gets on_error, and the worker continues. (A killed worker would cost the
packets that it has read.) Only calls of a foreign calling convention, which no honest program makes, end the process.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Final

from nfq_agent.host.jail.assembler import (
    CallRule,
    assemble,
    high_above,
    is_null,
    low_is,
    low_is_not,
    none_of,
    within,
)
from nfq_agent.host.jail.fixed import BOTTOM
from nfq_agent.host.jail.syscalls import Architecture

# Sockets, and where the headers are of the fixed messages that alone may be sent on them (FixedMessages.headers).
Sends = tuple[tuple[frozenset[int], tuple[int, int, int]], ...]


@dataclass(frozen=True, slots=True)
class ProcessNeeds:
    """What a process needs beyond reading, waiting and answering on what it has open.

    sends: its fixed messages. many: sockets on which sendmmsg(2) is needed. maps: it changes entries of BPF maps. socket_options,
    getsockopt: (level, name) pairs. reads, writes: files or folders. children: it ends and reaps children that it has a pidfd
    of. receives: it is handed packet sockets, which it may only read. open_now: everything else that is open at its confinement;
    such a process writes to nothing else.
    """

    sends: Sends = ()
    many: frozenset[int] = frozenset()
    maps: bool = False
    connects: bool = False
    accepts: bool = False
    binds: bool = False
    datagrams: bool = False
    threads: bool = False
    children: bool = False
    receives: bool = False
    open_now: frozenset[int] = frozenset()
    sets: tuple[tuple[int, int], ...] = ()
    gets: tuple[tuple[int, int], ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def fixed(self) -> frozenset[int]:
        """The sockets on which fixed messages alone may be sent."""
        return frozenset[int]().union(*(sockets for sockets, _ in self.sends))

    def __or__(self, other: ProcessNeeds) -> ProcessNeeds:
        """The union of both."""
        return ProcessNeeds(
            **{
                each.name: getattr(self, each.name) | getattr(other, each.name)
                if isinstance(getattr(self, each.name), (bool, frozenset))
                else getattr(self, each.name) + getattr(other, each.name)
                for each in fields(self)
            }
        )


# Without side effects outside the process, or on descriptors that it has.
_ALWAYS: Final = (
    "recvfrom", "recvmsg", "recvmmsg", "read", "readv", "pread64", "poll", "ppoll", "epoll_wait", "epoll_pwait", "epoll_pwait2",
    "epoll_ctl", "epoll_create1", "eventfd2", "select", "pselect6", "futex", "clock_gettime", "timer_settime", "timer_gettime",
    "close", "fstat", "newfstatat", "stat", "lstat", "statx", "lseek", "getdents64", "getcwd", "readlink", "readlinkat", "access",
    "faccessat", "faccessat2", "brk", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall",
    "nanosleep", "clock_nanosleep", "clock_getres", "gettimeofday", "time", "times", "getpid", "gettid", "getppid", "getuid",
    "getgid", "geteuid", "getegid", "getrlimit", "getrusage", "getrandom", "getcpu", "sched_yield", "sched_getaffinity",
    "sysinfo", "uname", "umask", "membarrier", "getsockname", "getpeername", "shutdown", "exit", "exit_group",
)  # fmt: skip
# asm-generic/fcntl.h: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND, and the bit that O_TMPFILE has of its own.
_WRITING: Final = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
# sys/mman.h
_PROT_EXEC: Final = 4
_MAP_FIXED: Final = 0x10
_MREMAP_FIXED_OR_DONTUNMAP: Final = 2 | 4
# asm-generic/ioctls.h, linux/sockios.h: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, SIOCGIFNAME.
_IOCTLS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5451, 0x8910)
# F_GETFD, F_SETFD, F_GETFL, F_SETFL. Not F_DUPFD: a copy of the queue's socket would have another number.
_FCNTLS: Final = (1, 2, 3, 4)
SOL_SOCKET: Final = 1
_AF_INET: Final = (2, 10)
_SOCK_STREAM: Final = 1
_SOCK_DGRAM: Final = 2
_SOCK_TYPE: Final = 0xF
# linux/sched.h: CLONE_THREAD, and all flags that make a namespace.
_CLONE_THREAD: Final = 0x10000
_CLONE_NEW: Final = 0x7E020080
# BPF_MAP_LOOKUP_ELEM, BPF_MAP_UPDATE_ELEM, BPF_MAP_DELETE_ELEM, BPF_MAP_UPDATE_BATCH
_MAP_ENTRIES: Final = (1, 2, 3, 26)
_WRITES: Final = (
    "openat", "open", "unlink", "unlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "fsync", "fdatasync",
    "flock",
)  # fmt: skip


def rules(needs: ProcessNeeds, held: Iterable[int] = ()) -> dict[str, list[CallRule]]:
    """Rules by the names of the calls. held: sockets that are open now; what is allowed on new ones excludes them."""
    found: dict[str, list[CallRule]] = {name: [()] for name in _ALWAYS}
    not_fixed = tuple(low_is_not(0, descriptor) for descriptor in sorted(needs.fixed))
    for name in ("write", "writev", "pwrite64", "sendto"):
        found[name] = [not_fixed]
    if needs.receives:
        _only_what_is_open(found, needs)
    # Each message on its own sockets: what is a question to one protocol of netlink may be an order to another.
    found["sendmsg"] = [
        (low_is(0, descriptor), *within(1, *headers)) for sockets, headers in needs.sends for descriptor in sorted(sockets)
    ]
    found["sendmmsg"] = [(low_is(0, descriptor),) for descriptor in sorted(needs.many)]
    _memory(found)
    found["openat"] = [(none_of(2, _WRITING),)]
    found["open"] = [(none_of(1, _WRITING),)]
    found["ioctl"] = [(low_is(1, request),) for request in _IOCTLS]
    found["fcntl"] = [(low_is(1, command),) for command in _FCNTLS]
    # Limits are read, not set.
    found["prlimit64"] = [is_null(2)]
    found["getsockopt"] = [(low_is(1, SOL_SOCKET),), *_options(needs.gets)]
    _network(found, needs, tuple(low_is_not(0, descriptor) for descriptor in sorted(held)))
    if needs.maps:
        found["bpf"] = [(low_is(0, command),) for command in _MAP_ENTRIES]
    if needs.threads:
        found["clone"] = [(low_is(0, _CLONE_THREAD, _CLONE_THREAD), none_of(0, _CLONE_NEW))]
        found |= {name: [()] for name in ("set_robust_list", "rseq")}
    if needs.children:
        found |= {name: [()] for name in ("wait4", "waitid", "pidfd_send_signal")}
    if needs.writes:
        # Landlock decides which files.
        found |= {name: [()] for name in _WRITES}
        # Not of memory that it shares with the supervisor: a process that touches a page behind the new end gets SIGBUS.
        later = tuple(low_is_not(0, descriptor) for descriptor in sorted(needs.open_now))
        found |= {name: [later] for name in ("ftruncate", "fallocate")}
    return found


def _only_what_is_open(found: dict[str, list[CallRule]], needs: ProcessNeeds) -> None:
    """Nothing is sent on a descriptor that comes later; no open descriptor is closed, so that its number is not used again."""
    mine: list[CallRule] = [(low_is(0, descriptor),) for descriptor in sorted(needs.open_now)]
    # A file that an element opens later comes in by a number of the same kind: then write(2) cannot be told apart.
    found["sendto"] = mine
    if not needs.writes:
        found["write"] = found["writev"] = mine
    found["close"] = [tuple(low_is_not(0, descriptor) for descriptor in sorted(needs.open_now))]


def _memory(found: dict[str, list[CallRule]]) -> None:
    """No new code, and no change of the memory that holds fixed messages: everything else is at higher addresses."""
    no_code, above = none_of(2, _PROT_EXEC), high_above(0, BOTTOM >> 32)
    found["mmap"] = [(no_code, *is_null(0), none_of(3, _MAP_FIXED)), (no_code, above)]
    found["mprotect"] = [(no_code, above)]
    found["munmap"] = found["madvise"] = [(above,)]
    found["mremap"] = [(above, none_of(3, _MREMAP_FIXED_OR_DONTUNMAP))]


def _network(found: dict[str, list[CallRule]], needs: ProcessNeeds, new: CallRule) -> None:
    """New sockets: IPv4 and IPv6 alone."""
    kinds = ([_SOCK_STREAM] if needs.connects else []) + ([_SOCK_DGRAM] if needs.datagrams else [])
    found["socket"] = [(low_is(0, family), low_is(1, kind, _SOCK_TYPE)) for family in _AF_INET for kind in kinds]
    if kinds:
        found["connect"] = [new]
    if needs.datagrams:
        # Names are asked for with sendmmsg(2).
        found["sendmmsg"].append(new)
        found["sendmsg"].append(new)
    if needs.binds:
        found["bind"] = [new]
    if needs.accepts:
        found["accept4"] = found["accept"] = [()]
    found["setsockopt"] = [(*rule, *new) for rule in _options(needs.sets)]


def _options(pairs: Iterable[tuple[int, int]]) -> list[CallRule]:
    return [(low_is(1, level), low_is(2, name)) for level, name in pairs]


def filter_of(architecture: Architecture, needs: ProcessNeeds, held: Iterable[int] = ()) -> bytes:
    """The filter's instructions for a process on this architecture."""
    allowed: Mapping[str, list[CallRule]] = rules(needs, held)
    numbers = architecture.numbers
    # The C library falls back to clone(2), of which the filter sees the flags.
    errors = [(numbers["clone3"], errno.ENOSYS)] if needs.threads else []
    known = {numbers[name]: alternatives for name, alternatives in allowed.items() if name in numbers and alternatives}
    return assemble(architecture.audit, known, errors, errno.EPERM, architecture.foreign_from)
