"""The benchmarks of the packet queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from bed import BUILT, COPIED, HERE, MAX_LEN, QUEUE, Bed, BenchError
from measure import Benchmark, Goal

SECONDS: Final = 1.5
_WARM: Final = 0.3
# iperf3 counts in whole seconds.
_BULK: Final = 2
_FLOWS: Final = 64
FLOOD_PORT: Final = 9999
_PORT: Final = 7000
_NETWORKS: Final = 1000

SERVED: Final = f"[queue.main]\nnum = {QUEUE}\nmax_len = {MAX_LEN}\nfail_open = false\n"
FLOOD_RULE: Final = f"""
[rules.flood]
queue = "main"
family = "inet"
hooks = ["output"]
udp_ports = [{FLOOD_PORT}]
role = "client"
"""
TCP_RULE: Final = f"""
[rules.app]
queue = "main"
family = "inet"
tcp_ports = [{_PORT}]
"""


def policy(behind: str = "", meets: str = "") -> str:
    """Elements of a queue: a five-tuple policy of a thousand networks and ports. meets: what rule 501 asks for instead."""
    keys = [f'dst = ["10.{64 + number // 250}.{number % 250}.0/24"], dport = [{10000 + number}]' for number in range(_NETWORKS)]
    if meets:
        keys[_NETWORKS // 2] = meets
    rules = ",\n".join(f'  {{ action = "drop", protocol = ["tcp", "udp"], {each} }}' for each in keys)
    return f'elements = ["gate"{behind}]\n[element.gate]\ntype = "policy"\ndefault = "accept"\nrule = [\n{rules}\n]\n'


_AUTO: Final = 'busy_poll = "auto"\n'
_OFFLOAD: Final = policy(', "offload"') + '[element.offload]\nmark = "0x4e000000/0xff000000"\n'


def flood(bed: Bed, *cores: int, count: Callable[[], int] | None = None, flows: int = _FLOWS, received: bool = False) -> float:
    """Packets a second under a flood from these processors. count: how many there were so far; without it, verdicts.

    received: they come from the other namespace, and not from this one.
    """
    count = bed.judged if count is None else count
    to, side = ("10.203.0.1", bed.there) if received else ("127.0.0.1", bed.here)
    loads = [bed.begin("flood", to, FLOOD_PORT, flows, SECONDS + 2 * _WARM, core=core, side=side) for core in cores]
    time.sleep(_WARM)
    begin, before = time.monotonic(), count()
    time.sleep(SECONDS)
    end, after = time.monotonic(), count()
    for load in loads:
        load.wait(timeout=20)
    rate = (after - before) / (end - begin)
    if rate < 1000:
        raise BenchError(f"{rate:.0f} a second: the flood does not reach what is measured")
    return rate


def flooded(more: str = "", flows: int = _FLOWS) -> float:
    """Verdicts a second of the agent under the flood."""
    with Bed() as bed:
        bed.agent(SERVED + more + FLOOD_RULE, core=1)
        return flood(bed, 0, flows=flows)


def flooded_through(bed: Bed, flows: int = _FLOWS) -> float:
    """Verdicts a second under the flood, of what serves the queue already."""
    bed.here.shell(f"iptables-legacy -t mangle -A OUTPUT -p udp --dport {FLOOD_PORT} -j NFQUEUE --queue-num {QUEUE}")
    return flood(bed, 0, flows=flows)


def _flooded_peer(*argv: object) -> float:
    with Bed() as bed:
        bed.peer(*map(str, argv), core=1)
        return flooded_through(bed)


def _c(mode: str, gso: str = "gso") -> list[object]:
    return [BUILT / "queue", mode, QUEUE, COPIED, gso, MAX_LEN]


def _fanned(queues: int) -> float:
    """Two senders, one on each processor; a worker on each of the first so many."""
    numbers = f"num = {QUEUE}" if queues == 1 else f'balance = "{QUEUE}:{QUEUE + queues - 1}"\ncpu_fanout = true'
    with Bed() as bed:
        agent = bed.agent(SERVED.replace(f"num = {QUEUE}", numbers) + FLOOD_RULE)
        agent.pin_workers()
        return flood(bed, 0, 1)


def _queue(bed: Bed, protocol: str = "tcp") -> None:
    for hook in ("INPUT", "OUTPUT"):
        for port in ("dport", "sport"):
            bed.here.shell(f"iptables-legacy -t mangle -A {hook} -p {protocol} --{port} {_PORT} -j NFQUEUE --queue-num {QUEUE}")


def _bulk(bed: Bed, queued: bool) -> float:
    bits = bed.bulk(_PORT, _BULK)
    if queued and not any(queue.id_sequence for queue in bed.queues()):
        raise BenchError("no packet came to the queue")
    return bits / 1e9


def bulk_free() -> float:
    """Gbit/s without an agent."""
    with Bed() as bed:
        return _bulk(bed, False)


def bulk_marked() -> float:
    """No queue, no agent: what connection tracking and a rule that looks at the connection's mark cost by themselves."""
    with Bed() as bed:
        _mark(bed)
        return _bulk(bed, False)


def _mark(bed: Bed) -> None:
    for hook in ("INPUT", "OUTPUT"):
        bed.here.shell(f"iptables-legacy -t mangle -A {hook} -m connmark --mark 0x0/0xff000000 -j RETURN")


def bulk_agent(more: str, queued: bool = True, backend: str = "") -> float:
    """Gbit/s; queued: packets have to come to the queue."""
    with Bed() as bed:
        bed.agent(backend + SERVED + more + TCP_RULE)
        return _bulk(bed, queued)


def _bulk_c(gso: str) -> float:
    with Bed() as bed:
        bed.peer(*map(str, _c("batch", gso)))
        _queue(bed)
        return _bulk(bed, True)


def connected(more: str | None, backend: str = "") -> float:
    """New connections a second, 64 at once; without rules where `more` is None."""
    with Bed() as bed:
        bed.serve("close", _PORT)
        if more is not None:
            bed.agent(backend + SERVED + more + TCP_RULE)
        return _connected(bed)


def connected_marked() -> float:
    """The same without an agent, as `bulk_marked`."""
    with Bed() as bed:
        bed.serve("close", _PORT)
        _mark(bed)
        return _connected(bed)


def _connected(bed: Bed) -> float:
    rate, failed = bed.load("connect", "10.203.0.2", _PORT, 64, SECONDS)
    if failed:
        raise BenchError(f"{failed:.0f} connections failed")
    return rate


def _ask(agent: str | None, mine: int, yours: int, mode: str = "single") -> float:
    """Transactions a second on the loopback, every packet queued twice; the server of the queue on processor `mine`."""
    with Bed() as bed:
        if agent is None:
            bed.peer(*map(str, _c(mode)), core=mine)
            _queue(bed, "udp")
        else:
            bed.agent(SERVED + agent + TCP_RULE.replace("tcp_ports", "udp_ports"), core=mine)
        bed.serve("datagrams", _PORT, core=yours, side=bed.here)
        rate, _ = bed.load("ask", "udp", "127.0.0.1", _PORT, SECONDS, core=yours)
        if bed.judged() < 4 * rate:
            raise BenchError("not every packet was queued")
        return rate


def _burst(agent: bool) -> float:
    """Packets lost of 100,000 in bursts of 1,000."""
    with Bed() as bed:
        if agent:
            bed.agent(SERVED + FLOOD_RULE)
        else:
            bed.peer(*map(str, _c("batch")))
            bed.here.shell(f"iptables-legacy -t mangle -A OUTPUT -p udp --dport {FLOOD_PORT} -j NFQUEUE --queue-num {QUEUE}")
        (sent,) = bed.load("burst", "127.0.0.1", FLOOD_PORT, 100_000, 1000, 50_000)
        (queue,) = bed.queues()
        return sent - (queue.id_sequence - queue.user_dropped)


# One element each; nothing else looks at a packet. A line for each packet would be 500,000 a second: 1,000 are written.
_ELEMENTS: Final = {
    "log": "per_second = 1000",
    "rate-limit": 'rate = "100000000/s"',
    "sample": "one_in = 1000",
    "sample, probability": "probability = 0.001",
    "syn-monitor": "",
    "chaos": "drop = 0.001",
}


def _one(kind: str, options: str) -> str:
    kind = kind.partition(",")[0]
    return f'elements = ["one"]\n[element.one]\ntype = "{kind}"\n{options}\n'


def _idle(more: str) -> float:
    """Milliseconds of CPU a second that the workers take after packets came close together, and none comes any more."""
    with Bed() as bed:
        agent = bed.agent(SERVED + more + FLOOD_RULE)
        bed.load("burst", "127.0.0.1", FLOOD_PORT, 2000, 1, 20_000)
        time.sleep(0.5)
        begin, before = time.monotonic(), agent.worker_seconds()
        time.sleep(2)
        return (agent.worker_seconds() - before) * 1e3 / (time.monotonic() - begin)


def _go() -> dict[str, Callable[[], float]]:
    if not (BUILT / "queue-go").exists():
        return {}
    # The binding hands Go's own pointers to C.
    return {"Go binding": lambda: _flooded_peer("env", "GODEBUG=cgocheck=0", BUILT / "queue-go", QUEUE, MAX_LEN)}


PYTHON: Final = BUILT.parent.parent.parent.parent / ".venv" / "bin" / "python"
BENCHMARKS: Final = (
    Benchmark(
        "flood", "64-byte UDP flood, one queue, bare accept", "verdicts/s",
        {
            "agent": flooded,
            "C, one verdict a packet": lambda: _flooded_peer(*_c("single")),
            "C, batched": lambda: _flooded_peer(*_c("batch")),
            "C, batches of 4,096": lambda: _flooded_peer(*_c("batch"), 4096),
            "NetfilterQueue": lambda: _flooded_peer(PYTHON, HERE / "peers" / "plain.py", QUEUE, COPIED, MAX_LEN),
            **_go(),
        },
        (Goal("agent", "at least", 1.25, "C, one verdict a packet"), Goal("agent", "at least", 1.0, "C, batched"),
         Goal("agent", "at least", 1.0, "C, batches of 4,096"), Goal("agent", "at least", 2.3, "Go binding")),
    ),
    Benchmark(
        "policy", "the same, five-tuple policy of 1,000 networks and ports", "verdicts/s",
        {"bare accept": flooded, "policy": lambda: flooded(policy())},
        (Goal("policy", "at least", 0.85, "bare accept"),),
    ),
    Benchmark(
        "elements", "the same, one element each; log at 1,000 lines a second", "verdicts/s",
        {"bare accept": flooded, **{name: partial(flooded, _one(name, options)) for name, options in _ELEMENTS.items()}},
        tuple(Goal(name, "at least", 0.9, "bare accept") for name in _ELEMENTS),
    ),
    Benchmark(
        "fanout", "two senders; two queues with cpu-fanout and two workers", "verdicts/s",
        {"one queue": lambda: _fanned(1), "two queues": lambda: _fanned(2)},
        (Goal("two queues", "at least", 1.6, "one queue"),),
    ),
    Benchmark(
        "bulk", "one TCP stream over veth, MTU 1500, GSO on", "Gbit/s",
        {
            "no rules": bulk_free,
            "agent, policy": lambda: bulk_agent(policy()),
            "agent, policy, busy_poll": lambda: bulk_agent('busy_poll = "20us"\n' + policy()),
            "agent, policy, auto": lambda: bulk_agent(_AUTO + policy()),
            "agent, offload": lambda: bulk_agent(_OFFLOAD),
            "one connmark rule": bulk_marked,
            "C, batched": lambda: _bulk_c("gso"),
        },
        (Goal("agent, policy", "at least", 0.75, "no rules"), Goal("agent, policy, auto", "at least", 0.95, "no rules"),
         Goal("agent, offload", "at least", 0.97, "no rules"), Goal("agent, offload", "at least", 1.0, "one connmark rule")),
    ),
    Benchmark(
        "segments", "the same, GSO off", "Gbit/s",
        {"agent, policy": lambda: bulk_agent("gso = false\n" + policy()), "C, batched": lambda: _bulk_c("segments")},
        (Goal("agent, policy", "at least", 0.85, "C, batched"),),
    ),
    Benchmark(
        "connections", "new TCP connections", "1/s",
        {"no rules": lambda: connected(None), "agent, policy": lambda: connected(policy()),
         "agent, offload": lambda: connected(_OFFLOAD)},
        (Goal("agent, offload", "at least", 0.70, "no rules"),),
    ),
    Benchmark(
        "exchange-1", "64 bytes there and back by UDP, all on one core, four verdicts each", "transactions/s",
        {"agent": lambda: _ask("", 1, 1), "agent, auto": lambda: _ask(_AUTO, 1, 1), "C": lambda: _ask(None, 1, 1)},
        (Goal("agent", "at least", 0.95, "C"), Goal("agent, auto", "at least", 1.0, "agent")),
    ),
    Benchmark(
        "exchange-2", "the same, the queue's server on a core of its own", "transactions/s",
        {"agent": lambda: _ask("", 1, 0), "agent, busy_poll": lambda: _ask('busy_poll = "50us"\n', 1, 0),
         "agent, auto": lambda: _ask(_AUTO, 1, 0),
         "C": lambda: _ask(None, 1, 0), "C, always spinning": lambda: _ask(None, 1, 0, "spin")},
        (Goal("agent", "at least", 0.95, "C"), Goal("agent, busy_poll", "at least", 3.0, "C")),
    ),
    Benchmark(
        "bursts", "100,000 packets in bursts of 1,000 at 50,000 a second", "packets lost",
        {"agent": lambda: _burst(True), "C, batched": lambda: _burst(False)},
        (Goal("agent", "at most", 0),),
    ),
    Benchmark(
        "idle", "the workers of one queue while no packet comes, 2 s", "ms of CPU a second",
        {"agent": lambda: _idle(""), "agent, auto": lambda: _idle(_AUTO)},
    ),
)  # fmt: skip
