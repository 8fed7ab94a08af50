"""Rules of others in front of our jump that rewrite the mark bits of `offload`: a packet of ours would come back for ever.

The verdict REPEAT sends a packet through the same table of the same hook again, so only rules of that table matter.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from nfq_agent.config.models import Config
from nfq_agent.rules.model import JUMP, Family, tag

_COMMANDS: Final[dict[Family, str]] = {"inet": "iptables-legacy-save", "inet6": "ip6tables-legacy-save"}
_ALL: Final = 0xFFFFFFFF


def rewriting(config: Config) -> Iterator[str]:
    """Each such rule, as `iptables -S` prints it, with the command and the bits that it rewrites. Raises ElementError."""
    masks: dict[tuple[Family, str, str], int] = {}
    for rule in config.rules.values():
        kept = None if rule.queue is None else config.kept(config.queue[rule.queue])
        for family in rule.families if kept is not None else ():
            for hook in rule.hooks:
                place = family, rule.table_name, hook.upper()
                masks[place] = masks.get(place, 0) | (kept.mask if kept is not None else 0)
    saved = {family: _saved(_COMMANDS[family]) for family in {family for family, _, _ in masks}}
    for (family, table, chain), mask in masks.items():
        for text, bits in in_front(_section(saved[family], table), chain, tag(config.agent.instance, JUMP), mask):
            yield f"{_COMMANDS[family].removesuffix('-save')} -t {table} {text} rewrites the bits {bits:#x}"


def in_front(saved: str, chain: str, jump: str, mask: int) -> list[tuple[str, int]]:
    """The rules that a packet meets before our jump, and that rewrite bits of the mask, with these bits.

    saved: the table as `iptables-save` prints it. chain: where the packet begins. jump: the comment of our jump. All rules of the
    chain count where our jump is not there.
    """
    chains: dict[str, list[str]] = {}
    for line in saved.splitlines():
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
    except ValueError:
        pass
    return 0


def _section(saved: str, table: str) -> str:
    return saved.partition(f"*{table}\n")[2].partition("COMMIT\n")[0]


def _saved(command: str) -> str:
    """All tables that are present; empty if there is no such command. It makes no table present."""
    try:
        done = subprocess.run([command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
