"""Which foreign rules rewrite mark bits in front of our jump, from the text of `iptables-save`. No I/O.

The verdict REPEAT sends a packet through the same table of the same hook again, so only rules of that table matter.
"""

from __future__ import annotations

import shlex
from itertools import pairwise
from typing import Final

_ALL: Final = 0xFFFFFFFF


def in_front(saved: str, table: str, chain: str, jump: str, mask: int) -> list[tuple[str, int]]:
    """The rules that a packet meets before our jump, and that rewrite bits of the mask, with these bits.

    saved: all tables as `iptables-save` prints them. chain: where the packet begins. jump: the comment of our jump. All rules of
    the chain count where our jump is not there.
    """
    chains: dict[str, list[str]] = {}
    for line in _section(saved, table).splitlines():
        if line.startswith("-A "):
            chains.setdefault(line.split()[1], []).append(line)
    found: dict[str, int] = {}
    _walk(chains, chain, jump, mask, found, set())
    return list(found.items())


def _walk(chains: dict[str, list[str]], chain: str, jump: str, mask: int, found: dict[str, int], seen: set[str]) -> None:
    if chain in seen:
        return
    seen.add(chain)
    for line in chains.get(chain, ()):
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        if jump in words:
            return
        if bits := _rewritten(words) & mask:
            found[line] = bits
        for option in ("-j", "-g"):
            if option in words[:-1] and (target := words[words.index(option) + 1]) in chains:
                _walk(chains, target, jump, mask, found, seen)


def _rewritten(words: list[str]) -> int:
    """The bits of a packet's mark that a rule sets or clears."""
    if "-j" not in words[:-1]:
        return 0
    options = words[words.index("-j") + 1 :]
    try:
        if options[0] == "MARK":
            for name, value in pairwise(options):
                if name in ("--set-xmark", "--set-mark"):
                    number, _, mask = value.partition("/")
                    return int(number, 0) | (int(mask, 0) if mask else _ALL)
                if name in ("--or-mark", "--xor-mark"):
                    return int(value, 0)
                if name == "--and-mark":
                    return ~int(value, 0) & _ALL
        elif options[0] == "CONNMARK" and "--restore-mark" in options:
            return int(options[options.index("--nfmask") + 1], 0) if "--nfmask" in options[:-1] else _ALL
        elif options[0] == "HMARK" or (options[0] == "SET" and "--map-mark" in options):
            # What they set follows from the packet, or from the set.
            return _ALL
    except ValueError:
        pass
    return 0


def _section(saved: str, table: str) -> str:
    return saved.partition(f"*{table}\n")[2].partition("COMMIT\n")[0]
