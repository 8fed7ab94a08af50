"""The filter of a confined process, run as the kernel runs it: which calls it allows on each architecture."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from nfq_agent.host.jail.assembler import ALLOW, ERRNO, KILL_PROCESS, assemble, within
from nfq_agent.host.jail.calls import ProcessNeeds, filter_of, rules
from nfq_agent.host.jail.fixed import BOTTOM
from nfq_agent.host.jail.syscalls import ARCHITECTURES, Architecture

HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+) (\d+)$"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+) (\d+)$"),
}
REFUSED = ERRNO | 1
HIGH = 0x7F12_3456_7000
NEEDS = ProcessNeeds(sends=((frozenset((9, 8)), (BOTTOM, BOTTOM + 640, 64)), (frozenset((7,)), (BOTTOM + 640, BOTTOM + 704, 64))))


def run(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the filter answers; every path must end in a return."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *(*arguments, *([0] * (6 - len(arguments)))))
    steps = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        code, true, false, value = steps[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x54:
                accumulator &= value
            case 0x05:
                at += value
            case 0x06:
                return int(value)
            case _:
                holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}
                at += true if holds.get(code, bool(accumulator & value)) else false


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_numbers_are_those_of_the_headers(name: str) -> None:
    path, pattern = HEADERS[name]
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    defined = {found[1]: int(found[2]) for line in path.read_text().splitlines() if (found := re.match(pattern, line))}
    defined |= {"newfstatat": defined.get("newfstatat", defined.get("fstatat", -1))}
    assert {call: defined.get(call) for call in ARCHITECTURES[name].numbers} == dict(ARCHITECTURES[name].numbers)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
@pytest.mark.parametrize(
    ("call", "arguments", "allowed"),
    [
        ("recvfrom", (9,), True),
        ("sendmsg", (9, BOTTOM), True),
        ("sendmsg", (9, BOTTOM + 576), True),
        ("sendmsg", (9, BOTTOM + 8), False),
        ("sendmsg", (9, BOTTOM + 640), False),
        ("sendmsg", (7, BOTTOM + 640), True),
        ("sendmsg", (7, BOTTOM), False),
        ("sendmsg", (3, BOTTOM), False),
        ("sendmsg", (9, BOTTOM + (1 << 32)), False),
        ("sendmsg", (3, HIGH), False),
        ("sendto", (3, HIGH, 10), True),
        ("sendto", (9, HIGH, 10), False),
        ("sendto", (9 | 1 << 32, HIGH, 10), False),
        ("write", (2, HIGH, 10), True),
        ("write", (8, HIGH, 10), False),
        ("openat", (-100 & 0xFFFFFFFF, HIGH, 0o2000000), True),
        ("openat", (-100 & 0xFFFFFFFF, HIGH, 0o1), False),
        ("openat", (-100 & 0xFFFFFFFF, HIGH, 0o100), False),
        ("mmap", (0, 4096, 3, 0x22), True),
        ("mmap", (0, 4096, 4, 0x22), False),
        ("mmap", (0, 1 << 40, 3, 0x32), False),
        ("mmap", (BOTTOM, 4096, 3, 0x32), False),
        ("mmap", (HIGH, 4096, 3, 0x32), True),
        ("mprotect", (BOTTOM, 4096, 3), False),
        ("munmap", (4096, BOTTOM), False),
        ("munmap", (HIGH, 4096), True),
        ("mremap", (HIGH, 4096, 8192, 1), True),
        ("mremap", (HIGH, 4096, 8192, 3, BOTTOM), False),
        ("prlimit64", (0, 7, 0, HIGH), True),
        ("prlimit64", (0, 7, HIGH, 0), False),
        ("fcntl", (9, 0), False),
        ("fcntl", (9, 3), True),
        ("ioctl", (0, 0x8910), True),
        ("ioctl", (0, 0x8914), False),
        ("getsockopt", (9, 1, 55), True),
        ("getsockopt", (9, 0, 64), False),
        ("socket", (2, 1), False),
        ("clone", (0x10000,), False),
        ("execve", (), False),
        ("seccomp", (), False),
    ],
)
def test_what_is_allowed(architecture: Architecture, call: str, arguments: tuple[int, ...], allowed: bool) -> None:
    program = filter_of(architecture, NEEDS)
    found = run(program, architecture.audit, architecture.numbers[call], *arguments)
    assert found == (ALLOW if allowed else REFUSED)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_what_is_not_named_is_refused(architecture: Architecture) -> None:
    program = filter_of(architecture, NEEDS)
    named = {architecture.numbers[name] for name in rules(NEEDS) if name in architecture.numbers}
    for number in set(range(600)) - named:
        assert run(program, architecture.audit, number) == REFUSED


def test_foreign_calls_end_the_process() -> None:
    one, other = ARCHITECTURES["x86_64"], ARCHITECTURES["aarch64"]
    program = filter_of(one, NEEDS)
    assert run(program, other.audit, 0) == KILL_PROCESS
    # int 0x80 has the architecture i386; x32 has numbers of its own.
    assert run(program, 0x40000003, 0) == KILL_PROCESS
    assert run(program, one.audit, 0x40000000) == KILL_PROCESS


def test_exemptions() -> None:
    one = ARCHITECTURES["x86_64"]

    def answers(needs: ProcessNeeds, call: str, *arguments: int, held: tuple[int, ...] = ()) -> bool:
        return run(filter_of(one, needs, held), one.audit, one.numbers[call], *arguments) == ALLOW

    threads = ProcessNeeds(threads=True)
    assert answers(threads, "clone", 0x3D0F00)
    assert not answers(threads, "clone", 0x1200011)
    assert not answers(threads, "clone", 0x3D0F00 | 0x10000000)
    # ENOSYS: the C library uses clone(2) then.
    assert run(filter_of(one, threads), one.audit, one.numbers["clone3"]) == ERRNO | 38
    writes = ProcessNeeds(writes=("/var/lib/x",))
    assert answers(writes, "openat", 0, 0, 0o101)
    assert answers(writes, "unlinkat")
    # A file that an element opens later; not memory that the supervisor has mapped, too.
    shares = ProcessNeeds(writes=("/var/lib/x",), open_now=frozenset((9, 10)))
    assert answers(shares, "ftruncate", 11)
    assert [answers(shares, call, 9) for call in ("ftruncate", "fallocate")] == [False, False]
    assert not answers(ProcessNeeds(), "ftruncate", 11)
    connects = ProcessNeeds(connects=True, sets=((6, 1),))
    assert answers(connects, "socket", 2, 1 | 0o4000)
    assert not answers(connects, "socket", 2, 2)
    assert not answers(connects, "socket", 16, 3)
    assert answers(connects, "connect", 20, held=(3,))
    assert not answers(connects, "connect", 3, held=(3,))
    assert answers(connects, "setsockopt", 20, 6, 1)
    # IPT_SO_SET_REPLACE
    assert not answers(connects, "setsockopt", 20, 0, 64)
    assert not answers(connects, "setsockopt", 20, 41, 64)


def test_a_rule_that_is_longer_than_a_jump() -> None:
    one = ARCHITECTURES["x86_64"]
    many = [within(1, BOTTOM + number * 128, BOTTOM + number * 128 + 64, 64) for number in range(50)]
    program = assemble(one.audit, {46: many, 0: [()]})
    assert run(program, one.audit, 46, 0, BOTTOM + 49 * 128) == ALLOW
    assert run(program, one.audit, 46, 0, BOTTOM + 64) == REFUSED
    assert run(program, one.audit, 0) == ALLOW


def test_a_region_does_not_cross_a_border() -> None:
    with pytest.raises(ValueError, match="crosses"):
        within(0, 0xFFFF_FFC0, 0x1_0000_0040, 64)
