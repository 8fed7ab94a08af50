"""The system user, and how a process becomes that user with no more capabilities than it needs."""

from __future__ import annotations

import ctypes
import os
import pwd
import struct
from typing import Final, NamedTuple

CAP_NET_ADMIN: Final = 12
CAP_NET_RAW: Final = 13
CAP_SYS_PTRACE: Final = 19
# The capabilities that root needs to become another user.
_TO_BECOME: Final = {6: "CAP_SETGID", 7: "CAP_SETUID"}
_CAP_LAST: Final = 63
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
# linux/capability.h: version 3 has two 32-bit words for each set.
_CAP_VERSION: Final = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


class User(NamedTuple):
    """A user of the host by numbers."""

    uid: int
    gid: int


class UserError(Exception):
    """The system user is missing and cannot be created, or a process cannot become it."""


def find_user(name: str) -> User | None:
    """The user, or None where there is none."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return User(entry.pw_uid, entry.pw_gid)


def ensure_user(name: str) -> tuple[User, bool]:
    """The user and whether it was created: a system account with no home and no login. Raises UserError."""
    if user := find_user(name):
        return user, False
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir=/nonexistent",
               "--shell=/usr/sbin/nologin", "--comment=nfq-agent", name]  # fmt: skip
    # Loaded only here: most hosts have the user.
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"the system user {name} is missing and cannot be created: useradd: {error.strerror}") from error
    # Another instance may have created it; it only has to exist.
    if user := find_user(name):
        return user, done.returncode == 0
    reason = done.stderr.strip() or f"useradd ended with {done.returncode}"
    raise UserError(f"the system user {name} is missing and cannot be created: {reason}; create it, or start as root")


def worker_user(name: str) -> tuple[User, bool]:
    """The user as whom workers run, and whether it was created. Raises UserError, also if this process cannot become it."""
    user, made = ensure_user(name)
    _check_may_become(user)
    return user, made


def _check_may_become(user: User) -> None:
    if os.geteuid() not in (0, user.uid):
        raise UserError(f"running as uid {os.geteuid()}, which cannot become uid {user.uid}; start as root or as that user")
    lacking = [name for number, name in _TO_BECOME.items() if not has_capability(number)]
    if os.geteuid() == 0 and lacking:
        raise UserError(
            f"running as root without {' and '.join(lacking)}: no worker can become uid {user.uid}; add to the capabilities, or "
            "start as that user with CAP_NET_ADMIN alone"
        )


def capabilities() -> int:
    """The effective capabilities of this process as a bit set (CapEff of proc(5))."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def has_capability(number: int) -> bool:
    """Whether this process may use a capability."""
    return bool(capabilities() >> number & 1)


def use_permitted() -> None:
    """Make effective every capability that this process may have (capabilities(7)).

    The file of Python in the container image permits some to a user other than root and makes none effective: a program
    that could not get all of them would not start. Raises OSError if the kernel refuses.
    """
    effective, permitted, inheritable, *above = _capabilities()
    if (effective, above[0]) != (permitted, above[1]):
        _set_capabilities((permitted, permitted, inheritable, above[1], above[1], above[2]))


def become(user: User, keep: tuple[int, ...] = (CAP_NET_ADMIN,)) -> None:
    """Make this process run as `user` with the capabilities `keep` alone; this cannot be undone. It must have one thread.

    As root it changes the user and empties the bounding set; as that user already it only gives capabilities up. Raises
    UserError if it is neither, OSError if the kernel refuses. Source: capabilities(7), prctl(2), capset(2).
    """
    _check_may_become(user)
    mask = sum(1 << number for number in keep)
    if os.geteuid() == 0:
        for number in range(_CAP_LAST):
            # EINVAL: above the last one that this kernel knows.
            if number not in keep and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
                break
        _prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        _prctl(_PR_SET_KEEPCAPS, 0)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    effective, permitted, inheritable, *above = _capabilities()
    # Where no capability is dropped, a sandbox may refuse capset(2). What is inheritable has no effect then: no program gains a
    # capability by it after PR_SET_NO_NEW_PRIVS.
    if (effective, permitted, *above[:2]) != (low, low, high, high) or inheritable & ~low or above[2] & ~high:
        _set_capabilities((low, low, 0, high, high, 0))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _capabilities() -> tuple[int, ...]:
    """Effective, permitted and inheritable, the lower words of all before the upper ones (capget(2))."""
    found = ctypes.create_string_buffer(24)
    if _libc.capget(struct.pack("Ii", _CAP_VERSION, 0), found) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    return struct.unpack("6I", found.raw)


def _set_capabilities(words: tuple[int, ...]) -> None:
    if _libc.capset(struct.pack("Ii", _CAP_VERSION, 0), struct.pack("6I", *words)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")
