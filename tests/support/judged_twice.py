"""Packets that a compiled policy judges, each judged by the policy in Python as well, one at a time, in this network namespace.

Queues in front of our rules and behind them show what the rules do with a packet: whether the kernel decides it, or the queue's
worker. A second judge, who is shown every packet, says what would happen without rules of the kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nfq_agent.config.models import Config
from nfq_agent.context import Context
from nfq_agent.counters import Counters
from nfq_agent.element_chain import ElementChain
from nfq_agent.host import cgroups
from nfq_agent.host.nftables.owned import OwnedHost
from nfq_agent.host.owners import HostOwners
from nfq_agent.packet import TCP, UDP, Hook, Packet
from nfq_agent.queue.queue import Queue
from nfq_agent.rules.group_tree import GroupTree
from nfq_agent.rules.groups import bound
from nfq_agent.rules.model import FAMILIES
from nfq_agent.rules.plan import plan
from nfq_agent.service.packet_judge import PacketJudge, WorkerSettings
from nfq_agent.verdict import ACCEPT, DROP, Action, Verdict

IN_FRONT, BEHIND, OURS = 7, 8, 100
UID = 972
# Seconds without a packet after which nothing more comes from what was done before.
QUIET = 0.02
# In front of our table mangle, and of connection tracking; and behind it.
_AROUND = [
    f"{program} -w -t {table} -A {chain} -j NFQUEUE --queue-num {number}"
    for program in ("iptables-legacy", "ip6tables-legacy")
    for table, chain, number in (
        ("raw", "PREROUTING", IN_FRONT), ("raw", "OUTPUT", IN_FRONT), ("filter", "INPUT", BEHIND), ("filter", "OUTPUT", BEHIND)
    )
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Judged:
    """A packet. expected, passed: whether it may pass, by the policy in Python, and whether it did. kernel: it was not queued."""

    what: str
    expected: bool
    reason: str
    passed: bool
    kernel: bool


class TwoJudges:
    """The rules of a configuration in force, with a worker; `pump` lets packets through."""

    def __init__(self) -> None:
        for line in _AROUND:
            subprocess.run(line.split(), check=True)
        self._queues = {number: Queue(number, uid_gid=True).open().bind() for number in (IN_FRONT, BEHIND, OURS)}
        self._host = OwnedHost("default")
        self._owners = [HostOwners(), HostOwners()]
        self.judged: list[Judged] = []
        self.now = 1000.0

    def configure(self, config: Config) -> None:
        """Put in its rules, and let new judges begin."""
        self.config = config
        self._ruleset = plan(config, UID, lists=True)
        self.learn()
        specs = config.packet_elements(config.queue["main"])
        # What is kept in the kernel for a flow is the verdict on it.
        self._reference = self._judge([spec for spec in specs if spec.name != "offload"], self._owners[0])
        self._worker = self._judge(specs, self._owners[1])

    def learn(self) -> None:
        """Make the rules for the control groups that exist now."""
        ruleset = bound(self._ruleset, {}, GroupTree(cgroups.all_groups()))
        self._host.apply_all({family: ruleset.get(family, {}) for family in FAMILIES})

    def forget(self) -> None:
        """Take all rules out."""
        self._host.apply_all({family: {} for family in FAMILIES})

    def _judge(self, specs: list[Any], owners: HostOwners) -> PacketJudge:
        queue = self.config.queue["main"]
        default = {"accept": ACCEPT, "drop": DROP}[queue.default]
        elements = [spec.cls(spec.name, spec.options, lambda *_, **__: None) for spec in specs]
        chain = ElementChain(elements, default, queue.mode == "monitor", Context(owners=owners))
        settings = WorkerSettings(OURS, default, ACCEPT, queue.mode == "monitor")
        return PacketJudge(chain, settings, Counters(), lambda *_, **__: None, lambda *_: None)

    def pump(self) -> None:
        """Let each packet pass, or not, until no more come."""
        front = self._queues[IN_FRONT]
        while select.select([front], [], [], QUIET)[0]:
            for packet in front.read(1):
                self.judged.append(self._follow(packet))

    def _follow(self, packet: Packet) -> Judged:
        self.now += 0.001
        self._reference.now = self._worker.now = self.now
        if packet.hook == Hook.PREROUTING:
            # Where our rules have it.
            packet.hook = Hook.INPUT
        what = f"{packet.hook} {packet.headers.five_tuple} flags {packet.headers.tcp_flags}"
        if packet.headers.five_tuple.protocol not in (TCP, UDP):
            # It is not among what our rules select.
            self._queues[IN_FRONT].answer([(packet, ACCEPT)])
            passed = self._queues[BEHIND].read(1)
            self._queues[BEHIND].answer([(each, ACCEPT) for each in passed])
            return Judged(what, bool(passed), "", bool(passed), True)
        expected = self._reference.verdict(packet)
        reason = repr(expected)
        self._queues[IN_FRONT].answer([(packet, ACCEPT)])
        queued = self._queues[OURS].read(1)
        for each in queued:
            self._queues[OURS].answer([(each, self._worker.verdict(each))])
        # One that repeats comes through our rules again.
        passed = self._queues[BEHIND].read(1)
        for each in passed:
            self._queues[BEHIND].answer([(each, ACCEPT)])
        return Judged(what, _passes(expected), reason, bool(passed), not queued)


def _passes(verdict: Verdict) -> bool:
    return verdict.outcome is Action.ACCEPT


@contextlib.contextmanager
def member_of(group: Path) -> Iterator[None]:
    """This process in a control group: its new sockets belong to it for good."""
    root = cgroups.mounted()
    assert root is not None
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    before = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    (group / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (root / before.strip("/") / "cgroup.procs").write_text("0")
