"""Assembles a seccomp filter: which system calls are allowed, with which arguments. Pure: rules in, bytes out.

The filter is a program of classic BPF that the kernel runs for each system call (seccomp(2), linux/filter.h, linux/seccomp.h). It
sees the number, the architecture and the arguments, never what a pointer points to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

ALLOW: Final = 0x7FFF0000
ERRNO: Final = 0x00050000
KILL_PROCESS: Final = 0x80000000

# struct seccomp_data: number, architecture, instruction pointer, six arguments of 64 bits each.
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_ARGUMENTS: Final = 16
# linux/bpf_common.h
_LOAD: Final = 0x20
_AND: Final = 0x54
_EQUAL: Final = 0x15
_GREATER: Final = 0x25
_AT_LEAST: Final = 0x35
_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")
# The longest conditional jump, in instructions.
_FARTHEST: Final = 255
_WORD: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ArgumentTest:
    """One condition on one 32-bit half of an argument. All of a rule's conditions must hold.

    argument: 0 to 5. high: its upper half. mask: bits that are looked at. kind: how they compare with `value`.
    """

    argument: int
    kind: int
    value: int
    high: bool = False
    mask: int = _WORD
    negated: bool = False

    @property
    def cost(self) -> int:
        """Instructions that it takes."""
        return 2 if self.mask == _WORD else 3


def low_is(argument: int, value: int, mask: int = _WORD) -> ArgumentTest:
    """The lower half, masked, has this value. Right for arguments that the kernel takes as an int."""
    return ArgumentTest(argument, _EQUAL, value & _WORD, mask=mask)


def low_is_not(argument: int, value: int) -> ArgumentTest:
    """The lower half does not have this value."""
    return ArgumentTest(argument, _EQUAL, value & _WORD, negated=True)


def none_of(argument: int, bits: int) -> ArgumentTest:
    """None of these bits of the lower half is set."""
    return ArgumentTest(argument, _ANY_BIT, bits, negated=True)


def low_above(argument: int, value: int) -> ArgumentTest:
    """The lower half, without a sign, is greater."""
    return ArgumentTest(argument, _GREATER, value)


def low_at_most(argument: int, value: int) -> ArgumentTest:
    """The lower half, without a sign, is not greater."""
    return ArgumentTest(argument, _GREATER, value, negated=True)


def high_above(argument: int, value: int) -> ArgumentTest:
    """The upper half is greater."""
    return ArgumentTest(argument, _GREATER, value, high=True)


def is_null(argument: int) -> tuple[ArgumentTest, ArgumentTest]:
    """All 64 bits are 0."""
    return ArgumentTest(argument, _EQUAL, 0), ArgumentTest(argument, _EQUAL, 0, high=True)


def within(argument: int, start: int, end: int, align: int) -> tuple[ArgumentTest, ...]:
    """A multiple of `align` from `start` on, and less than `end`. Both have the same upper half."""
    if start >> 32 != (end - 1) >> 32:
        raise ValueError(f"{start:#x} to {end:#x} crosses a border of 4 GiB")
    return (
        ArgumentTest(argument, _EQUAL, start >> 32, high=True),
        ArgumentTest(argument, _AT_LEAST, start & _WORD),
        ArgumentTest(argument, _GREATER, (end - 1) & _WORD, negated=True),
        ArgumentTest(argument, _ANY_BIT, align - 1, negated=True),
    )


# Conditions that hold together. A call is allowed by any one of its rules; by an empty rule always.
CallRule = tuple[ArgumentTest, ...]


def assemble(
    architecture: int,
    rules: Mapping[int, Sequence[CallRule]],
    errors: Iterable[tuple[int, int]] = (),
    refused: int = 1,
    foreign_from: int | None = None,
) -> bytes:
    """The filter's instructions. architecture: AUDIT_ARCH of this kernel; a call of another one ends the process.

    rules: for each number of a system call, its rules; the order is that in which numbers are compared. errors: numbers that
    fail with an errno of their own. refused: the errno of all others. foreign_from: numbers from here on end the process.
    """
    program = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, KILL_PROCESS),
        _step(_LOAD, _NUMBER),
    ]
    if foreign_from is not None:
        program += [_step(_AT_LEAST, foreign_from, 0, 1), _step(_RETURN, KILL_PROCESS)]
    # Those that are always allowed first: one comparison each, and the kernel remembers them.
    for number, alternatives in sorted(rules.items(), key=lambda each: () not in each[1]):
        body = _alternatives(alternatives, refused)
        if len(body) <= _FARTHEST:
            program += [_step(_EQUAL, number, 0, len(body)), *body]
        else:
            # Too far for a conditional jump.
            program += [_step(_EQUAL, number, 1, 0), _step(_JUMP, len(body)), *body]
    for number, error in errors:
        program += [_step(_EQUAL, number, 0, 1), _step(_RETURN, ERRNO | error)]
    program.append(_step(_RETURN, ERRNO | refused))
    return b"".join(program)


_JUMP: Final = 0x05


def _alternatives(alternatives: Sequence[CallRule], refused: int) -> list[bytes]:
    if () in alternatives:
        return [_step(_RETURN, ALLOW)]
    body: list[bytes] = []
    for rule in alternatives:
        body += _rule(rule)
    return [*body, _step(_RETURN, ERRNO | refused)]


def _rule(rule: CallRule) -> list[bytes]:
    """Instructions that allow the call if all hold, and continue behind themselves if one does not."""
    body: list[bytes] = []
    left = sum(test.cost for test in rule) + 1
    for test in rule:
        # Little-endian: the lower half comes first.
        body.append(_step(_LOAD, _ARGUMENTS + 8 * test.argument + 4 * test.high))
        if test.mask != _WORD:
            body.append(_step(_AND, test.mask))
        left -= test.cost
        body.append(_step(test.kind, test.value, left, 0) if test.negated else _step(test.kind, test.value, 0, left))
    body.append(_step(_RETURN, ALLOW))
    return body


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, if_true, if_false, value)
