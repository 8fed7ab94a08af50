"""The text of `status`: tables that fit a terminal of 60 columns or more, also with counters of ten digits."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from nfq_agent.cli.show import console, prose
from nfq_agent.counters import INLINE_COUNTERS, TAP_COUNTERS
from nfq_agent.rules.model import Rule, instance_of
from nfq_agent.service.status import (
    ConfinementStatus,
    DecisionStatus,
    DriftStatus,
    InlineStatus,
    InterfaceStatus,
    OffloadStatus,
    ProxyStatus,
    QueueStatus,
    RuleStatus,
    Status,
    TapStatus,
    TrialStatus,
    WorkerStatus,
)
from nfq_agent.values import duration_text, size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


# Rules of one queue that are listed.
_LISTED: Final = 12
# The first counters of an interface are shown also when they are 0, the others are not.
_ALWAYS: Final = 3


def status(report: Status, running: Iterable[Status], now: float) -> None:
    """The running agent. running: the agents of other instances. now: seconds since the epoch."""
    out = console()
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report.since))
    out.print(f"Instance {report.instance}: {report.state}, version {report.version}, {report.backend} backend", markup=False)
    out.print(f"pid {report.pid}, up {_up(report, now)}, since {since}", markup=False)
    if report.trial is not None:
        out.print(_trial(report.trial), markup=False, style="yellow")
    for queue in report.queues:
        _queue(out, queue)
    for proxy in report.proxies:
        _proxy(out, proxy)
    for tap in report.taps:
        _tap(out, tap)
    for inline in report.inlines:
        _inline(out, inline)
    out.print("\nRules (`nfq-agent rules` shows their full text)", style="bold")
    _rules(out, report.rules)
    if report.offloaded != OffloadStatus():
        offloaded = report.offloaded
        out.print(
            f"Offloaded flows: {offloaded.decided} packets with a verdict for their flow; the kernel accepted "
            f"{offloaded.accepted} and dropped {offloaded.denied}",
            markup=False,
        )
    drift = report.drift
    last = "" if drift.last is None else f", last at {time.strftime('%H:%M:%S', time.localtime(drift.last))}"
    every = f"checked every {duration_text(drift.check)}" if drift.check else "not checked"
    if drift.pause > drift.check:
        every += f", the next in {duration_text(drift.pause)} at most, since another program changes the rules again and again"
    out.print(f"Drift: {drift.repairs} repair{'s' * (drift.repairs != 1)}{last}; {every}", markup=False)
    _rule_state(out, drift)
    for line in drift.waiting:
        out.print(f"Rules: {line}", markup=False, style="yellow")
    for each in report.bypasses:
        count = "an unknown number of" if each.count is None else f"{each.count:.12g}"
        out.print(f"Uninspected: {count} {each.unit}: {each.text}", markup=False, style="yellow")
    _confinement(out, report.confinement)
    if report.log_lines_lost:
        out.print(f"Log: {report.log_lines_lost} lines lost", markup=False)
    others(running, now)


def _trial(trial: TrialStatus) -> str:
    left = f"{trial.left:.0f} s"
    if trial.kind == "faults":
        faults = " ".join(f"{key}={value}" for key, value in trial.faults.items())
        return f"Faults: queue {trial.queue}, {faults}; they end in {left}, or by `nfq-agent chaos off`"
    return f"A reload waits for `nfq-agent confirm`; it is taken back in {left}"


def _rule_state(out: Console, drift: DriftStatus) -> None:
    if drift.unreadable:
        out.print(f"Rules: cannot be read: {drift.unreadable}", markup=False, style="red")
    elif drift.wrong:
        text = f"Rules: {len(drift.wrong)} are not as configured (+ is missing, - is too much):"
        out.print("\n  ".join((text, *drift.wrong)), markup=False, style="red")


def others(running: Iterable[Status], now: float) -> None:
    """A line for each running agent of another instance."""
    for other in running:
        prose(f"Also running: instance {other.instance}, version {other.version}, pid {other.pid}, up {_up(other, now)}", 2)


def _confinement(out: Console, confinement: ConfinementStatus) -> None:
    by = " and ".join(confinement.by) or "nothing but their user and capabilities"
    out.print(f"Workers are confined by {by}", markup=False)
    for what in confinement.missing:
        out.print(f"  missing: {what}", markup=False)
    for exempt in confinement.exemptions:
        out.print(f"  exempt: {exempt}", markup=False)


def _up(report: Status, now: float) -> str:
    seconds = int(report.uptime(now))
    parts = ((seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s"))
    shown = [f"{count} {unit}" for count, unit in parts if count][:2]
    return " ".join(shown) or "0 s"


def _tap(out: Console, tap: TapStatus) -> None:
    out.print(f"\nTap {tap.name}: {tap.snap} bytes of each packet, pid {tap.pid or '-'}", style="bold", markup=False)
    for each in (*tap.interfaces, InterfaceStatus("all so far", 0, None, tap.counters)):
        _interface(out, each, tuple(TAP_COUNTERS))
    _decisions(out, tap.decisions)


def _interface(out: Console, each: InterfaceStatus, counters: Sequence[str]) -> None:
    name = each.name if each.container is None else f"{each.name} (container {each.container})"
    shown = (
        f"{each.counters[counter]} {counter.replace('_', ' ')}"
        for place, counter in enumerate(counters)
        if each.counters[counter] or place < _ALWAYS
    )
    text = f"{name}: {', '.join(shown)}"
    wrapped = textwrap.fill(
        text, out.width, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    out.print(wrapped, markup=False)


def _inline(out: Console, inline: InlineStatus) -> None:
    title = (
        f"\nInline {inline.name}: {inline.mode}, lost {inline.lost}, hidden interfaces {inline.hidden}, pid {inline.pid or '-'}"
    )
    out.print(title, style="bold", markup=False)
    for each in (*inline.interfaces, InterfaceStatus("all so far", 0, None, inline.counters)):
        _interface(out, each, tuple(INLINE_COUNTERS))
    _decisions(out, inline.decisions)


def _queue(out: Console, queue: QueueStatus) -> None:
    force = queue.in_force
    flags = [] if force is None else ["fail_open"] * force.fail_open + ["gso"] * force.gso
    flags += ["bypass"] * queue.bypass
    settings = "not bound" if force is None else f"copy {force.copy} {force.copy_range}, length {force.max_len}"
    out.print(f"\nQueue {queue.name}: {queue.mode}, {settings}, {' '.join(flags)}", style="bold", markup=False)
    verdicts = ("num", "judged", "accepted", "dropped", "errors")
    process = ("per second", "waiting", "pid", "memory")
    rows = [(_verdicts(worker), _process(worker)) for worker in queue.workers]
    whole = _table((*verdicts, *process), [(*left, *right) for left, right in rows])
    if _fits(out, whole):
        out.print(whole)
    else:
        out.print(_table(verdicts, [left for left, _ in rows]))
        out.print(_table(("num", *process), [(left[0], *right) for left, right in rows]))
    _decisions(out, queue.decisions)
    out.print(
        f"kernel drops {_known(queue.kernel_dropped)}, user drops {_known(queue.user_dropped)}, "
        f"uninspected {_known(queue.uninspected)}, would-drops of monitor mode {queue.would_drop}",
        markup=False,
    )
    if queue.not_compiled:
        out.print(f"not compiled: {queue.not_compiled}", markup=False)


def _decisions(out: Console, decisions: Sequence[DecisionStatus]) -> None:
    """The rules and elements that decided, the most frequent first. Elements without decisions are in the JSON only; rules
    without are listed, since they may be superfluous.
    """
    shown = [each for each in decisions if each.count or each.in_kernel or each.rule.startswith("rule ")]
    if not shown:
        return
    out.print("Decisions by rule:")
    ranked = sorted(shown, key=lambda each: -each.count)
    width = len(str(ranked[0].count))
    for each in ranked[:_LISTED]:
        what = f"{each.element}: {each.rule}" if each.element else each.rule
        what += f", and {each.in_kernel} packets in the kernel" if each.in_kernel else ""
        out.print(f"  {each.count:>{width}} {what}", markup=False, no_wrap=True, overflow="ellipsis")
    if len(ranked) > _LISTED:
        out.print(f"  and {len(ranked) - _LISTED} more; --json has all", markup=False)


def _verdicts(worker: WorkerStatus) -> tuple[str, ...]:
    return (str(worker.number), *(str(worker.counters[name]) for name in ("received", "accepted", "dropped", "errors")))


def _process(worker: WorkerStatus) -> tuple[str, ...]:
    memory = "-" if worker.memory is None else size_text(worker.memory)
    return f"{worker.per_second:.0f}", _known(worker.waiting), str(worker.pid or "-"), memory


def _proxy(out: Console, proxy: ProxyStatus) -> None:
    out.print(f"\nProxy {proxy.name} on {', '.join(proxy.listen)}, pid {proxy.pid or '-'}", style="bold", markup=False)
    out.print(", ".join(f"{name} {value}" for name, value in proxy.counters.items()), markup=False)


def _rules(out: Console, rules: Sequence[RuleStatus]) -> None:
    # A long list of ports takes many rules of xtables, which differ in the ports alone.
    alike: dict[tuple[str, ...], list[RuleStatus]] = {}
    for rule in rules:
        parsed = Rule.parse(rule.rule)
        name, hook = parsed.tag.rpartition(":")[2], parsed.chain.rpartition("-")[2]
        alike.setdefault((rule.family, rule.table, hook, name, _target(parsed)), []).append(rule)
    rows = []
    for (*where, target), found in alike.items():
        packets, size = (str(sum(counts)) for counts in zip(*((each.packets, each.bytes) for each in found), strict=True))
        rows.append((packets, size, *where, target if len(found) == 1 else f"{target} ({len(found)} rules)"))
    whole = _table(("packets", "bytes", "family", "table", "hook", "rule", "target"), rows, right=2)
    if _fits(out, whole):
        out.print(whole)
        return
    for packets, size, family, table, hook, name, target in rows:
        out.print(f"{name}: {target}", markup=False)
        out.print(f"  {family} {table} {hook}: {packets} packets, {size} bytes", markup=False)


def _target(rule: Rule) -> str:
    numbers = rule.queues
    if len(numbers) > 1:
        return f"queues {numbers[0]} to {numbers[-1]}"
    if numbers:
        return f"queue {numbers[0]}"
    return "own chain" if instance_of(rule.target.name) else rule.target.name or "counts only"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: int | None = None) -> Table:
    """right: how many columns are numbers, from the left; all of them by default."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if right is None or place < right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _fits(out: Console, table: Table) -> bool:
    """Whether all columns are shown whole."""
    # Measured without the terminal's limit, since rich would shorten what does not fit.
    wide = out.options.update(max_width=10_000)
    return out.measure(table, options=wide).maximum <= out.width


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)
