"""Rules of others in front of our jump that rewrite the mark bits of `offload`: a packet of ours would come back without end.

`doctor` names them beforehand. When a worker met its bound on repeats, the supervisor names them in the log: a worker may
not look at the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from nfq_agent.config.models import Config
from nfq_agent.counters import growth
from nfq_agent.host.xtables.saved import TOOLS, saved
from nfq_agent.log import Log
from nfq_agent.repeats import MOST
from nfq_agent.rules.model import JUMP, Family, tag
from nfq_agent.rules.rewriting import in_front

# Seconds between two lines of the log.
_EVERY: Final = 60.0
# Seconds that the command may take: the agent waits for it.
_SECONDS: Final = 5.0


def rewriting(config: Config) -> Iterator[str]:
    """Each such rule, as `iptables -S` prints it, with the command and the bits that it rewrites. Raises ElementError."""
    masks: dict[tuple[Family, str, str], int] = {}
    for rule in config.rules.values():
        kept = None if rule.queue is None else config.kept(config.queue[rule.queue])
        for family in rule.families if kept is not None else ():
            for hook in rule.hooks:
                place = family, rule.table_name, hook.upper()
                masks[place] = masks.get(place, 0) | (kept.mask if kept is not None else 0)
    texts = {family: saved(family, _SECONDS) for family in {family for family, _, _ in masks}}
    for (family, table, chain), mask in masks.items():
        for text, bits in in_front(texts[family], table, chain, tag(config.agent.instance, JUMP), mask):
            yield f"{TOOLS[family]} -t {table} {text} rewrites the bits {bits:#x}"


class RepeatLog:
    """The warning that names the foreign rule when packets came back without the mark that an element gave them."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._said: dict[int, int] = {}
        self._next = 0.0

    def say(self, unmarked: Mapping[int, int], find: Callable[[], Iterable[str]], now: float) -> None:
        """unmarked: such packets since the start, by queue number. find: asked only if there are new ones. now: in seconds."""
        # A worker that was replaced by a reload counts from zero.
        found = {number: growth(count, self._said.get(number, 0)) for number, count in unmarked.items()}
        new = {number: count for number, count in found.items() if count}
        if not new or now < self._next:
            return
        self._said.update(unmarked)
        self._next = now + _EVERY
        packets = "; ".join(f"queue {number}: {count} packets" for number, count in new.items())
        rules = "; ".join(find())
        cause = f"this rule stands before ours: {rules}; give it a mask that leaves these bits alone"
        if not rules:
            cause = "no rule before ours was found that rewrites it; `nfq-agent doctor` looks again"
        self._log(
            f"{packets} came back {MOST} times after the verdict REPEAT without the mark that an element gave them, and got the "
            f"element's verdict instead: {cause}",
            "warning",
            event="repeats",
        )
