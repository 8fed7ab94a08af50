"""Traffic that passed without a verdict of ours: its causes, each with a figure, and the line in the log that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from nfq_agent.log import Log
from nfq_agent.rules.foreign import InFront
from nfq_agent.service.group_watch import ADVICE
from nfq_agent.service.meter import Meter, ProxyPort
from nfq_agent.service.status import BypassStatus, DriftStatus, ProxyStatus, QueueStatus

# A retransmitted SYN counts again in table mangle, and the proxy may not have counted the latest connections yet.
_MORE_THAN: Final = 2
_SLACK: Final = 10
_PART: Final = 0.25
# Seconds between two lines of the log.
_EVERY: Final = 60.0
_QUEUE_ADVICE: Final = "more numbers (balance) or a longer max_len; fail_open = false drops instead"


def bypasses(
    queues: Iterable[QueueStatus], proxies: Iterable[ProxyStatus], drift: DriftStatus, in_front: Iterable[InFront], meter: Meter
) -> tuple[BypassStatus, ...]:
    """One for each cause since the start."""
    return (*_queues(queues), *_away(drift), *_late(drift), *_in_front(in_front, meter), *_proxies(proxies, meter))


def _queues(queues: Iterable[QueueStatus]) -> Iterator[BypassStatus]:
    for queue in queues:
        if queue.uninspected != 0:
            text = f"queue {queue.name}: the queue was full, or no process was bound, and the packets passed"
            if queue.uninspected is None:
                text = f"queue {queue.name}: the kernel's figures cannot be read, so it is unknown how much passed"
            yield BypassStatus("queue", queue.name, queue.uninspected, "packets", text, _QUEUE_ADVICE)


def _away(drift: DriftStatus) -> Iterator[BypassStatus]:
    if drift.away or drift.unreadable:
        now = ", and still are not" if drift.away_since is not None else ""
        yield BypassStatus(
            "rules-away",
            "",
            None if drift.unreadable else round(drift.away, 3),
            "seconds",
            f"rules were not in force{now}; what passed meanwhile is not counted"
            if not drift.unreadable
            else f"the rules cannot be read, so it is unknown whether they are in force: {drift.unreadable}",
            'find the program that changes them, or use backend = "owned", whose rules no other program can change',
        )


def _late(drift: DriftStatus) -> Iterator[BypassStatus]:
    for path, seconds in drift.late.items():
        yield BypassStatus(
            "cgroup-late",
            path,
            round(seconds, 3),
            "seconds",
            f"the control group {path} existed so long before its rules were in; what its sockets sent meanwhile is not counted",
            ADVICE,
        )


def _in_front(found: Iterable[InFront], meter: Meter) -> Iterator[BypassStatus]:
    for each in found:
        count = meter.taken_by(each)
        yield BypassStatus(
            "in-front",
            f"{each.family} {each.table} {each.chain} {each.number}",
            count,
            "packets",
            f"{each.text} is asked before the rules of this agent and may take their packets; some of those that it took may not "
            "be ours",
            f"look at it: {each.command}; delete it or move it behind the jump of this agent",
        )


def _proxies(proxies: Iterable[ProxyStatus], meter: Meter) -> Iterator[BypassStatus]:
    """One finding for each proxy that receives far fewer connections than the rules redirect to it."""
    for proxy in proxies:
        ports = sorted({int(each.rpartition(":")[2]) for each in proxy.listen})
        led, expected = (sum(meter.hits(ProxyPort(port, led=each)) for port in ports) for each in (True, False))
        came = proxy.counters["connections"] + proxy.counters["refused"]
        # Both count a SYN that is sent again, so they differ less than what arrives.
        if expected - led > led * _PART + _SLACK:
            yield BypassStatus(
                "proxy",
                proxy.name,
                expected - led,
                "connections",
                f"proxy {proxy.name}: {expected} connections should have been redirected to it, and {led} were: another NAT of "
                "this host took them first, or they are not tracked",
                'set backend = "owned" in table agent: it is asked before other NAT at the usual priority; `nfq-agent doctor` '
                "names NAT that is asked before it",
            )
        if led > _MORE_THAN * came + _SLACK and not proxy.counters["full"]:
            numbers = ",".join(map(str, ports))
            yield BypassStatus(
                "proxy",
                proxy.name,
                led - came,
                "connections",
                f"proxy {proxy.name}: the rules redirected {led} connections to port {numbers}, and {came} arrived: a firewall "
                "of this host may drop them in INPUT, where they have the proxy's port; or another rule took them; or their "
                "clients are bound to a device (SO_BINDTODEVICE), which keeps them from the proxy on loopback",
                f"accept_input = true in table proxy.{proxy.name}; or iptables -I INPUT -p tcp -m multiport --dports {numbers} "
                "-m conntrack --ctstate DNAT -j ACCEPT (and ip6tables; with capture = tproxy: -m mark --mark TPROXY_MARK)",
            )


class BypassLog:
    """Says in the log when more has passed, at most once a minute."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._said: dict[tuple[str, str], float | None] = {}
        self._next = 0.0

    def say(self, find: Callable[[], Iterable[BypassStatus]], now: float) -> None:
        """find: asked only when a line may be written. now: seconds since any fixed moment."""
        if now < self._next:
            return
        more = [each for each in find() if self._said.get((each.cause, each.name), 0.0) != each.count]
        if not more:
            return
        self._next = now + _EVERY
        self._said.update({(each.cause, each.name): each.count for each in more})
        parts = (
            f"{'an unknown number of' if each.count is None else f'{each.count:.12g}'} {each.unit} ({each.text})" for each in more
        )
        self._log(f"traffic passed uninspected: {'; '.join(parts)}", "warning", event="bypass")
